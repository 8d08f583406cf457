"""The published super weights as text."""

from __future__ import annotations

from rich.table import Table

from ...find.index import AGREES, DIFFERS
from ...studies.index import Index
from ...studies.index_verify import IndexCheck
from ..console import out, print_table, shown


def print_index(result: Index) -> None:
    """The coordinates model by model, then what is to be known of them, and their sources."""
    table = Table("entry", "weight", "evidence", "status", box=None, header_style="bold")
    for model in dict.fromkeys(one.model for one in result.records):
        # a row of its own, so that nothing is cut at 80 columns
        table.add_row(f"[bold]{shown(model)}[/bold]")
        for one in result.records:
            if one.model == model:
                entry = f"  {shown(str(one.entry))}"
                table.add_row(entry, _weight(one.weight), shown(one.evidence), shown(one.status))
    print_table(table)
    first_of = {one.note: one for one in reversed(result.records) if one.note}
    for note in dict.fromkeys(one.note for one in result.records if one.note):
        first = first_of[note]
        out.print(shown(f"{first.model} {first.entry}: {note}"))
    for evidence, source in {one.evidence: one.source for one in result.records}.items():
        out.print(shown(f"evidence {evidence}: {source}."))
    out.print(shown(result.about))


def print_index_check(result: IndexCheck) -> None:
    """Each printed value beside the measured one."""
    columns = ("entry", "printed", "measured", "rank of |w|", "verdict")
    table = Table(*columns, box=None, header_style="bold")
    for one in result.checks:
        entry, rank = shown(str(one.entry)), str(one.rank_abs)
        table.add_row(entry, _weight(one.weight), f"{one.measured:+.4f}", rank, shown(one.verdict))
    print_table(table)
    agree, differ = (
        sum(one.verdict == verdict for one in result.checks) for verdict in (AGREES, DIFFERS)
    )
    rest = len(result.checks) - agree - differ
    out.print(
        shown(
            f"{result.provenance.model} as {result.checks[0].model}: {agree} agree, {differ}"
            f" differ, {rest} have no printed value."
        )
    )
    out.print("Rank 1 is the largest weight of its matrix.")


def _weight(weight: float | None) -> str:
    return "" if weight is None else f"{weight:+.4f}"
