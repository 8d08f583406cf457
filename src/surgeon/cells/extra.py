"""Packages that the extra `cells` brings, imported when they are needed."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from ..errors import MissingExtra


def needs(what: str, *modules: str) -> list[Any]:
    """The modules. Raises: MissingExtra without `weight-surgeon[cells]`."""
    try:
        return [import_module(module) for module in modules]
    except ImportError as error:
        raise MissingExtra(what, "cells") from error
