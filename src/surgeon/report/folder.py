"""What lies in a run folder: JSON documents told apart by what they hold, since their names are the
user's; and tokens.parquet.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from ..errors import BadInput

T = TypeVar("T")
# the fields that only this verb writes together
KINDS = {
    "find": {"verdict", "sets", "detection"},
    "verify": {"joint_nats", "single_nats", "controls"},
    "states": {"states", "prompts"},
    "recipe": {"figures", "repair"},
    "repair": {"nll", "kl", "recovered", "patch_bytes"},
    "explain": {"geometry", "influence", "behaviour"},
    "edits": {"edits", "published"},
    "conditioning": {"conditioning", "published"},
    "edit": {"preflight", "scorecard", "target_probability"},
    "trace": {"p_clean", "p_corrupt", "tokens", "subject_range"},
    "average": {"p_clean", "p_corrupt", "places", "facts_with_place"},
    "cells screen": {"verdict", "candidates", "lead_nats"},
    "cells map": {"genes", "enrichment", "difficulty_correlation"},
    "quantize": {"critical", "base", "corpus", "config"},
    "measure": {"nll", "kl_from_base", "generations"},
}
TOKENS = "tokens.parquet"


@dataclass(frozen=True)
class Result:
    """One result of one verb: its kind, its document, the file that holds it, the model it is
    about, and the command that made it, if the document records it."""

    kind: str
    data: dict[str, Any]
    file: str
    model: str
    command: str | None = None


def read_folder(folder: Path) -> list[Result]:
    """The results in the folder, by kind, then by file, then the tokens.

    Raises: BadInput if there is none, or for a damaged file.
    """
    if not folder.is_dir():
        raise BadInput(
            f"there is no folder {folder}; give the run folder that `surgeon demo -o DIR` or"
            " `surgeon run RECIPE -o DIR` wrote."
        )
    found = [result for path in sorted(folder.glob("*.json")) for result in _results(path)]
    if not found:
        raise BadInput(
            f"{folder} holds no result that a report could show; write one there, as `surgeon demo"
            f" -o {folder}` does, or `surgeon find MODEL --folder {folder}`."
        )
    order = list(KINDS)
    return [*sorted(found, key=lambda r: order.index(r.kind)), *_tokens(folder, found)]


def _results(path: Path) -> Iterator[Result]:
    try:
        document = _visible(json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse))
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(
            f"{shown(str(path))} is damaged or is not JSON as Surgeon writes it"
            f" ({_first_line(error)}); write it again."
        ) from error
    if not isinstance(document, dict):
        return
    model = str(document.get("model", "the model"))
    made_by = document.get("command")
    nested = {
        key: document[key] for key in KINDS if isinstance(document.get(key), dict)
    }  # demo.json holds a find, run.json a repair
    for part in (document, *nested.values()):
        for kind, fields in KINDS.items():
            if fields <= part.keys():
                yield Result(
                    kind, part, path.name, model, made_by if isinstance(made_by, str) else None
                )
                break


def _tokens(folder: Path, found: list[Result]) -> Iterator[Result]:
    """KL and NLL of each token by column, beside the explanation they were written with.

    Nothing without pyarrow.
    """
    path = folder / TOKENS
    if not path.is_file():
        return
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        return
    beside = next((r for r in found if r.kind == "explain"), None)
    try:
        names = [name for name in pyarrow.parquet.read_schema(path).names if name.startswith("kl_")]
        columns = {
            name: pyarrow.parquet.read_table(path, columns=[name])[name].to_pylist()
            for name in names
        }
        if not columns.get("kl_broken") or not all(
            isfinite(value) for values in columns.values() for value in values
        ):
            raise ValueError("no finite kl_broken")
    except (OSError, ValueError, TypeError, pyarrow.ArrowException) as error:
        raise BadInput(
            f"{shown(str(path))} is damaged or is not as `surgeon explain --folder` writes it"
            f" ({_first_line(error)}); write it again."
        ) from error
    yield Result(
        "tokens",
        columns,
        TOKENS,
        beside.model if beside else "the model",
        beside.command if beside else None,
    )


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"it holds {constant}")


def _visible(value: Any) -> Any:
    """The document with every text as it may be shown: what has no glyph (control characters,
    reversals of the reading direction, halves of surrogates) is written out as an escape."""
    if isinstance(value, str):
        return shown(value)
    if isinstance(value, list):
        return [_visible(v) for v in value]
    if isinstance(value, dict):
        return {shown(k): _visible(v) for k, v in value.items()}
    return value


def shown(text: str) -> str:
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def reading(result: Result, build: Callable[[Result], T]) -> T:
    """What `build` makes of a result.

    Raises: BadInput naming the file, where the document is not as the verb writes it.
    """
    try:
        return build(result)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
        raise BadInput(
            f"{shown(result.file)} lacks what `surgeon {result.kind}` writes there"
            f" ({type(error).__name__}: {_first_line(error)}); write it again."
        ) from error
