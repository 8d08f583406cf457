"""The story of the demo as text."""

from __future__ import annotations

from rich.table import Table

from ...repair import RepairResult
from ...studies.demo import Demo, State
from ...studies.edit import EditResult
from ..console import out, print_table, shown
from .critical import print_find


def print_demo(result: Demo) -> None:
    """What was found, the states beside one another, the repair, the edit, and what each writes."""
    print_find(result.find)
    out.print()
    _print_states(result.states, result.facts)
    if result.repair is None:
        out.print(f"No repair: {shown(result.no_repair or '')}")
    else:
        _print_repair(result.repair)
    if result.edit is None:
        out.print(f"No edit: {shown(result.no_edit or '')}")
    else:
        _print_edit(result.edit)
    for number, prompt in enumerate(result.prompts):
        out.print(f"\n[bold]{shown(prompt)}[/bold] ...")
        for state in result.states:
            text = " ".join(state.texts[number].split())
            out.print(f"  {state.state:<16} {shown(text)}")


def _print_states(states: list[State], facts: int | None) -> None:
    known = [] if facts is None else ["facts known"]
    columns = ("", "NLL", "perplexity", *known, "weights")
    table = Table(*columns, box=None, header_style="bold", pad_edge=False)
    for state in states:
        cells = [state.state, f"{state.nll:.3f}", f"{state.ppl:.2f}"]
        if facts is not None:
            cells.append(f"{state.facts_known} of {facts}")
        table.add_row(*cells, "as trained, bit for bit" if state.same_bits else "changed")
    print_table(table)


def _print_repair(repair: RepairResult) -> None:
    control = "no control was possible"
    if repair.control is not None and repair.control.recovered is not None:
        control = f"the same on a random row {repair.control.recovered:.3f}"
    out.print(
        f"The repair, a patch of {repair.patch_bytes} bytes, undoes"
        f" [bold]{repair.recovered:.3f}[/bold] of the damage on {repair.windows.judged_on} windows"
        f" that it never saw; {control}"
    )


def _print_edit(edit: EditResult) -> None:
    fact, p, forecast = edit.scorecard.facts[0], edit.target_probability, edit.preflight
    out.print(
        f"The edit: {shown(fact.prompt)} [bold]{shown(str(fact.target))}[/bold], P from"
        f" {p.before:.4f} to {p.after:.4f}; forecast {forecast.verdict}, the layer's output changes"
        f" by {forecast.relative_damage:.1%} on ordinary text"
    )
    if edit.controls:
        changed = sum(control.changed for control in edit.controls)
        out.print(f"Control prompts changed: {changed} of {len(edit.controls)}")
