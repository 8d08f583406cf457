"""What every verb returns: a result that says what it is, of what, and how it was made.

How this works. A `Result` is a frozen dataclass whose fields are its JSON: `to_json` writes them
under their own names, together with the properties marked `@derived`, and `from_json` reads them
back, so that nothing is lost and no shape is written down twice. Addresses (Site, Entry, Region)
are texts there. A field made by `attached(file)` holds something with a file of its own, like a
patch; it is not part of the JSON. Each class has a `kind`, by which printing, reports and
`from_json` know it, and a `version`, raised when its JSON changes.
"""

from __future__ import annotations

import importlib
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from math import isfinite
from pathlib import Path
from typing import (
    Any,
    ClassVar,
    TypeVar,
    Union,
    dataclass_transform,
    get_args,
    get_origin,
    get_type_hints,
)

import msgspec

from .errors import BadInput, MissingExtra, SurgeonError

R = TypeVar("R", bound="Result")
T = TypeVar("T")
_ATTACHED = "attached"
MOST_SHOWN = 6  # items of a sequence in a repr
LONGEST_TEXT, WIDTH = 80, 100  # characters of a text and of a line there


class derived(property):
    """A property that stands in the JSON, too; it is computed, so `from_json` does not read it."""


def attached(file: str) -> Any:
    """A field of a result that is kept in a file of its own beside the JSON."""
    return field(default=None, repr=False, compare=False, metadata={_ATTACHED: file})


@dataclass_transform(frozen_default=True, field_specifiers=(field, attached))
def record(cls: type[T]) -> type[T]:
    """A frozen dataclass that is part of a result; its repr is one short line."""
    frozen: type[T] = dataclass(frozen=True, repr=False)(cls)
    frozen.__repr__ = lambda self: _brief(self)  # type: ignore[method-assign,assign]
    return frozen


@dataclass_transform(frozen_default=True, field_specifiers=(field, attached))
def result(kind: str, version: int = 1) -> Callable[[type[T]], type[T]]:
    """A class of results as a frozen dataclass; its repr is one screen.

    >>> @result("example")
    ... class Example(Result):
    ...     nats: float
    >>> Example(0.25).to_json()["nats"]
    0.25
    """

    def decorate(cls: type[T]) -> type[T]:
        cls.kind, cls.version = kind, version  # type: ignore[attr-defined]
        return dataclass(frozen=True, repr=False)(cls)

    return decorate


@record
class CorpusRecord:
    """Which text was measured on: its name, the tokens that were predicted, BOS or not, its cut."""

    name: str
    tokens: int
    bos: bool
    windows: int
    window: int


@record
class Provenance:
    """Of what a result is, and how it was made.

    fingerprint: SHA-256 of the model's configuration and weights. surgeon: the version of this
    package. command: the command line, or the call, that makes it again.
    """

    model: str = ""
    fingerprint: str | None = None
    corpus: CorpusRecord | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    surgeon: str = ""
    command: str | None = None


