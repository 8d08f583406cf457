"""`surgeon report`: a run folder as one HTML file."""

from __future__ import annotations

from pathlib import Path

import click
from rich.markup import escape

from ..show.console import out
from ..show.page import write_report
from .common import json_option, print_json


@click.command("report")
@click.argument("dir")
@json_option
def command(dir: str, as_json: bool) -> None:
    """Write DIR/report.html, one self-contained page, from the results that lie in DIR.

    Results are the JSON documents that the other verbs write with -o or print with --json, under
    any name. What they hold is shown; nothing is measured anew.
    """
    path = write_report(Path(dir))
    if as_json:
        print_json({"report": str(path), "bytes": path.stat().st_size})
    else:
        out.print(escape(str(path)))
