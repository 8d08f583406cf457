"""What all kinds of recipes share: the YAML file, its keys and its plain settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ...corpus import read_text
from ...errors import BadInput

PLAIN = {"title": str, "model": str, "dtype": str, "window": int, "windows": int}


def read_yaml(path: Path, kinds: list[str]) -> dict[str, Any]:
    """The recipe as a mapping with a title and a model. Raises: BadText, BadInput."""
    try:
        source = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        raise BadInput(f"{path} is not YAML: {str(error).splitlines()[0]}.") from error
    if not isinstance(source, dict):
        raise BadInput(
            f"{path} is not a recipe: it should be a mapping with a title, a model, and one of"
            f" {', '.join(kinds)}."
        )
    if not {"title", "model"} <= set(source):
        raise BadInput(f"{path} needs a title, a model, and one of {', '.join(kinds)}.")
    return source


def known_keys(path: Path, source: Any, keys: set[str], prefix: str = "") -> None:
    """Raises: BadInput naming a key that is not one of `keys`, or that there is no mapping."""
    if not isinstance(source, dict):
        raise BadInput(
            f"{path}: {prefix.rstrip('.') or 'the recipe'} should be a mapping with the keys"
            f" {', '.join(sorted(keys))}."
        )
    unknown = [str(k) for k in source if k not in keys]
    if unknown:
        raise BadInput(
            f"{path}: {prefix}{unknown[0]} is not a key of a recipe; it can be"
            f" {', '.join(sorted(keys))}."
        )


def plain_settings(path: Path, source: dict[str, Any]) -> dict[str, Any]:
    """Title, model, dtype and windows, as far as they are given.

    Raises: BadInput for one of the wrong kind.
    """
    found = {key: source[key] for key in PLAIN if key in source}
    for key, value in found.items():
        if not isinstance(value, PLAIN[key]):
            raise BadInput(
                f"{path}: {key} is {value!r}, which is not"
                f" {'a number' if PLAIN[key] is int else 'text'}."
            )
    return found


def texts(path: Path, source: Any, where: str) -> list[str]:
    """A list of texts. Raises: BadInput."""
    if not isinstance(source, list) or not all(isinstance(t, str) for t in source):
        raise BadInput(f"{path}: {where} should be a list of texts.")
    return source


def numbers(path: Path, source: Any, where: str) -> list[float]:
    """A list of numbers. Raises: BadInput."""
    if (
        not isinstance(source, list)
        or not source
        or not all(isinstance(n, int | float) and not isinstance(n, bool) for n in source)
    ):
        raise BadInput(f"{path}: {where} should be a list of numbers.")
    return [float(n) for n in source]
