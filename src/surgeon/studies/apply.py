"""`apply`: patches onto a checkpoint folder, shard by shard."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..anatomy.load import locate
from ..cells.checkpoint import holds_cells
from ..patch import apply_to_checkpoint
from ..result import Result, result
from ..settings import setting
from .cell_patches import patch_cells
from .desk import Desk
from .naming import patch_names, patches_of


@dataclass(frozen=True)
class Settings:
    """Write a copy of MODEL with patches applied.

    Refused (exit status 3) if a patch was made on other weights.
    """

    model: str = setting(help="the checkpoint", metavar="MODEL")
    patches: Any = setting(
        help="patch; several are applied in order",
        metavar="P",
        many=True,
        spelled="patch",
        is_file=True,
    )
    output: str = setting(help="new folder for the patched checkpoint", metavar="DIR", short="-o")


@result("apply")
class Applied(Result):
    """A checkpoint that was written: which patches are in it, and where it lies."""

    patches: list[str]
    output: str


def run(desk: Desk, settings: Settings) -> Applied:
    patches, names = patches_of(settings.patches), patch_names(settings.patches)
    if holds_cells(settings.model):
        patch_cells(settings.model, patches, settings.output)
    else:
        apply_to_checkpoint(locate(settings.model), patches, Path(settings.output))
    provenance = desk.provenance(replace(settings, patches=names), model=settings.model)
    return Applied(names, settings.output, provenance=provenance)
