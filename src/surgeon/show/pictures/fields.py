"""Sections for a result that has no pictures of its own: its fields as they are."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ...result import Provenance, Result, fields_of
from .picture import Cell, Headline, Picture, Table, many, model_name

MOST_ROWS = 200
_ABOUT = {"kind", "version", *fields_of(Provenance)}  # what the page shows in other places


def field_pictures(result: Result) -> Iterator[Picture]:
    """One section with the fields that are values, and one for each field that is a table."""
    own = {name: value for name, value in result.to_json().items() if name not in _ABOUT}
    tables = {name: value for name, value in own.items() if _is_table(value)}
    values = [(_spaced(name), _cell(value)) for name, value in own.items() if name not in tables]
    about = " ".join((inspect.getdoc(type(result)) or "").split())
    kind = result.kind.capitalize()
    if values:
        sentence = field_headline(result).sentence
        yield Picture(kind, sentence, about, shown=Table(("field", "value"), values))
    for name, rows in tables.items():
        headline = f"{_spaced(name).capitalize()}: {many(len(rows), 'row')}"
        yield Picture(kind, headline, "" if values else about, shown=_table(rows))


def field_headline(result: Result) -> Headline:
    """What it is, and of which model."""
    kind, model = result.kind.capitalize(), result.provenance.model
    return Headline(f"{kind} of {model_name(model)}" if model else kind)


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, dict) for v in value)


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[_cell(row.get(name)) for name in names] for row in rows[:MOST_ROWS]]
    return Table([_spaced(name) for name in names], cells, of=len(rows))


def _cell(value: Any) -> Cell:
    if value is None or isinstance(value, bool):
        return {None: None, True: "yes", False: "no"}[value]
    if isinstance(value, list) and all(isinstance(v, str) for v in value):
        return ", ".join(value)
    return value if isinstance(value, str | int | float) else json.dumps(value)


def _spaced(name: str) -> str:
    return name.replace("_", " ")