@dataclass(frozen=True, repr=False)
class Result:
    """The base of what every verb returns.

    `kind` names the shape, `version` counts its changes; both stand in the JSON.
    """

    kind: ClassVar[str] = ""
    version: ClassVar[int] = 1

    provenance: Provenance = field(default_factory=Provenance, kw_only=True, repr=False)

    def to_json(self) -> dict[str, Any]:
        """The result as JSON values, the provenance's fields beside its own."""
        own = {name: value for name, value in _items(self) if name != "provenance"}
        head = {"kind": self.kind, "version": self.version}
        return {**head, **_object(self.provenance), **{n: _json(n, v) for n, v in own.items()}}

    @classmethod
    def from_json(cls: type[R], document: Mapping[str, Any]) -> R:
        """The result that `to_json` wrote, without what has files of its own.

        Raises: BadInput if the document is of another kind or version, or lacks what it must hold.
        """
        if (document.get("kind"), document.get("version")) != (cls.kind, cls.version):
            raise BadInput(
                f"this is no result of the kind {cls.kind}, version {cls.version}, but"
                f" {document.get('kind')!r}, version {document.get('version')!r}."
            )
        about = {name: document[name] for name in fields_of(Provenance) if name in document}
        result: R = _read_object(cls, {**document, "provenance": about}, cls.kind)
        return result

    def attachments(self) -> dict[str, Any]:
        """What is kept in files of their own, by file name, also by results within this one.

        Only what is there.
        """
        by_file: dict[str, Any] = {}
        for one in fields(self):
            value, file = getattr(self, one.name), one.metadata.get(_ATTACHED)
            if isinstance(value, Result):
                by_file |= value.attachments()
            elif file and value is not None:
                by_file[file] = value
        return by_file

    def rows(self) -> Sequence[Mapping[str, Any]]:
        """The result as a table, where it is one. Raises: BadInput where it is none."""
        raise BadInput(f"a result of the kind {self.kind} is no table.")

    def to_frame(self) -> Any:
        """The rows as a pandas DataFrame. Raises: BadInput if it is no table; MissingExtra."""
        rows = [{name: _json(name, v) for name, v in row.items()} for row in self.rows()]
        try:
            import pandas
        except ImportError as error:
            raise MissingExtra("a data frame", "report") from error
        return pandas.DataFrame(rows)

    @property
    def warning(self) -> str | None:
        """A sentence for stderr beside the result, where there is one."""
        return None

    def made(self: R, **provenance: Any) -> R:
        """A copy with these parts of its provenance."""
        return replace(self, provenance=replace(self.provenance, **provenance))

    def __repr__(self) -> str:
        return "\n".join(_lines(self))

    def _repr_html_(self) -> str:
        """For a notebook: the pictures that the report has of this result."""
        # by its name: results stand below what shows them, and need it in a notebook only
        html: str = importlib.import_module("surgeon.show.notebook").html(self)
        return html


def attached_files(kind: type) -> dict[str, str]:
    """The fields of a class of results that have files of their own, with the files' names."""
    return {one.name: one.metadata[_ATTACHED] for one in fields(kind) if _ATTACHED in one.metadata}


def fields_of(kind: type) -> tuple[str, ...]:
    return tuple(one.name for one in fields(kind))


def as_json(value: Any) -> Any:
    """A record, or lists and mappings of records, as JSON values."""
    return _json(type(value).__name__, value)


def of_json(kind: Any, value: Any, where: str) -> Any:
    """What `as_json` made of a value of this kind.

    Raises: BadInput saying `where` it does not fit.
    """
    return _read(kind, value, where)


# -- to JSON --------------------------------------------------------------------------------------


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    """Fields and derived properties of a dataclass by name; nothing that has a file of its own."""
    for one in fields(value):
        if _ATTACHED not in one.metadata:
            yield one.name, getattr(value, one.name)
    for name in _derived(type(value)):
        yield name, getattr(value, name)


def _derived(kind: type) -> list[str]:
    names = [
        n for base in reversed(kind.__mro__) for n, v in vars(base).items() if type(v) is derived
    ]
    return list(dict.fromkeys(names))


def _object(value: Any) -> dict[str, Any]:
    return {name: _json(name, item) for name, item in _items(value)}


