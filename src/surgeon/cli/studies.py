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
from ..settings import nearest, settings_of
from ..show.console import err
from ..show.github import ANNOTATED
from ..studies.desk import Desk
from ..studies.registry import Study, branches_of
from .deliver import (
    command_line,
    csv_option,
    deliver,
    folder_option,
    format_option,
    json_option,
    run_folder,
)
from .options import GroupedCommand, GroupedOption, flag, given_by, options_of


def command_of(study: Study) -> click.Command:
    """The command that runs a study."""
    parameters: list[click.Parameter] = []
    if study.opens:
        # a default of None would count as one, and the argument as not required
        usual = {"default": study.model} if study.model else {}
        parameters.append(click.Argument(["model"], required=not study.model, **usual))
    parameters += options_of(study.settings, study.positional)
    if study.opens:
        parameters += options_of(_opening(study))
    if study.output == "folder":
        parameters.append(folder_option("-o"))
    else:
        parameters += [_output_option(study)] if study.output else []
        parameters.append(folder_option())
    if study.name in ANNOTATED:
        parameters.append(format_option())
    parameters.append(json_option())
    if study.csv:
        parameters.append(csv_option())
    return GroupedCommand(
        study.name,
        params=parameters,
        callback=click.pass_context(functools.partial(_run, study)),
        help=study.settings.__doc__,
        short_help=study.summary,
        branches=branches_of(study.name),
    )


def family_of(word: str, summary: str) -> click.Command:
    """The command of a first word that is no study itself: it lists those that begin with it."""
    branches = branches_of(word)

    @click.pass_context
    def run(context: click.Context, command: str | None) -> None:
        if command is not None:
            name = f"{word} {command}"
            context.fail(f"No such command {name!r}{nearest(name, branches)}")
        click.echo(context.get_help())

    rest = click.Argument(["command"], required=False)
    return GroupedCommand(word, params=[rest], callback=run, help=summary, branches=branches)


def _run(study: Study, context: click.Context, /, **values: Any) -> None:
    with _spelled(study):
        folder = run_folder(values["run_folder"])
        output = values["output"] if study.output == "patch" else None
        _check_place(output)
        if values["as_json"] and values.get("as_csv"):
            raise BadInput("give ‹csv› or ‹json›, not both.")
        given = given_by(context, [one.name for one in settings_of(study.settings)])
        settings = study.configured(given)  # what cannot be is said before a model is opened
        with progress_bar(err) as tell:
            lab = Desk()
            if study.opens:
                lab = _open(study, context, values["model"], bool(given.get("detect_only")))
            lab.listen(tell)
            result = study.module.run(lab, settings).made(command=command_line())
        form = "json" if values["as_json"] else values.get("form", "text")
        form = "csv" if values.get("as_csv") else form
        deliver(result, form, folder, None if output is None else Path(output))
        failure = study.failure(result, settings)
        if failure is not None:
            raise SurgeonError(failure)


def _open(study: Study, context: click.Context, model: str, detect_only: bool) -> Any:
    """The lab of the model."""
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
