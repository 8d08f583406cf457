"""One declaration of a setting: a click option, a YAML key, a column of a sweep, an argument.

How this works. The settings of an operation are a frozen dataclass; each of its fields is made by
`setting(default, help, ...)`, and a field that holds the settings of another operation by
`nested(Config)`. `settings_of` walks such a class and gives one flat list, which every face reads:
the command line makes options of it, a sweep its columns, the documentation its tables.
`configured` goes the other way: from names and values, as a caller gives them, to the dataclass. It
is the only place that checks them, and it speaks of a setting as ‹name›, which each face spells in
its own way (`--name`, a key, an argument; see errors.py). Rules between several settings stand in
the dataclass's own `__post_init__`.
"""

from __future__ import annotations

import difflib
import functools
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass, replace
from math import isfinite
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec

from .errors import BadInput

_KEY = "setting"
_PREFIX, _WITHOUT = "prefix", "without"


@dataclass(frozen=True)
class Declaration:
    """What is known of a setting besides its name, type and default.

    choices: the values it can have. low, high: its range, both included; above, below: the same,
    neither included. metavar: a word for its value in the help. group: the heading it stands under
    in the help; "" for the handful that people need first. short: a one-letter option. spelled: its
    name on the command line, where that is not its own. parse: makes a value of a text. is_file: it
    names a file, or several.
    many: it can be given several times on the command line, whatever its type. preset: where this
    setting is true, the values of others by name, for those that are not given. off: the option
    that turns it off on the command line, where that is not --no-NAME.
    """

    help: str
    choices: tuple[str, ...] = ()
    low: float | int | None = None
    high: float | int | None = None
    above: float | int | None = None
    below: float | int | None = None
    metavar: str | None = None
    group: str = ""
    short: str | None = None
    spelled: str | None = None
    parse: Callable[[str], Any] | None = None
    is_file: bool = False
    many: bool = False
    preset: Mapping[str, Any] = field(default_factory=dict)
    off: str | None = None


def setting(
    default: Any = MISSING,
    help: str = "",
    *,
    choices: Iterable[str] = (),
    low: float | int | None = None,
    high: float | int | None = None,
    above: float | int | None = None,
    below: float | int | None = None,
    metavar: str | None = None,
    group: str = "",
    short: str | None = None,
    spelled: str | None = None,
    parse: Callable[[str], Any] | None = None,
    is_file: bool = False,
    many: bool = False,
    preset: Mapping[str, Any] | None = None,
    off: str | None = None,
) -> Any:
    """A field of a settings dataclass; without `default` the caller must give it.

    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True)
    ... class Training:
    ...     steps: int = setting(400, "most training steps", low=0)
    >>> configured(Training, {"steps": 10})
    Training(steps=10)
    """
    declaration = Declaration(
        help,
        tuple(choices),
        low,
        high,
        above,
        below,
        metavar,
        group,
        short,
        spelled,
        parse,
        is_file,
        many,
        preset or {},
        off,
    )
    return field(default=default, metadata={_KEY: declaration})


def nested(config: Callable[[], Any], prefix: str = "", without: Iterable[str] = ()) -> Any:
    """A field that holds the settings of another operation: `config` makes them at their defaults.

    prefix: what the names of its settings begin with among all of them, so that none meets another.
    without: those of its settings that are not offered; they keep what `config` gives them.
    """
    return field(default_factory=config, metadata={_PREFIX: prefix, _WITHOUT: tuple(without)})


@dataclass(frozen=True)
class Setting:
    """One setting of an operation, as the faces see it.

    path: the names of the fields that lead to it. default: MISSING where one must be given.
    """

    name: str
    path: tuple[str, ...]
    kind: Any
    default: Any
    declaration: Declaration

    @property
    def required(self) -> bool:
        return self.default is MISSING


def settings_of(config: type | Any) -> list[Setting]:
    """Every setting of a settings class, or of an instance, whose values are then the defaults.

    Those of nested classes follow in their place. Raises: TypeError if two have one name.
    """
    declared = list(_walk(config, (), ""))
    names = [one.name for one in declared]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise TypeError(f"{config} has two settings called {', '.join(twice)}")
    return declared


def configured(config: Any, given: Mapping[str, Any], kind: str = "") -> Any:
    """The settings at their defaults, but for what is `given` by name.

    config: a settings class, or an instance whose values are the defaults. kind: what these are
    settings of, for the message. Raises: BadInput, naming the setting as ‹name›, if one is unknown,
    missing, of the wrong type or out of range.
    """
    known = {one.name: one for one in settings_of(config)}
    given = _with_presets(known, given)
    unknown = next((name for name in given if name not in known), None)
    if unknown is not None:
        of = f" of {kind}" if kind else ""
        raise BadInput(f"{unknown} is no setting{of}{nearest(unknown, known)}")
    values = {name: checked(known[name], value) for name, value in given.items()}
    missing = [name for name, one in known.items() if one.required and name not in values]
    if missing:
        of = f"{kind} needs" if kind else "there is no"
        raise BadInput(f"{of} {' and '.join(f'‹{name}›' for name in missing)}.")
    return _filled(config, {known[name].path: value for name, value in values.items()})


