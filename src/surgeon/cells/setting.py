"""What the modules here share: a setting in one line, and packages that need an extra."""

from __future__ import annotations

from dataclasses import field
from importlib import import_module
from typing import Any

from ..errors import MissingExtra


def setting(default: Any, help: str, metavar: str | None = None) -> Any:
    """A field of a settings dataclass: its default, what it does, and a word for its value."""
    return field(default=default, metadata={"help": help, "metavar": metavar})


def needs(what: str, *modules: str) -> list[Any]:
    """The modules. Raises: MissingExtra without `weight-surgeon[cells]`."""
    try:
        return [import_module(module) for module in modules]
    except ImportError as error:
        raise MissingExtra(what, "cells") from error
