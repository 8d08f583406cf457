"""The end of a verb: what goes to stdout, into files and into the run folder."""

from __future__ import annotations

import csv
import json
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from .. import files
from ..errors import BadInput, MissingExtra
from ..result import Result
from .options import GroupedOption

FORMATS = ("text", "json", "github")


def json_option() -> click.Option:
    return _option(
        "as_json", "--json", "Print one JSON document on stdout and nothing else.", is_flag=True
    )


def format_option() -> click.Option:
    return _option(
        "form",
        "--format",
        "The result as text, as JSON like --json, or as annotations of a GitHub workflow.",
        type=click.Choice(FORMATS),
        default=FORMATS[0],
        show_default=True,
    )


def folder_option(*short: str) -> click.Option:
    text = "Run folder: write the result, its data and report.html there, too."
    # by a name of its own: a study may have a setting `folder`
    return _option("run_folder", "--folder", text, *short, metavar="DIR")


def csv_option() -> click.Option:
    return _option("as_csv", "--csv", "Print the table as CSV.", is_flag=True)


def _option(name: str, spelling: str, text: str, *short: str, **more: Any) -> click.Option:
    option = GroupedOption([name, *short, spelling], help=text, **more)
    option.group = "Output"
    return option


def command_line() -> str | None:
    """The command as it was typed, quoted for a shell; None where no command runs."""
    context = click.get_current_context(silent=True)
    arguments = None if context is None else context.find_root().obj
    return None if arguments is None else shlex.join(["surgeon", *arguments])


def to_text(document: Mapping[str, Any]) -> str:
    return json.dumps(document, indent=2, allow_nan=False)


def print_json(document: Mapping[str, Any]) -> None:
    """Exactly one JSON document on stdout, with the command that made it."""
    made_by = command_line()
    head = {} if made_by is None or "command" in document else {"command": made_by}
    click.echo(to_text({**head, **document}))


def run_folder(output: str | None) -> Path | None:
    """The run folder, if one is wanted: made and tried before the work that is to go into it.

    Raises: BadInput.
    """
    if output is None:
        return None
    folder = Path(output)
    files.make_folder(folder)
    return folder


def deliver(result: Result, form: str, folder: Path | None, output: Path | None = None) -> None:
    """Write the patch to `output`, everything to the run folder, and the result to stdout.

    form: one of FORMATS, or csv.

    An extra that is missing costs only what needs it, and a sentence on stderr; so does a folder
    that no report can be made of. Raises: OSError where the folder cannot be written to any more.
    """
    document = result.to_json()  # raises for a number that JSON has no room for: before any file
    if output is not None:
        _write_patch(result, output)
        document |= {"patch": str(output), "patch_bytes": output.stat().st_size}
    if folder is not None:
        _write_folder(result, document, folder)
    if form == "json":
        click.echo(to_text(document))
    elif form == "csv":
        _print_csv(result)
    elif form == "github":
        from ..show.github import annotate

        click.echo(annotate(result))
    else:
        from ..show.text import print_result

        print_result(result)
        if output is not None:
            click.echo(f"{output}, {output.stat().st_size} bytes")
    if result.warning is not None and form != "json":
        click.echo(f"surgeon: {result.warning}", err=True)
    if folder is not None:
        _write_report(folder)


def _print_csv(result: Result) -> None:
    """The rows of a result that is a table."""
    rows = result.rows()
    names = dict.fromkeys(name for row in rows for name in row)
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(names)
    writer.writerows([[row.get(name) for name in names] for row in rows])


def _write_patch(result: Result, output: Path) -> None:
    from ..patch import save

    save(result.patch, output)  # type: ignore[attr-defined]


def _write_folder(result: Result, document: Mapping[str, Any], folder: Path) -> None:
    for name, content in result.attachments().items():
        try:
            with files.writing(folder / name) as part:
                _writer(content)(part)
        except MissingExtra as error:
            click.echo(f"surgeon: no {name} was written: {error}", err=True)
    text = to_text(document) + "\n"
    name = result.kind.replace(" ", "-")
    files.write_text(folder / f"{name}.json", text)


def _writer(content: Any) -> Callable[[Path], Any]:
    """What writes an attachment: a patch as safetensors, columns as Parquet."""
    if isinstance(content, Mapping):
        return lambda path: _write_columns(content, path)
    from ..patch import save

    return lambda path: save(content, path)


def _write_columns(columns: Mapping[str, Any], path: Path) -> None:
    """Columns of one length as Parquet. Raises: MissingExtra without `weight-surgeon[report]`."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtra("a Parquet file", "report") from error
    pyarrow.parquet.write_table(pyarrow.table(dict(columns)), path)


def _write_report(folder: Path) -> None:
    from ..show.page import write_report

    try:
        report = write_report(folder)
    # an extra is missing, or something else in the folder is damaged: the result is there all the
    # same
    except BadInput as error:
        click.echo(f"surgeon: no report.html was written: {error}", err=True)
    else:
        click.echo(f"report: {report}", err=True)
