"""`sweep table`: the results of a sweep as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import isfinite
from typing import Any

from ..errors import BadInput
from ..result import Provenance, Result, result
from ..settings import setting
from ..sweep.store import Store
from ..sweep.tables import Answer, averages, query
from ..sweep.task import plain
from .desk import Desk
from .registry import study_named


@dataclass(frozen=True)
class Settings:
    """The results of a sweep in DIR as a table: all of them, or averages, or what a query asks
    for.
    """

    directory: str = setting(help="the folder of the sweep", metavar="DIR")
    sql: str | None = setting(
        None,
        "SQL (DuckDB) on the table results, one row for each row of a task",
        metavar="QUERY",
    )
    by: tuple[str, ...] = setting(
        (), "mean and standard deviation over rows that agree in this", metavar="COLUMN"
    )
    show: tuple[str, ...] = setting(
        (), "with ‹by›: only the averages of this; not given: of all", metavar="COLUMN"
    )

    def __post_init__(self) -> None:
        if (self.sql is not None and self.by) or (self.show and not self.by):
            raise BadInput("give ‹sql› or ‹by›, and ‹show› only with ‹by›.")


@result("sweep table")
class SweepTable(Result):
    """A table of a sweep's results.

    columns: their names in order. table: the rows by column; a number that is not finite is a text.
    missing: tasks of the plan that have no result yet, so are not in it.
    """

    folder: str
    missing: int
    columns: list[str]
    table: list[dict[str, Any]]

    def rows(self) -> list[dict[str, Any]]:
        return self.table

    @property
    def warning(self) -> str | None:
        if not self.missing:
            return None
        return (
            f"{self.missing} tasks of this sweep have no result yet, so they are not in the table."
        )


def swept(
    desk: Desk, verb: str, grid: Mapping[str, Sequence[Any]], settings: Mapping[str, Any]
) -> SweepTable:
    """The verb with every combination of the values in `grid`, on the model at hand.

    All combinations are checked before the first is run. Raises: BadInput for one that cannot be.
    """
    study = study_named(verb)
    choices = [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
    for choice in choices:
        study.configured({**settings, **choice})
    results = []
    for done, choice in enumerate(choices):
        desk.tell(verb, done, len(choices))
        results.append(study.run(desk, {**settings, **choice}))
    if not results:
        raise BadInput("the grid has no combination; give at least one value of each setting.")
    table = [
        {**_row({name: _recorded(result, name) for name in grid}), **_row(row)}
        for result in results
        for row in result.rows()
    ]
    columns = list(dict.fromkeys(name for row in table for name in row))
    return SweepTable("", 0, columns, table, provenance=_about(verb, grid, settings, results))


def _recorded(result: Result, name: str) -> Any:
    """A setting as the result records it; a list of one thing as that."""
    value = result.provenance.settings[name]
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _row(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _plain(plain(value)) for name, value in values.items()}


def _about(
    verb: str,
    grid: Mapping[str, Sequence[Any]],
    settings: Mapping[str, Any],
    results: Sequence[Result],
) -> Provenance:
    """How the table was made; the corpus, where all results have the same."""
    first = results[0].provenance
    fixed = {name: _recorded(results[0], name) for name in settings}
    varied: dict[str, list[Any]] = {name: [] for name in grid}
    for one in results:
        for name, values in varied.items():
            value = _recorded(one, name)
            values += [] if value in values else [value]
    words = [repr(verb), repr(varied), *(f"{name}={value!r}" for name, value in fixed.items())]
    same = all(result.provenance.corpus == first.corpus for result in results)
    return replace(
        first,
        corpus=first.corpus if same else None,
        settings={"verb": verb, "grid": varied, **fixed},
        command=f"lab.sweep({', '.join(words)})",
    )


def run(desk: Desk, settings: Settings) -> SweepTable:
    answer = _ask(Store(settings.directory), settings)
    names = answer.columns
    table = [dict(zip(names, map(_plain, row), strict=True)) for row in answer.rows]
    provenance = desk.provenance(settings)
    return SweepTable(settings.directory, answer.missing, names, table, provenance=provenance)


def _ask(store: Store, settings: Settings) -> Answer:
    if settings.sql is not None:
        return query(store, settings.sql)
    if settings.by:
        return averages(store, settings.by, settings.show)
    return query(store)


def _plain(value: Any) -> Any:
    """A value as JSON has it."""
    if isinstance(value, float) and not isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
