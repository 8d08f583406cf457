"""Repairs as text."""

from __future__ import annotations

from rich.table import Table

from ...measure import ThreeStates
from ...repair import RepairResult
from ..console import out, print_table, shown


def print_repair(result: RepairResult) -> None:
    """The three states, the share recovered beside the control, and the size of the change."""
    about = result.provenance
    text = "" if about.corpus is None else f" of {shown(about.corpus.name)}"
    out.print(
        f"[bold]{shown(about.model)}[/bold] on {result.windows.judged_on} windows{text} that the"
        " repair never saw"
    )
    table = Table("", "base", "broken", "patched", box=None, header_style="bold")
    kl = ThreeStates(0.0, result.kl.broken, result.kl.patched)
    for name, values, digits in (
        ("NLL", result.nll, 4),
        ("perplexity", result.ppl, 2),
        ("KL to base", kl, 4),
    ):
        states = (values.base, values.broken, values.patched)
        table.add_row(name, *(f"{value:z.{digits}f}" for value in states))
    print_table(table)
    out.print(f"Recovered of the damage: [bold]{result.recovered:.3f}[/bold]")
    out.print(f"Control: {_control(result)}")
    second = result.held_out
    if second.second_text and second.recovered is not None:
        out.print(f"Recovered on {shown(second.name)}: {second.recovered:.3f}")
    out.print(
        f"{result.steps} steps in {result.seconds:.1f} s; the change has norm"
        f" {result.delta_norm:.3g}, the intact rows {result.row_norm:.3g}, and the cosine between"
        f" them is {result.cosine_to_row:+.3f}"
    )


def _control(result: RepairResult) -> str:
    if result.control is None:
        return "none was run, so how much any row would have recovered is not known"
    if result.control.recovered is None:
        return f"none, since {result.control.why}"
    return f"the same on a random row recovers {result.control.recovered:.3f}"
