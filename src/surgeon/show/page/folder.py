"""What lies in a run folder: results as JSON documents, each of the kind that it names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any, NoReturn

from ...errors import BadInput
from ...result import Result, attached_files
from ...studies.registry import RESULTS, result_class
from ..pictures import place_of


@dataclass(frozen=True)
class Filed:
    """A result and the name of the file that holds it."""

    result: Result
    file: str


def read_folder(folder: Path) -> list[Filed]:
    """The results in the folder, by kind, then by file; JSON that is no result is passed over.

    Raises: BadInput if there is none, or for a damaged file.
    """
    if not folder.is_dir():
        raise BadInput(
            f"there is no folder {folder}; give the run folder that `surgeon demo -o DIR` or"
            " `surgeon run RECIPE -o DIR` wrote."
        )
    read = [_read(path) for path in sorted(folder.glob("*.json"))]
    filed = [one for one in read if one is not None]
    if not filed:
        raise BadInput(
            f"{folder} holds no result that a report could show; write one there, as `surgeon demo"
            f" -o {folder}` does, or `surgeon find MODEL --folder {folder}`."
        )
    return sorted(filed, key=lambda one: place_of(one.result.kind))


def _read(path: Path) -> Filed | None:
    try:
        document = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(
            f"{shown(str(path))} is damaged or is not JSON as Surgeon writes it"
            f" ({_first_line(error)}); write it again."
        ) from error
    kind = document.get("kind") if isinstance(document, dict) else None
    if not isinstance(kind, str) or kind not in RESULTS:
        return None
    try:
        result = result_class(kind).from_json(visible(document))
    except BadInput as error:
        raise BadInput(f"{shown(path.name)} cannot be shown: {error} Write it again.") from error
    return Filed(_with_columns(result, path.parent), path.name)


def _with_columns(result: Result, folder: Path) -> Result:
    """The result with the tables that lie beside it as Parquet; without, where pyarrow is not."""
    tables: dict[str, Any] = {
        name: _columns(folder / file)
        for name, file in attached_files(type(result)).items()
        if file.endswith(".parquet") and (folder / file).is_file()
    }
    return replace(result, **{name: table for name, table in tables.items() if table is not None})


def _columns(path: Path) -> Mapping[str, Any] | None:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        return None
    try:
        columns: dict[str, list[Any]] = pyarrow.parquet.read_table(path).to_pydict()
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise BadInput(
            f"{shown(str(path))} is damaged or is not as Surgeon writes it"
            f" ({_first_line(error)}); write it again."
        ) from error
    numbers = [v for column in columns.values() for v in column if isinstance(v, float)]
    if not all(map(isfinite, numbers)):
        raise BadInput(f"{shown(str(path))} holds a number that is not finite; write it again.")
    return visible(columns)  # type: ignore[no-any-return]


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"it holds {constant}")


def visible(value: Any) -> Any:
    """The document with every text as it may be shown: what has no glyph (control characters,
    reversals of the reading direction, halves of surrogates) is written out as an escape."""
    if isinstance(value, str):
        return shown(value)
    if isinstance(value, list):
        return [visible(v) for v in value]
    if isinstance(value, dict):
        return {shown(k): visible(v) for k, v in value.items()}
    return value


def shown(text: str) -> str:
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
