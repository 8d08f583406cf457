"""Sweeps and their tables as text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Table

from ..console import out, print_table, shown

if TYPE_CHECKING:  # a table of results is printed without what a sweep runs on
    from ...studies.sweep import SweepResult
    from ...studies.sweep_table import SweepTable

SHOWN_FAILURES = 10


def print_sweep(result: SweepResult) -> None:
    """What was done, or what would be; then what failed."""
    title, folder = f"[bold]{shown(result.title)}[/bold]", shown(result.folder)
    if result.provenance.settings.get("dry_run"):
        out.print(f"{title}: {len(result.missing)} of {result.tasks} tasks are to be run")
        for task in result.missing:
            out.print(shown(f"{task.id}  {task.task}"))
        return
    failed = f", [bold]{len(result.failed)} failed[/bold]" if result.failed else ""
    before = f" {result.done_before} were done before," if result.done_before else ""
    out.print(
        f"{title}: {result.tasks} tasks,{before} {result.done} done now{failed}; results in"
        f" {folder}"
    )
    for failure in result.failed[:SHOWN_FAILURES]:
        out.print(shown(f"failed: {failure.task}: {failure.error}"))
    if (more := len(result.failed) - SHOWN_FAILURES) > 0:
        out.print(f"and {more} more; each has its record in {folder}/errors")


def print_sweep_table(result: SweepTable) -> None:
    """The table; columns that say the same in every row in one line below it."""
    rows = result.table
    same = {
        name: rows[0][name]
        for name in result.columns
        if len(rows) > 1 and all(row[name] == rows[0][name] for row in rows)
    }
    columns = [name for name in result.columns if name not in same]
    table = Table(*map(shown, columns), box=None, header_style="bold")
    for row in rows:
        table.add_row(*(shown(_cell(row[name])) for name in columns))
    print_table(table)
    known = ", ".join(f"{name} {_cell(value)}" for name, value in same.items() if value is not None)
    if known:
        out.print(shown(f"The same in every row: {known}."))


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)
