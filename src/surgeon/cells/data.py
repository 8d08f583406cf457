"""Expression data from disk, checked to be counts or log-counts; scaled data are refused."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .. import files
from ..errors import BadInput
from ..settings import setting
from .extra import needs

EXAMPLE = "pbmc68k_reduced"  # ships inside scanpy
DATA_HELP = f"an .h5ad file of counts or log-counts, or {EXAMPLE}, which ships inside scanpy"


@dataclass(frozen=True)
class DataSettings:
    """Cells to read, and which of their matrices."""

    data: str = setting(help=DATA_HELP, metavar="DATA")
    raw: bool = setting(
        False, "take .raw, where X is scaled; not given: X, or .raw if X has negative values"
    )
    layer: str | None = setting(None, "take this layer", metavar="NAME")

    def __post_init__(self) -> None:
        if self.raw and self.layer is not None:
            raise BadInput("give either ‹raw› or ‹layer›.")

    def read(self) -> Expression:
        """Raises: as `read_cells` and `expression`."""
        source = "raw" if self.raw else "auto" if self.layer is None else f"layer:{self.layer}"
        return expression(read_cells(self.data), source)


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
        names = [self.cell_names[i] for i in cells]
        return replace(self, matrix=self.matrix[cells], cell_names=names)


def read_cells(data: str | Path) -> Any:
    """The AnnData object in an .h5ad file, or scanpy's own `pbmc68k_reduced`.

    Raises: BadInput for a file that is missing, pickled or no h5ad; MissingExtra without
    `weight-surgeon[cells]`.
    """
    anndata, scanpy = needs("expression data", "anndata", "scanpy")
    path = Path(data)
    with warnings.catch_warnings():
        # the example is an old file, and what anndata thinks of its layout concerns nobody here
        warnings.filterwarnings("ignore", module="anndata")
        warnings.filterwarnings("ignore", category=FutureWarning)
        if str(data) == EXAMPLE:
            return scanpy.datasets.pbmc68k_reduced()
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
        # h5py and anndata raise many types here, all of them about this file
        except Exception as error:
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
        scaled = adata.X is None or adata.X.min() < 0
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
        raise BadInput(f"{source} has shape {matrix.shape} (cells, genes); nothing can be read.")
    if not np.isfinite(matrix.data).all():
        raise BadInput(f"{source} holds values that are not finite; give counts or log-counts.")
    if matrix.min() < 0:
        raw = adata.raw is not None and source != "raw"
        raise BadInput(
            f"{source} holds negative values, so it is scaled and no counts can be told from it;"
            f" use {'raw, which is there' if raw else 'a layer of counts'}."
        )
    matrix.eliminate_zeros()
    whole = bool((matrix.data == np.round(matrix.data)).all())
    return Expression(matrix, genes, cells, source, "counts" if whole else "log-counts")


def _matrix(adata: Any, source: str) -> tuple[Any, list[str]]:
    from scipy.sparse import csr_matrix

    kind, _, name = source.partition(":")
    if kind == "raw" and adata.raw is None:
        raise BadInput("raw was asked for, but the data have no .raw; use X or a layer.")
    if kind == "layer" and name not in adata.layers:
        known = ", ".join(adata.layers) or "none"
        raise BadInput(f"the data have no layer {name!r}; there are: {known}.")
    if kind not in ("X", "raw", "layer"):
        raise BadInput(f"{source!r} names no expression; use auto, X, raw, or layer:NAME.")
    holder = adata.raw if kind == "raw" else adata
    values = adata.layers[name] if kind == "layer" else holder.X
    if values is None:
        raise BadInput("the data have no X; use raw or a layer.")
    return csr_matrix(values, dtype=np.float32, copy=True), [str(n) for n in holder.var_names]


def cell_sentences(expression: Expression, genes: int = 100, seed: int = 0) -> list[str]:
    """One line a cell: the names of its `genes` highest expressed genes, parted by spaces.

    This is text for a causal language model of cells, and `surgeon find MODEL --text FILE` then
    works on that as on any other. Ties, of which counts have many, are broken at random.
    Raises: BadInput for names with spaces in them, or if no cell has a detected gene; cells without
    are left out.
    Source: Levine et al. 2024, Cell2Sentence, doi:10.1101/2023.09.11.557287.
    """
    for name in expression.gene_names:
        if not name or name != "".join(name.split()):
            raise BadInput(
                f"the gene name {name!r} has a space in it or is empty, so a sentence cannot be"
                " read back; rename it."
            )
    random = np.random.default_rng(seed)
    lines = []
    for row in expression.matrix:
        # lexsort's last key comes first: expression, then chance
        order = np.lexsort((random.random(len(row.data)), -row.data))[:genes]
        lines.append(" ".join(expression.gene_names[j] for j in row.indices[order]))
    if not any(lines):
        raise BadInput("no cell has a detected gene, so there is nothing to write.")
    return [line for line in lines if line]


def write_back(
    adata: Any,
    path: str | Path,
    per_gene: dict[str, dict[str, float]],
    per_cell: dict[str, dict[str, float]],
    document: dict[str, Any],
) -> None:
    """Write a copy of `adata` to `path`, with results per gene in `var` and per cell in `obs`.

    per_gene, per_cell: column, written as `surgeon_<column>` -> name -> value; all others are NaN.
    `uns["surgeon"]` holds the document as JSON text. `adata` is left as it was.
    Raises: BadInput if no gene or no cell is in the data, or the file cannot be written.
    """
    copy = adata.copy()
    for frame, columns in ((copy.var, per_gene), (copy.obs, per_cell)):
        for column, by_name in columns.items():
            values = np.array([by_name.get(str(name), np.nan) for name in frame.index], np.float64)
            if not np.isfinite(values).any():
                raise BadInput(
                    f"none of the names with a {column} is in the data; write into the data that"
                    " was screened."
                )
            frame[f"surgeon_{column}"] = values
    note = "hypotheses about the model, not biomarkers"
    copy.uns["surgeon"] = {"note": note, "document": json.dumps(document, sort_keys=True)}
    with files.writing(Path(path)) as part:
        copy.write_h5ad(part)
