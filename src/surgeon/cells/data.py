"""Expression data from disk, checked to be counts or log-counts; scaled data are refused."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BadInput, MissingExtra

EXAMPLE = "pbmc68k_reduced"  # ships inside scanpy
SOURCES = "auto, X, raw, or layer:NAME"


@dataclass(frozen=True, eq=False)
class Expression:
    """A matrix (cell, gene) without negative values, as scipy's CSR.

    kind: "counts" (whole numbers) or "log-counts" (or normalised).
    """

    matrix: Any
    gene_names: list[str]
    cell_names: list[str]
    source: str
    kind: str

    def of(self, cells: list[int]) -> Expression:
        """Some of the cells, in that order."""
        return Expression(
            self.matrix[cells],
            self.gene_names,
            [self.cell_names[i] for i in cells],
            self.source,
            self.kind,
        )


def read_cells(data: str | Path) -> Any:
    """The AnnData object in an .h5ad file, or scanpy's own `pbmc68k_reduced`.

    Raises: BadInput for a file that is missing, pickled or no h5ad; MissingExtra without
    `weight-surgeon[cells]`.
    """
    try:
        import anndata
        import scanpy
    except ImportError as error:
        raise MissingExtra("expression data", "cells") from error
    with warnings.catch_warnings():
        # the example is an old file; what anndata thinks of its layout is no concern of whoever
        # reads it here
        warnings.filterwarnings("ignore", module="anndata")
        warnings.filterwarnings("ignore", category=FutureWarning)
        if str(data) == EXAMPLE:
            return scanpy.datasets.pbmc68k_reduced()
        path = Path(data)
        if path.suffix.lower() in (".pkl", ".pickle", ".pt", ".pth"):
            raise BadInput(
                f"{path} is a pickle, which can run code when opened, so Surgeon does not; save the"
                " data with AnnData.write_h5ad."
            )
        if not path.is_file():
            raise BadInput(
                f"no data at {path}; give an .h5ad file, or `{EXAMPLE}`, which ships inside scanpy."
            )
        try:
            return anndata.read_h5ad(path)
        except (
            Exception
        ) as error:  # h5py and anndata raise many types here, all of them about this file
            raise BadInput(
                f"{path} cannot be read as h5ad ({str(error).splitlines()[0]}); save it with"
                " AnnData.write_h5ad."
            ) from error


def expression(adata: Any, source: str = "auto") -> Expression:
    """The expression matrix of `adata`.

    source: auto (X, or .raw where X is scaled), X, raw, or layer:NAME.
    Raises: BadInput for a source that is not there, holds negative or non-finite values, or names a
    gene or a cell twice.
    """
    if source == "auto":
        scaled = adata.X is None or _least(adata.X) < 0
        source = "raw" if scaled and adata.raw is not None else "X"
    matrix, genes = _matrix(adata, source)
    cells = [str(n) for n in adata.obs_names]
    for what, names, axis in (("gene", genes, "var"), ("cell", cells, "obs")):
        if len(set(names)) < len(names):
            twice = Counter(names).most_common(1)[0][0]
            raise BadInput(
                f"the {what} {twice} is there twice; make the names unique with"
                f" adata.{axis}_names_make_unique()."
            )
    if min(matrix.shape) == 0:
        raise BadInput(
            f"{source} has shape {matrix.shape} (cells, genes), so there is nothing to read."
        )
    if not np.isfinite(matrix.data).all():
        raise BadInput(
            f"{source} holds values that are not finite; counts or log-counts are needed."
        )
    if _least(matrix) < 0:
        other = (
            "there is a .raw: use --raw"
            if adata.raw is not None and source != "raw"
            else "name one with --layer"
        )
        raise BadInput(
            f"{source} holds negative values, so it is scaled and no counts can be told from it;"
            f" {other}."
        )
    matrix.eliminate_zeros()
    whole = bool((matrix.data == np.round(matrix.data)).all())
    return Expression(matrix, genes, cells, source, "counts" if whole else "log-counts")


def _matrix(adata: Any, source: str) -> tuple[Any, list[str]]:
    from scipy.sparse import csr_matrix

    kind, _, name = source.partition(":")
    if kind == "raw" and adata.raw is None:
        raise BadInput("--raw was asked for, but the data have no .raw; use X or --layer NAME.")
    if kind == "layer" and name not in adata.layers:
        known = ", ".join(adata.layers) or "none"
        raise BadInput(f"the data have no layer {name!r}; there are: {known}.")
    if kind not in ("X", "raw", "layer"):
        raise BadInput(f"{source!r} names no expression; use {SOURCES}.")
    holder = adata.raw if kind == "raw" else adata
    values = adata.layers[name] if kind == "layer" else holder.X
    if values is None:
        raise BadInput("the data have no X; use --raw or --layer NAME.")
    return csr_matrix(values, dtype=np.float32, copy=True), [str(n) for n in holder.var_names]


def _least(values: Any) -> float:
    return float(values.min())
