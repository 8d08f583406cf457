"""Which entries `quantize` holds out: those that `find` finds, those that are named, or none."""

from __future__ import annotations

from typing import Any

from ..anatomy import Entry
from ..errors import BadInput
from ..find import FindResult
from ..find.verify import entries_of
from ..result import record
from .lab import Lab, TextSettings
from .naming import regions_of, several, vital_sets

FIND, NONE = "find", "none"


@record
class HeldOut:
    """The critical entries, and where they come from."""

    entries: list[Entry]
    source: str


def check_critical(critical: Any) -> None:
    """Raises: BadInput if `find` or `none` stands beside something else."""
    named = several(critical)
    if len(named) > 1 and any(one in (FIND, NONE) for one in named if isinstance(one, str)):
        raise BadInput(
            "‹critical› find and ‹critical› none stand alone; name entries, or one of the two."
        )


def held_out(lab: Lab, critical: Any, text: TextSettings, seed: int) -> tuple[HeldOut, list[str]]:
    """The entries to hold out, and what a record of the settings names them by."""
    named = list(several(critical)) or [FIND]
    if named == [NONE]:
        return HeldOut([], "none asked for"), named
    if named == [FIND]:
        finding = vital_sets(lab, text, seed, only="mlp.down")
        entries = [one.entry for each in finding.sets if each.vital for one in each.entries]
        return HeldOut(entries, f"find: {finding.verdict}"), named
    # of a finding every vital set counts, not only the first
    sets = [one.sets if isinstance(one, FindResult) else [one] for one in named]
    parts = regions_of(lab, [one for each in sets for one in each], text, seed, "critical")
    entries = [entry for part in parts for entry in entries_of(lab.anatomy, part)]
    return HeldOut(entries, "named"), [str(part) for part in parts]
