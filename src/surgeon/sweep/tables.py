"""The results of a sweep as tables, by DuckDB."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import BadInput, MissingExtra, SurgeonError
from .store import Store


@dataclass(frozen=True)
class Answer:
    """A table. missing: tasks of the plan that have no result yet, so are not in it."""

    columns: list[str]
    rows: list[tuple[Any, ...]]
    missing: int


def query(store: Store, sql: str = "SELECT * FROM results") -> Answer:
    """Run SQL on the table `results`: every row of every finished task of the manifest, columns
    that a task lacks NULL.

    It sees a copy in memory, and no file or network. Raises: BadInput for SQL that cannot be run,
    or if there is no result yet.
    """
    connection, missing = _loaded(store)
    with connection:
        return _ask(connection, sql, missing)


def averages(store: Store, by: Sequence[str], show: Sequence[str] = ()) -> Answer:
    """For each combination of the columns `by`: how many rows (n), and of every measured number, or
    of those in `show`, the mean and the standard deviation.

    Of truth values the mean is the share that is true.

    Raises: BadInput for a column that the results do not have.
    """
    settings = {"task", "seed", *(name for task in store.tasks() for name in task.columns())}
    connection, missing = _loaded(store)
    with connection:
        columns = {
            str(name): str(kind)
            for name, kind, *_ in connection.execute("DESCRIBE results").fetchall()
        }
        if unknown := [name for name in (*by, *show) if name not in columns]:
            raise BadInput(
                f"the results have no column {unknown[0]}; they have {', '.join(columns)}."
            )
        numbers = [
            n
            for n, kind in columns.items()
            if kind in ("BIGINT", "DOUBLE", "BOOLEAN") and n not in by
        ]
        if odd := [name for name in show if name not in numbers]:
            raise BadInput(
                f"the column {odd[0]} holds no numbers to average; those that do are"
                f" {', '.join(numbers)}."
            )
        measured = show or [n for n in numbers if n not in settings]
        # DuckDB refuses the deviation of infinite numbers
        mean, deviation = (
            "avg({0}::DOUBLE) AS {0}",
            "stddev_samp({0}::DOUBLE) FILTER (WHERE isfinite({0}::DOUBLE)) AS {1}",
        )
        parts = [part.format(_q(n), _q(n + "_sd")) for n in measured for part in (mean, deviation)]
        keys = ", ".join(map(_q, by))
        answer = _ask(
            connection,
            f"SELECT {', '.join([keys, 'count(*) AS n', *parts])} FROM results GROUP BY {keys}"
            f" ORDER BY {keys}",
            missing,
        )
    kept = [
        i
        for i, _ in enumerate(answer.columns)
        if i < len(by) or any(row[i] is not None for row in answer.rows)
    ]
    return Answer(
        [answer.columns[i] for i in kept],
        [tuple(row[i] for i in kept) for row in answer.rows],
        answer.missing,
    )


def _loaded(store: Store) -> tuple[Any, int]:
    """A database in memory with the table `results`, closed to everything outside."""
    try:
        import duckdb
    except ImportError as error:
        raise MissingExtra("a table of a sweep", "sweep") from error
    tasks = store.tasks()
    files = [str(store.result(t.id)) for t in tasks if store.result(t.id).exists()]
    if not files:
        raise BadInput(f"{store.folder} has no results yet; run the sweep.")
    connection = duckdb.connect(":memory:")
    try:
        connection.execute(
            "CREATE TABLE results AS SELECT * FROM read_parquet(?, union_by_name = true)", [files]
        )
    except duckdb.Error as error:
        raise SurgeonError(
            f"a result in {store.folder} cannot be read ({_line(error)}); delete that file and run"
            " the sweep again."
        ) from error
    # after the reading, which needs it; people's SQL comes next, and could read and write any file
    connection.execute("SET enable_external_access = false")
    connection.execute("SET lock_configuration = true")
    return connection, len(tasks) - len(files)


def _ask(connection: Any, sql: str, missing: int) -> Answer:
    import duckdb

    try:
        cursor = connection.execute(sql)
        if cursor is None or cursor.description is None:  # as of an empty one
            raise BadInput(f"{sql!r} asks for nothing; write a SELECT on the table results.")
        return Answer([d[0] for d in cursor.description], cursor.fetchall(), missing)
    except duckdb.Error as error:
        raise BadInput(f"DuckDB cannot run {sql!r}: {_line(error)}") from error


def _line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def _q(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