def _json(name: str, value: Any) -> Any:
    """Raises: SurgeonError for a number that JSON has no room for."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if not isfinite(value):
            raise SurgeonError(
                f"{name} is {value} on this text: the model's predictions are not finite; try"
                " float32, or look at its patches."
            )
        return value
    if isinstance(value, Mapping):
        return {str(key): _json(f"{name}.{key}", item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json(name, item) for item in value]
    if hasattr(type(value), "parse") or isinstance(value, Path):
        return str(value)
    if isinstance(value, Result):
        return value.to_json()
    if is_dataclass(value) and not isinstance(value, type):
        return _object(value)
    raise TypeError(f"{name} holds {type(value).__name__}, which has no place in a result")


# -- from JSON ------------------------------------------------------------------------------------


def _read(kind: Any, value: Any, where: str) -> Any:
    """A JSON value as `kind`. Raises: BadInput saying where it does not fit."""
    origin, options = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _read_union(options, value, where)
    if origin in (list, Sequence) or (origin is tuple and options[1:] == (...,)):
        items = [_read(options[0], item, where) for item in _expect(list, value, where)]
        return tuple(items) if origin is tuple else items
    if origin is tuple:
        items = _expect(list, value, where)
        if len(items) != len(options):
            raise BadInput(f"{where} is damaged: it holds {len(items)} of {len(options)} values.")
        return tuple(_read(o, item, where) for o, item in zip(options, items, strict=True))
    if origin in (dict, Mapping):
        items_of = _expect(dict, value, where).items()
        keys = options[0].parse if hasattr(options[0], "parse") else str
        return {keys(key): _read(options[1], item, f"{where}.{key}") for key, item in items_of}
    if hasattr(kind, "parse"):
        return kind.parse(_expect(str, value, where))
    if isinstance(kind, type) and issubclass(kind, Result):
        return kind.from_json(_expect(dict, value, where))
    if is_dataclass(kind):
        return _read_object(kind, _expect(dict, value, where), where)
    return value if kind is Any else _expect(kind, value, where)


def _read_union(options: tuple[Any, ...], value: Any, where: str) -> Any:
    """The first option that fits; `None` first, since most unions are with it."""
    if value is None and types.NoneType in options:
        return None
    wrong: BadInput | None = None
    for option in options:
        try:
            return _read(option, value, where)
        except BadInput as error:
            wrong = error
    raise wrong or BadInput(f"{where} is {value!r}.")


def _read_object(kind: Any, document: dict[str, Any], where: str) -> Any:
    hints = get_type_hints(kind)
    given = {}
    for one in fields(kind):
        if one.name in document and _ATTACHED not in one.metadata:
            given[one.name] = _read(hints[one.name], document[one.name], f"{where}.{one.name}")
        elif one.default is MISSING and one.default_factory is MISSING:
            raise BadInput(f"{where} lacks {one.name}; it was not written by this version.")
    return kind(**given)


def _expect(kind: Any, value: Any, where: str) -> Any:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise BadInput(f"{where} is damaged: {error}.") from error


# -- one screen -----------------------------------------------------------------------------------


def _lines(result: Result) -> list[str]:
    about = result.provenance
    head = f"{type(result).__name__}({about.model})" if about.model else type(result).__name__
    own = [(name, value) for name, value in _items(result) if name != "provenance"]
    width = max((len(name) for name, _ in own), default=0)
    lines = [head, *(f"  {name:<{width}}  {_brief(value)}" for name, value in own)]
    return [_cut(line, WIDTH) for line in lines]


def _brief(value: Any, depth: int = 0) -> str:
    """A value in one short line: long sequences by their length, deep ones by their first items."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        if depth or len(value) > MOST_SHOWN:
            return f"{{{len(value)} items}}"
        inside = ", ".join(f"{key}: {_brief(item, depth + 1)}" for key, item in value.items())
        return f"{{{inside}}}"
    if isinstance(value, list | tuple):
        if depth > 1 or any(
            is_dataclass(item) and not hasattr(type(item), "parse") for item in value
        ):
            return f"[{len(value)} {type(value[0]).__name__}]" if value else "[]"
        shown = ", ".join(_brief(item, depth + 1) for item in value[:MOST_SHOWN])
        return f"[{shown}{f', … of {len(value)}' if len(value) > MOST_SHOWN else ''}]"
    if is_dataclass(value) and not hasattr(type(value), "parse"):
        own = [(n, v) for n, v in _items(value) if n != "provenance"]
        inside = ", ".join(f"{n}={_brief(v, depth + 1)}" for n, v in own[:MOST_SHOWN])
        return f"{type(value).__name__}({inside})" if not depth else f"{type(value).__name__}(…)"
    text = str(value) if hasattr(type(value), "parse") else repr(value)
    return _cut(text, LONGEST_TEXT)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"
