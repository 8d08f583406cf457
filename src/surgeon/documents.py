"""YAML files that people write, plans and recipes, as plain values.

PyYAML's safe loader runs no code, but it gives more than a plan can mean: dates where somebody
wrote 2024-01-01, lists that hold themselves, and by a few lines of aliases a document of billions
of values. So what is loaded is walked once, aliases multiplied out, and refused in a sentence
before anything else looks at it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from .corpus import read_text
from .errors import BadInput

MOST_VALUES = 100_000  # of one document, aliases multiplied out


def read_yaml(path: str | Path) -> Any:
    """The document: mappings with texts as keys, lists, texts, numbers, truth values and None.

    Raises: BadText for a file that cannot be read; BadInput for one that is no YAML, or holds
    something else, or more than a plan or a recipe can have use for.
    """
    try:
        document = yaml.safe_load(read_text(path))
        for count, value in enumerate(_values(document)):
            if count == MOST_VALUES:
                raise BadInput(
                    f"{path} holds more than {MOST_VALUES} values, aliases multiplied out; write a"
                    " smaller one."
                )
            _check(path, value)
    except RecursionError as error:
        raise BadInput(f"{path} is nested too deeply, or holds itself.") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: dates that no calendar has
        raise BadInput(f"{path} is not YAML: {str(error).splitlines()[0]}.") from error
    return document


def _values(document: Any) -> Iterator[Any]:
    """The document and everything in it, keys too."""
    yield document
    if isinstance(document, dict):
        for key, value in document.items():
            yield from _values(key)
            yield from _values(value)
    elif isinstance(document, list):
        for value in document:
            yield from _values(value)


def _check(path: str | Path, value: Any) -> None:
    if isinstance(value, str) and "\0" in value:
        raise BadInput(f"{path} holds a NUL character in {value!r:.80}; remove it.")
    if isinstance(value, dict):
        other = next((key for key in value if not isinstance(key, str)), None)
        if other is not None:
            raise BadInput(f"{path}: the key {other!r} is no text; write it in quotes.")
    elif not (value is None or isinstance(value, str | int | float | list)):
        raise BadInput(
            f"{path} holds {value!r}, a {type(value).__name__}; write it in quotes, if a text is"
            " meant."
        )


def beside(document: Path, name: str) -> str:
    """A file that a document names, as a whole path: beside it, or else in the working folder."""
    there = document.parent / name
    return str((there if there.exists() else Path(name)).resolve())
