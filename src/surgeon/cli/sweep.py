"""`surgeon sweep`: many models, operations and seeds as independent tasks; `surgeon sweep table`:
their results.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

import click
import transformers
from rich.markup import escape
from rich.table import Table

from ..errors import SurgeonError
from ..show.console import out, print_table
from ..sweep import Answer, Crew, Store, Summary, averages, expand, query, read_plan, run_tasks
from ..sweep.cluster import RayCrew
from ..sweep.local import LocalCrew
from .common import json_option, print_json, progress
from .sweep_operations import OPERATIONS

REGISTRY = f"{__package__}.sweep_operations"  # workers import it by this name
SHOWN_FAILURES = 10


class _PlanOrTable(click.Group):
    """A group whose command is `run` where the first word is none of its commands; a plan of such a
    name is ./table.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, *ctx.help_option_names):
            args = ["run", *args]
        return super().parse_args(ctx, args)


@click.group("sweep", cls=_PlanOrTable)
def command() -> None:
    """Many models x operations x seeds as independent tasks, resumable.

    `surgeon sweep PLAN` runs a plan and `surgeon sweep table DIR` shows its results; `surgeon sweep
    PLAN --help` tells their options.
    """


@command.command("run")
@click.argument("plan")
@click.option(
    "-o",
    "output",
    metavar="DIR",
    help=(
        "Folder of the results; run again, it goes on with what is missing.  [default: PLAN's name]"
    ),
)
@click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="Processes here, or a Ray cluster.",
)
@click.option(
    "--address",
    help=(
        "Ray: auto, host:port or ray://host:port of a cluster.  [default: Ray is started on this"
        " machine alone]"
    ),
)
@click.option(
    "--workers",
    type=click.IntRange(1),
    help="Most tasks at a time.  [default: as many as there are CPUs for]",
)
@click.option("--threads", type=click.IntRange(1), help="CPUs of a worker.  [default: at most 4]")
@click.option(
    "--gpus",
    default=0.0,
    type=click.FloatRange(0),
    show_default=True,
    help="Ray: GPUs that a worker reserves, also a share.",
)
@click.option(
    "--dry-run", is_flag=True, help="Check the plan, list the tasks that are missing, and run none."
)
@json_option
def run(
    plan: str,
    output: str | None,
    engine: str,
    address: str | None,
    workers: int | None,
    threads: int | None,
    gpus: float,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Run the tasks of PLAN (YAML) that have no result yet: `surgeon sweep PLAN`."""
    if engine == "local" and (address is not None or gpus):
        raise click.UsageError("--address and --gpus are for --engine ray.")
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    read = read_plan(plan, OPERATIONS)
    tasks = expand(read)
    folder = Path(plan).stem if output is None else output
    store = Store(folder)
    known: dict[str, Any] = {"title": read.title, "folder": folder, "engine": engine}
    if dry_run:
        missing = store.missing(tasks)
        listed = [{"id": t.id, "task": t.says} for t in missing]
        document = {**known, "tasks": len(tasks), "missing": listed}
        _deliver(document, as_json, lambda: _print_missing(document))
        return
    make: Callable[[int], Crew]
    if engine == "ray":
        make = partial(
            RayCrew, REGISTRY, workers=workers, threads=threads, address=address, gpus=gpus
        )
    else:
        make = partial(LocalCrew, REGISTRY, workers=workers, threads=threads)
    with store.writing(asdict(read), tasks):
        try:
            with progress() as tell:
                summary = run_tasks(tasks, store, make, tell)
        except KeyboardInterrupt:
            kept = len(tasks) - len(store.missing(tasks))
            raise SurgeonError(
                f"interrupted; {kept} of {len(tasks)} tasks are done and kept in {folder}, and the"
                " same command goes on with the others."
            ) from None
    _deliver(
        {**known, **summary.to_json()}, as_json, lambda: _print_summary(read.title, folder, summary)
    )
    if summary.failures:
        raise SurgeonError(
            f"{len(summary.failures)} of {len(tasks)} tasks failed; the same command tries them"
            " again."
        )


@command.command("table")
@click.argument("folder", metavar="DIR")
@click.option(
    "--sql",
    metavar="QUERY",
    help="SQL (DuckDB) on the table results, one row for each row of a task.",
)
@click.option(
    "--by",
    multiple=True,
    metavar="COLUMN",
    help="Mean and standard deviation over rows that agree in this; again for several.",
)
@click.option(
    "--show",
    multiple=True,
    metavar="COLUMN",
    help="With --by: only the averages of this; again for several.  [default: all]",
)
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV.")
@json_option
def table(
    folder: str,
    sql: str | None,
    by: tuple[str, ...],
    show: tuple[str, ...],
    as_csv: bool,
    as_json: bool,
) -> None:
    """The results of a sweep in DIR as a table: all of them, or averages, or what a query asks
    for.
    """
    if (sql is not None and by) or (show and not by) or (as_csv and as_json):
        raise click.UsageError("give --sql, or --by and maybe --show; and --csv or --json.")
    store = Store(folder)
    answer = (
        query(store, sql) if sql is not None else averages(store, by, show) if by else query(store)
    )
    if as_json:
        rows = [dict(zip(answer.columns, map(_plain, row), strict=True)) for row in answer.rows]
        print_json(
            {"folder": folder, "missing": answer.missing, "columns": answer.columns, "rows": rows}
        )
    elif as_csv:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerows([answer.columns, *answer.rows])
    else:
        _print_answer(answer)
    if answer.missing and not as_json:
        click.echo(
            f"surgeon: {answer.missing} tasks of this sweep have no result yet, so they are not in"
            " the table.",
            err=True,
        )


def _deliver(document: dict[str, Any], as_json: bool, tell_all: Callable[[], None]) -> None:
    print_json(document) if as_json else tell_all()


def _print_missing(document: dict[str, Any]) -> None:
    out.print(
        f"[bold]{escape(document['title'])}[/bold]: {len(document['missing'])} of"
        f" {document['tasks']} tasks are to be run"
    )
    for task in document["missing"]:
        out.print(escape(f"{task['id']}  {task['task']}"))


def _print_summary(title: str, folder: str, summary: Summary) -> None:
    failed = f", [bold]{len(summary.failures)} failed[/bold]" if summary.failures else ""
    before = f" {summary.before} were done before," if summary.before else ""
    out.print(
        f"[bold]{escape(title)}[/bold]: {summary.tasks} tasks,{before} {summary.done} done"
        f" now{failed}; results in {escape(folder)}"
    )
    for failure in summary.failures[:SHOWN_FAILURES]:
        out.print(escape(f"failed: {failure.task.says}: {failure.error}"))
    if (more := len(summary.failures) - SHOWN_FAILURES) > 0:
        out.print(escape(f"and {more} more; each has its record in {folder}/errors"))


def _print_answer(answer: Answer) -> None:
    shown = Table(*map(escape, answer.columns), box=None, header_style="bold")
    for row in answer.rows:
        shown.add_row(
            *(
                f"{v:.4g}" if isinstance(v, float) else "" if v is None else escape(str(v))
                for v in row
            )
        )
    print_table(shown)


def _plain(value: Any) -> Any:
    """A value as JSON has it; NaN and infinity, for which it has no room, become null."""
    if isinstance(value, float):
        return value if isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)