def _with_presets(known: Mapping[str, Setting], given: Mapping[str, Any]) -> Mapping[str, Any]:
    preset: dict[str, Any] = {}
    # what is given by name goes before what a preset says
    for name, value in given.items():
        if value and name in known:
            preset |= known[name].declaration.preset
    return {**preset, **given}


def check_values(config: Any) -> None:
    """Check each value of settings made by hand, as `configured` does. Raises: BadInput."""
    for one in settings_of(config):
        checked(one, one.default)


def checked(one: Setting, value: Any) -> Any:
    """The value as the setting's type has it. Raises: BadInput, naming the setting as ‹name›."""
    declared = one.declaration
    if isinstance(value, str) and declared.parse is not None:
        value = declared.parse(value)
    value = _typed(one.name, value, one.kind)
    for part in value if isinstance(value, tuple) else (value,):
        _check_range(one, part)
    return value


def _check_range(one: Setting, value: Any) -> None:
    declared = one.declaration
    if value is None:
        return
    if declared.choices and value not in declared.choices:
        raise BadInput(f"‹{one.name}› {value} is not known; use {', '.join(declared.choices)}.")
    if not isinstance(value, int | float) or isinstance(value, bool):  # a bool is an int, too
        return
    if not isfinite(value):
        raise BadInput(f"‹{one.name}› is {value}; it must be a finite number.")
    if declared.low is not None and not value >= declared.low:
        raise BadInput(f"‹{one.name}› is {value:g}; it must be at least {declared.low:g}.")
    if declared.high is not None and not value <= declared.high:
        raise BadInput(f"‹{one.name}› is {value:g}; it must be at most {declared.high:g}.")
    if declared.above is not None and not value > declared.above:
        raise BadInput(f"‹{one.name}› is {value:g}; it must be above {declared.above:g}.")
    if declared.below is not None and not value < declared.below:
        raise BadInput(f"‹{one.name}› is {value:g}; it must be below {declared.below:g}.")


def values_of(config: Any) -> dict[str, Any]:
    """The values of all settings by name, as JSON has them; what names weights as text."""
    return {one.name: _plain(one.default) for one in settings_of(config)}


def nearest(name: Any, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: what it may be instead."""
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=1)
    guess = f"did you mean {near[0]}? It" if near else "it"
    return f"; {guess} can be {', '.join(names)}."


# -- walking and filling --------------------------------------------------------------------------


def _walk(config: type | Any, path: tuple[str, ...], prefix: str) -> Iterator[Setting]:
    owner = config if isinstance(config, type) else type(config)
    hints = _hints(owner)
    for one in fields(owner):
        default = _default(config, one)
        here = (*path, one.name)
        if _PREFIX in one.metadata:
            inner = one.metadata[_PREFIX]
            inside = _walk(default, here, f"{prefix}{inner}_" if inner else prefix)
            yield from (each for each in inside if each.name not in one.metadata[_WITHOUT])
        elif _KEY in one.metadata:
            declaration = one.metadata[_KEY]
            yield Setting(prefix + one.name, here, hints[one.name], default, declaration)


def _default(config: type | Any, one: Field[Any]) -> Any:
    if not isinstance(config, type):
        return getattr(config, one.name)
    if one.default_factory is not MISSING:
        return one.default_factory()
    return one.default


@functools.cache
def _hints(owner: type) -> dict[str, Any]:
    return get_type_hints(owner)


def _filled(config: Any, values: Mapping[tuple[str, ...], Any]) -> Any:
    """A copy of the settings with the values at their paths."""
    here = {path[0]: value for path, value in values.items() if len(path) == 1}
    deeper: dict[str, dict[tuple[str, ...], Any]] = {}
    for path, value in values.items():
        if len(path) > 1:
            deeper.setdefault(path[0], {})[path[1:]] = value
    owner = config if isinstance(config, type) else type(config)
    for one in fields(owner):
        if one.name in deeper:
            here[one.name] = _filled(_default(config, one), deeper[one.name])
    return config(**here) if isinstance(config, type) else replace(config, **here)


# -- types ----------------------------------------------------------------------------------------

_WORDS: dict[Any, str] = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    types.NoneType: "nothing",
}


def _typed(name: str, value: Any, kind: Any) -> Any:
    """The value as `kind`. Raises: BadInput in the words of `_WORDS`."""
    try:
        return msgspec.convert(value, kind, dec_hook=_of_class)
    except msgspec.ValidationError:
        options = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
        words = " or ".join(dict.fromkeys(_word(option) for option in options))
        raise BadInput(f"‹{name}› is {value!r}; it should be {words}.") from None


def _of_class(kind: type, value: Any) -> Any:
    """A value of a class that msgspec does not know is taken as it is, or not at all."""
    if not isinstance(value, kind):
        raise ValueError
    return value


def _word(option: Any) -> str:
    if get_origin(option) is tuple:
        return "a list"
    if get_origin(option) is Literal:
        return " or ".join(map(str, get_args(option)))
    return _WORDS.get(option, getattr(option, "__name__", str(option)))


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if is_dataclass(value) and type(value).__str__ is object.__str__:
        return values_of(value)
    return str(value)
