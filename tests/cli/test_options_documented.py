"""Every option of every command stands in a document."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from surgeon.cli import ORDER
from surgeon.cli import surgeon as group
from surgeon.studies.registry import STUDIES

ROOT = Path(__file__).parents[2]
DOCUMENTS = "\n".join(
    path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
)


def commands() -> Iterator[tuple[str, click.Command]]:
    """Every command by its words, those of two words, too."""
    for name in dict.fromkeys([*ORDER, *STUDIES]):
        command = group.get_command(click.Context(group), name)
        assert command is not None
        yield name, command


@pytest.mark.parametrize(("name", "command"), [*commands()], ids=lambda one: str(one)[:20])
def test_every_option_stands_in_a_document(name: str, command: click.Command) -> None:
    options = [
        spelling
        for parameter in command.params
        if isinstance(parameter, click.Option)
        for spelling in (*parameter.opts, *parameter.secondary_opts)
        if spelling.startswith("--")
    ]
    unknown = [one for one in options if not re.search(rf"{re.escape(one)}(?![\w-])", DOCUMENTS)]
    assert unknown == []


@pytest.mark.parametrize("name", [*ORDER, *STUDIES])
def test_every_command_stands_in_a_document(name: str) -> None:
    assert f"surgeon {name}" in DOCUMENTS
