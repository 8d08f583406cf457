"""Options made from settings, and settings from what the options say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, TypeVar

import click

from .common import F, options

C = TypeVar("C")


def settings(config: type, *names: str) -> Callable[[F], F]:
    """An option for each of these settings, as their class declares it; None where not given."""
    declared = {f.name: f for f in fields(config)}
    made = []
    for name in names:
        default, help = declared[name].default, declared[name].metadata["help"]
        said = f"{help[0].upper()}{help[1:]}.  [default: {default:g}]"
        made.append(click.option(f"--{name.replace('_', '-')}", type=type(default), help=said))
    return options(*made)


def configured(config: C, given: dict[str, Any]) -> C:
    """The settings with those that were given in their place."""
    names = {f.name for f in fields(config)}  # type: ignore[arg-type]
    changed = {n: v for n, v in given.items() if n in names and v is not None}
    return replace(config, **changed)  # type: ignore[type-var]
