"""`export`: a patch in the formats of the ecosystem."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..patch import export_lora
from ..result import Result, result
from ..settings import setting
from .desk import Desk
from .naming import patch_name, patch_of


@dataclass(frozen=True)
class Settings:
    """Write PATCH as a LoRA adapter, for the model with all patches applied that PATCH builds
    on.
    """

    patch: Any = setting(help="the patch", metavar="PATCH", is_file=True)
    to: str = setting(help="format; lora: a PEFT LoRA adapter", choices=("lora",))
    output: str = setting(help="new folder for the adapter", metavar="DIR", short="-o")


@result("export")
class Exported(Result):
    """An adapter that was written: its rank, and the modules and parameters that it changes."""

    patch: str
    format: str
    output: str
    rank: int
    targets: list[str]


def run(desk: Desk, settings: Settings) -> Exported:
    patch, name = patch_of(settings.patch), patch_name(settings.patch)
    config = export_lora(patch, Path(settings.output))
    targets = [*config["target_modules"], *(config["target_parameters"] or [])]
    provenance = desk.provenance(replace(settings, patch=name))
    return Exported(name, settings.to, settings.output, config["r"], targets, provenance=provenance)
