"""`undo`: take a patch off a checkpoint folder, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..anatomy.load import locate
from ..cells.checkpoint import holds_cells
from ..patch import undo_on_checkpoint
from ..result import Result, result
from ..settings import setting
from .cell_patches import patch_cells
from .desk import Desk
from .naming import patch_name, patch_of


@dataclass(frozen=True)
class Settings:
    """Write a copy of MODEL with a patch taken off again: the original entries come back bit for
    bit.
    """

    model: str = setting(help="the checkpoint that has the patch", metavar="MODEL")
    patch: Any = setting(help="patch to take off", metavar="P", is_file=True)
    output: str = setting(
        help="new folder for the checkpoint without the patch", metavar="DIR", short="-o"
    )


@result("undo")
class Undone(Result):
    """A checkpoint that was written: which patch was taken off, and where it lies."""

    patch: str
    output: str


def run(desk: Desk, settings: Settings) -> Undone:
    patch, name = patch_of(settings.patch), patch_name(settings.patch)
    if holds_cells(settings.model):
        patch_cells(settings.model, [patch], settings.output, undo=True)
    else:
        undo_on_checkpoint(locate(settings.model), patch, Path(settings.output))
    provenance = desk.provenance(replace(settings, patch=name), model=settings.model)
    return Undone(name, settings.output, provenance=provenance)
