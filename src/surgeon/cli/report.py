"""`surgeon report`: a run folder as one HTML file."""

from __future__ import annotations

from pathlib import Path

import click

from ..show.page import write_report
from .deliver import json_option, print_json
from .options import GroupedCommand


@click.command("report", cls=GroupedCommand)
@click.argument("dir")
def command(dir: str, as_json: bool) -> None:
    """Write DIR/report.html, one self-contained page, from the results that lie in DIR.

    Results are the JSON documents that the other verbs write with --folder or print with --json,
    under any name. What they hold is shown; nothing is measured anew.
    """
    path = write_report(Path(dir))
    if as_json:
        print_json({"report": str(path), "bytes": path.stat().st_size})
    else:
        click.echo(str(path))


command.params.append(json_option())
