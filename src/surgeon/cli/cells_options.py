"""Options made from settings, and settings from what the options say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, TypeVar

import click

from .. import settings as declared
from .common import F, options

C = TypeVar("C")


def settings(config: type, *names: str) -> Callable[[F], F]:
    """An option for each of these settings, as their class declares it; None where not given."""
    known = {one.name: one for one in declared.settings_of(config)}
    made = []
    for name in names:
        default, about = known[name].default, known[name].declaration
        said = f"{about.help[0].upper()}{about.help[1:]}."
        how: dict[str, Any] = {"metavar": about.metavar}
        if isinstance(default, bool):
            how = {"is_flag": True, "default": None}
        elif isinstance(default, tuple):
            how |= {"multiple": True}
        elif default is not None:
            how |= {"type": type(default)}
            said += f"  [default: {default}]"
        made.append(click.option(f"--{name.replace('_', '-')}", name, help=said, **how))
    return options(*made)


def configured(config: type[C], given: dict[str, Any]) -> C:
    """The settings at their defaults, but for those that were given."""
    return changed(config(), given)


def changed(config: C, given: dict[str, Any]) -> C:
    """The settings with those that were given in their place."""
    names = {f.name for f in fields(config)}  # type: ignore[arg-type]
    new = {name: value for name, value in given.items() if name in names and value is not None}
    return replace(config, **new)  # type: ignore[type-var]
