"""Results into AnnData: per gene in `var`, per cell in `obs`, the whole document in `uns`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BadInput

NAMES = "surgeon_"
NOTE = "hypotheses about the model, not biomarkers"


def write_back(
    adata: Any,
    path: str | Path,
    per_gene: Mapping[str, Mapping[str, float]],
    per_cell: Mapping[str, Mapping[str, float]],
    document: Mapping[str, Any],
) -> None:
    """Write a copy of `adata` with new columns `surgeon_<name>` to `path`, under a temporary name
    first.

    per_gene, per_cell: name of the column -> name of the gene or cell -> value; all others are NaN.
    `uns["surgeon"]` holds the document as JSON text and what the numbers are. `adata` is left as it
    was.
    Raises: BadInput if no gene or no cell is in the data, or the file cannot be written.
    """
    path = Path(path)
    columns = [("var", adata.var_names, per_gene), ("obs", adata.obs_names, per_cell)]
    made: dict[str, dict[str, Any]] = {"var": {}, "obs": {}}
    for axis, names, values in columns:
        for column, by_name in values.items():
            column_values = np.array(
                [by_name.get(str(name), np.nan) for name in names], dtype=np.float64
            )
            if not np.isfinite(column_values).any():
                raise BadInput(
                    f"none of the results for {axis} names is in the data; write into the data that"
                    " was screened."
                )
            made[axis][NAMES + column] = column_values
    copy = adata.copy()
    for axis, new in made.items():
        frame = getattr(copy, axis)
        for column, column_values in new.items():
            frame[column] = column_values
    copy.uns["surgeon"] = {"note": NOTE, "document": json.dumps(document, sort_keys=True)}
    part = path.with_name(f".{path.name}.{os.getpid()}.part.h5ad")
    try:
        copy.write_h5ad(part)
        os.replace(part, path)
    except OSError as error:
        raise BadInput(
            f"{path} cannot be written ({error.strerror or error}); choose another place."
        ) from error
    finally:
        part.unlink(missing_ok=True)
