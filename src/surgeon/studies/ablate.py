"""`ablate`: an injury as a patch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from ..patch import MODES, Patch, ablate, known_mode
from ..result import Result, attached, result
from ..settings import nested, setting
from .lab import Lab, TextSettings
from .naming import AT_HELP, regions_of

_MEANINGS = "; ".join(f"{mode}: {meaning}" for mode, meaning in MODES.items())


@dataclass(frozen=True)
class Settings:
    """Write the change of given weights of MODEL as a patch; the model itself is not touched."""

    at: Any = setting(help=AT_HELP, metavar="ENTRY", many=True)
    mode: str = setting("zero", f"what an entry becomes; {_MEANINGS}", parse=known_mode)
    seed: int = setting(0, "seed of the controls, where `vital` is named", low=0, high=2**32 - 1)
    text: TextSettings = nested(partial(TextSettings, windows=40))


@result("ablate")
class Injury(Result):
    """A patch that takes weights out: how many entries it changes, in which sites, and how."""

    mode: str
    entries: int
    sites: list[str]
    patch: Patch | None = attached("injury.safetensors")

    def rows(self) -> list[dict[str, object]]:
        """One row."""
        return [{"mode": self.mode, "entries": self.entries, "sites": len(self.sites)}]


def run(lab: Lab, settings: Settings) -> Injury:
    regions = regions_of(lab, settings.at, settings.text, settings.seed)
    settings = replace(settings, at=[str(region) for region in regions])
    patch = ablate(lab.anatomy, regions, mode=settings.mode)
    entries = sum(int(patch.touched(site).sum()) for site in patch.sites)
    return Injury(
        settings.mode,
        entries,
        [str(site) for site in patch.sites],
        patch,
        provenance=lab.provenance(settings),
    )
