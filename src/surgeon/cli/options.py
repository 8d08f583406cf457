"""Settings as options of a command, and its help in groups."""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin

import click

from ..errors import spell
from ..settings import Setting, settings_of


def flag(one: Setting) -> str:
    """How a setting is spelled on the command line."""
    return "--" + (one.declaration.spelled or one.name).replace("_", "-")


def options_of(config: Any, positional: Sequence[str] = ()) -> list[click.Parameter]:
    """The `positional` settings of a class as arguments, in that order, all others as options."""
    known = {one.name: one for one in settings_of(config)}
    flags = {name: flag(one) for name, one in known.items()}
    arguments = [_argument(known[name]) for name in positional]
    options = [_option(one, flags) for one in known.values() if one.name not in positional]
    return [*arguments, *options]


def given_by(context: click.Context, names: Iterable[str]) -> dict[str, Any]:
    """What the caller gave of these settings: nothing that is a default."""
    default = click.core.ParameterSource.DEFAULT
    return {
        name: context.params[name]
        for name in names
        if name in context.params and context.get_parameter_source(name) is not default
    }


def _argument(one: Setting) -> click.Argument:
    """An argument must be given, also where a lab has a default for it."""
    many = one.declaration.many
    return click.Argument(
        [one.name],
        metavar=one.declaration.metavar or one.name.upper(),
        required=one.required or not many,
        nargs=-1 if many else 1,
    )


class GroupedOption(click.Option):
    """An option that knows the heading it stands under."""

    group = ""


def _option(one: Setting, flags: Mapping[str, str]) -> click.Option:
    declared = one.declaration
    kind = _plain_kind(one)
    names = [one.name, flag(one)]
    if declared.short:
        names.append(declared.short)
    if kind is bool:
        switch = [one.name, _switch(one)]
        option = GroupedOption(
            switch, is_flag=True, default=one.default, help=_sentence(one, flags)
        )
    else:
        many = declared.many or _is_list(one)
        option = GroupedOption(
            names,
            type=click.Choice(declared.choices) if _is_choice(one) else _CLICK.get(kind, str),
            default=None if many else _default(one),
            required=one.required,
            multiple=many,
            metavar=declared.metavar,
            show_default=not (one.required or many or one.default is None),
            help=_sentence(one, flags),
        )
    option.group = declared.group
    return option


def _default(one: Setting) -> Any:
    """The default as the option has it; a list that is written as one text, with commas."""
    if one.required:
        return None
    return ",".join(map(str, one.default)) if isinstance(one.default, tuple) else one.default


def _is_choice(one: Setting) -> bool:
    return bool(one.declaration.choices) and one.declaration.parse is None


def _switch(one: Setting) -> str:
    """A switch that is on by default is turned off by --no-NAME, or what it declares."""
    name = flag(one)[2:]
    off = one.declaration.off or f"no-{name}"
    return f"--{name}/--{off}" if one.default else f"--{name}"


_CLICK: dict[Any, Any] = {int: int, float: float, str: str}


def _options(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _plain_kind(one: Setting) -> Any:
    """bool, int, float or str: what click reads; a setting with a `parse` is read as text."""
    if one.declaration.parse is not None:
        return str
    options = [option for option in _options(one.kind) if option is not types.NoneType]
    kinds = {get_args(o)[0] if get_origin(o) is tuple else o for o in options}
    kind = kinds.pop()
    return str if kinds or get_origin(kind) is Literal else kind


def _is_list(one: Setting) -> bool:
    if one.declaration.parse is not None:
        return False
    return any(get_origin(option) is tuple for option in _options(one.kind))


def _sentence(one: Setting, flags: Mapping[str, str]) -> str:
    """The help of a setting as a sentence; that it can be given again, where it can."""
    text = spell(one.declaration.help, lambda name: flags[name])
    first = text[:1] if text.startswith(("auto", "lm-")) else text[:1].upper()
    text = first + text[1:]
    again = "; again for several" if one.declaration.many or _is_list(one) else ""
    return text.removesuffix(".") + again + "."


class GroupedCommand(click.Command):
    """A command whose options stand under headings, and which takes one value for each of them,
    but for those that can be given several times.

    branches: the names and summaries of the commands that begin with its own name, for its help.
    """

    def __init__(self, *args: Any, branches: Mapping[str, str] | None = None, **more: Any) -> None:
        super().__init__(*args, **more)
        self.branches = branches or {}

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        _, _, order = self.make_parser(context).parse_args(list(args))
        for one in order:
            if isinstance(one, click.Option) and not one.multiple and order.count(one) > 1:
                context.fail(
                    f"{one.opts[0]} is given {order.count(one)} times; it takes one value."
                )
        return super().parse_args(context, args)

    def format_options(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(context):
            line = (
                parameter.get_help_record(context) if isinstance(parameter, click.Option) else None
            )
            if line is not None:
                groups.setdefault(getattr(parameter, "group", "Output"), []).append(line)
        # what people need first has no heading of its own; what every verb has comes last
        for name in sorted(groups, key=lambda name: (name != "", name == "Output")):
            with formatter.section(name or "Options"):
                formatter.write_dl(groups[name])
        if self.branches:
            with formatter.section("Commands"):
                formatter.write_dl(list(self.branches.items()))
