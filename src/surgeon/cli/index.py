"""`surgeon index`: the published coordinates, and whether a model holds them."""

from __future__ import annotations

import click
from rich.markup import escape
from rich.table import Table

from ..find.index import AGREES, DIFFERS, about, published, verify_published
from ..show.console import out, print_table
from .common import json_option, print_json, progress


@click.group("index", invoke_without_command=True)
@json_option
@click.pass_context
def command(context: click.Context, as_json: bool) -> None:
    """List the published super weights, each with its source and evidence; `index verify MODEL`
    checks them against a model.
    """
    if context.invoked_subcommand is not None:
        if as_json:
            raise click.UsageError(
                "--json comes after the command: surgeon index verify MODEL --json.", context
            )
        return
    records = published()
    if as_json:
        print_json({"about": about(), "records": [r.to_json() for r in records]})
        return
    table = Table("entry", "weight", "evidence", "status", box=None, header_style="bold")
    for model in dict.fromkeys(
        r.model for r in records
    ):  # a row of its own, so that nothing is cut at 80 columns
        table.add_row(f"[bold]{model}[/bold]")
        for r in (r for r in records if r.model == model):
            table.add_row(
                f"  {escape(str(r.entry))}",
                "" if r.weight is None else f"{r.weight:+.4f}",
                r.evidence,
                r.status,
            )
    print_table(table)
    for note in dict.fromkeys(r.note for r in records if r.note):
        first = next(r for r in records if r.note == note)
        out.print(f"{first.model} {escape(str(first.entry))}: {escape(note)}")
    for evidence, source in {r.evidence: r.source for r in records}.items():
        out.print(f"evidence {evidence}: {escape(source)}.")
    out.print(escape(about()))


@command.command("verify")
@click.argument("model")
@click.option(
    "--as",
    "as_name",
    metavar="NAME",
    help="The model this one is a copy of: a Hub id of the list, or its last part.",
)
@json_option
def verify(model: str, as_name: str | None, as_json: bool) -> None:
    """Compare the published values with MODEL: a folder, or a Hub id, optionally @revision.

    Only the tensors concerned are read.
    """
    with progress() as tell:
        checks = verify_published(model, as_name=as_name, tell=tell)
    if as_json:
        print_json({"model": model, "checks": [c.to_json() for c in checks]})
        return
    table = Table(
        "entry", "printed", "measured", "rank of |w|", "verdict", box=None, header_style="bold"
    )
    for c in checks:
        printed = "" if c.record.weight is None else f"{c.record.weight:+.4f}"
        table.add_row(
            escape(str(c.record.entry)), printed, f"{c.measured:+.4f}", str(c.rank), c.verdict
        )
    print_table(table)
    count = {verdict: sum(c.verdict == verdict for c in checks) for verdict in (AGREES, DIFFERS)}
    rest = len(checks) - sum(count.values())
    out.print(
        f"{escape(model)} as {checks[0].record.model}: {count[AGREES]} agree, {count[DIFFERS]}"
        f" differ, {rest} have no printed value."
    )
    out.print("Rank 1 is the largest weight of its matrix.")
