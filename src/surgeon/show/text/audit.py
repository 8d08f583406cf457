"""Audits as text, and as annotations."""

from __future__ import annotations

from collections.abc import Iterator

from rich.markup import escape

from ...audit import AMBER, OK, RED, Audit, EntryAudit, SetAudit
from ..console import one_line, out
from ..github import Level

LEVELS: dict[str, Level] = {RED: "error", AMBER: "warning", OK: "notice"}
MOST_ENTRIES = 3  # of a set, in its sentence
MOST_ANNOTATED = 8  # GitHub shows ten annotations of a kind for each step


def print_audit(result: Audit) -> None:
    """The verdict, a line for each set, then the super activations."""
    other, base = (escape(one_line(name)) for name in (result.other, result.base))
    out.print(
        f"Verdict: [bold]{result.verdict}[/bold]. {other} against {base}; the entries were"
        f" {escape(result.source)}."
    )
    for one in result.sets:
        out.print(f"  {one.verdict}: {escape(set_sentence(one))}")
    for each in result.activations:
        out.print(
            f"  Channel {each.row} after {each.site} peaks at {each.other:.4g}; in {base} at"
            f" {each.base:.4g}."
        )
    if result.not_run is not None:
        out.print(f"  Super activations were not compared: {escape(result.not_run)}")
    out.print(f"The rule: {result.curve.criteria}.")


def annotate_audit(result: Audit) -> Iterator[tuple[Level, str]]:
    """One for each set, then those of its entries that are not ok and carry most."""
    for one in result.sets:
        yield LEVELS[one.verdict], f"{one.verdict}: {result.other}: {set_sentence(one)}"
        if len(one.entries) == 1 or one.verdict == OK:
            continue
        bad = [entry for entry in one.entries if entry.verdict != OK]
        for entry in strongest(bad)[:MOST_ANNOTATED]:
            yield LEVELS[entry.verdict], f"{entry.verdict}: {entry_sentence(entry)}"


def set_sentence(one: SetAudit) -> str:
    """What became of a set: of its sum, and of the entries that carry most."""
    shown = ", ".join(map(entry_sentence, strongest(one.entries)[:MOST_ENTRIES]))
    if len(one.entries) == 1:
        return shown
    red, amber = (sum(e.verdict == grade for e in one.entries) for grade in (RED, AMBER))
    left = "nothing finite" if one.ratio is None else f"{one.ratio:.2f}"
    rest = len(one.entries) - MOST_ENTRIES
    more = f" and {rest} more" if rest > 0 else ""
    return (
        f"{len(one.entries)} entries keep {left} of their sum, {red} red and {amber} amber alone"
        f" ({shown}{more})"
    )


def entry_sentence(entry: EntryAudit) -> str:
    other = "none" if entry.other is None else f"{entry.other:.5g}"
    ratio = "none" if entry.ratio is None else f"{entry.ratio:.2f}"
    rank = "none" if entry.rank is None else str(entry.rank)
    return (
        f"{entry.entry} {entry.base:.5g} -> {other}, ratio {ratio}, rank {entry.rank_base} ->"
        f" {rank}"
    )


def strongest(entries: list[EntryAudit]) -> list[EntryAudit]:
    """Entries, those first that carry most of their set."""
    return sorted(entries, key=lambda entry: (-abs(entry.share), str(entry.entry)))
