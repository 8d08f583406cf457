"""A study as a command: its settings as options, a model opened, the result delivered."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from ..errors import BadInput, SurgeonError
from ..progress import progress_bar
from ..settings import settings_of
from ..show.console import err
from ..studies.desk import Desk
from ..studies.registry import STUDIES, Study
from .deliver import (
    command_line,
    csv_option,
    deliver,
    folder_option,
    json_option,
    print_csv,
    run_folder,
)
from .options import GroupedCommand, GroupedOption, flag, given_by, options_of


def command_of(study: Study) -> click.Command:
    """The command that runs a study."""
    parameters: list[click.Parameter] = []
    if study.opens:
        parameters.append(click.Argument(["model"]))
    parameters += options_of(study.settings, study.positional)
    if study.opens:
        parameters += options_of(_opening(study))
    if study.output:
        parameters.append(_output_option(study))
    if study.folder:
        parameters.append(folder_option())
    parameters.append(json_option())
    if study.csv:
        parameters.append(csv_option())
    return GroupedCommand(
        study.name,
        params=parameters,
        callback=click.pass_context(functools.partial(_run, study)),
        help=study.settings.__doc__,
        short_help=study.summary,
        epilog=_others(study),
    )


def _others(study: Study) -> str | None:
    """The verbs of two words that begin with this one's name."""
    others = [one for one in STUDIES.values() if one.name.startswith(f"{study.name} ")]
    return "\n\n".join(f"Also surgeon {one.name}: {one.summary}" for one in others) or None


def _run(study: Study, context: click.Context, /, **values: Any) -> None:
    with _spelled(study):
        folder = run_folder(values.get("folder"))
        output = values["output"] if study.output else None
        _check_place(output)
        if values["as_json"] and values.get("as_csv"):
            raise BadInput("give ‹csv› or ‹json›, not both.")
        given = given_by(context, [one.name for one in settings_of(study.settings)])
        study.configured(given)  # what cannot be is said before a model is opened
        with progress_bar(err) as tell:
            desk = Desk()
            if study.opens:
                desk = _open(study, context, values["model"], bool(given.get("detect_only")))
            desk.listen(tell)
            result = study.run(desk, given, command_line())
        if values.get("as_csv"):
            print_csv(result)
        else:
            deliver(result, values["as_json"], folder, None if output is None else Path(output))
        if result.warning is not None and not values["as_json"]:
            click.echo(f"surgeon: {result.warning}", err=True)
        if result.failure is not None:
            raise SurgeonError(result.failure)


def _open(study: Study, context: click.Context, model: str, detect_only: bool) -> Any:
    from ..studies.lab import open_lab

    opening = given_by(context, [one.name for one in settings_of(_opening(study))])
    return open_lab(model, whole=not detect_only, **opening)


def _opening(study: Study) -> Any:
    from ..studies.lab import ModelSettings, StreamSettings

    return StreamSettings if study.opens == "stream" else ModelSettings


def _output_option(study: Study) -> click.Option:
    option = GroupedOption(
        ["output", "-o"], metavar="P", required=True, help=f"The {study.output} to write."
    )
    option.group = ""
    return option


def _check_place(output: str | None) -> None:
    """Raises: BadInput if a patch cannot be written there, before any work is done."""
    if output is not None and not Path(output).parent.is_dir():
        raise BadInput(
            f"there is no folder {Path(output).parent} for {output}; make it first, or choose"
            " another place."
        )


@contextmanager
def _spelled(study: Study) -> Iterator[None]:
    """Errors inside know how this command spells its settings."""
    try:
        yield
    except SurgeonError as error:
        error.spelled = {one.name: flag(one) for one in settings_of(study.settings)}
        raise
