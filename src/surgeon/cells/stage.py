"""What a screen or a map works on: a checkpoint, cells tokenised once, the draws of masks, the
baseline, and columns of `obs`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import BadInput
from ..result import record
from ..settings import check_values, setting
from .checkpoint import LoadedCells, LoadReport, load_cells
from .data import DATA_HELP, Expression, expression, read_cells
from .likelihood import RATIO, Marginal, Masks, Values, fit_marginal, masks
from .model import ScGPT
from .tokenise import Batch, tokenise

TYPE_COLUMNS = (
    "cell_type",
    "celltype",
    "CellType",
    "cell_types",
    "bulk_labels",
    "leiden",
    "louvain",
)
EMBEDDINGS = {"X_umap": "UMAP", "X_tsne": "t-SNE", "X_pca": "PCA"}
NOTE = (
    "Hypotheses about the model, not biomarkers: what a model loses without a weight says how the"
    " model computes, not what cells do."
)


@dataclass(frozen=True)
class StageConfig:
    """The model and the data; how many cells, genes and masks a measurement takes."""

    folder: str = setting(help="the folder of the model", metavar="FOLDER")
    data: str = setting(help=DATA_HELP, metavar="DATA")
    cells: int = setting(
        128, "most cells to measure on; of those held out of training, where that is known", low=1
    )
    genes: int = setting(256, "most genes of a cell, a random choice where it has more", low=2)
    draws: int = setting(3, "draws of masks over the same tokenised cells", low=1)
    ratio: float = setting(RATIO, "share of the values that a draw hides", low=0.001, high=0.999)
    source: str = setting(
        "auto", "expression: auto (as trained on), X, raw or layer:NAME", metavar="NAME"
    )
    type: str | None = setting(
        None, "column of obs with the cell type, or a usual one", metavar="COL"
    )
    write_h5ad: str | None = setting(
        None, "write a copy of DATA with the damage per gene and cell", metavar="F"
    )

    def __post_init__(self) -> None:
        check_values(self)


@record
class StageRecord:
    """What was measured on.

    load: where each tensor of the checkpoint went. reading: whether its head is categorical, which
    gives a likelihood, or a regression. source: which expression of the data; held_out: whether the
    cells are known not to have been trained on.
    """

    load: LoadReport
    reading: str
    data: str
    source: str
    held_out: bool
    type_column: str | None


@record
class Point:
    """A cell on an embedding, and its damage."""

    x: float
    y: float
    nats: float


@record
class Embedding:
    """The cells on an embedding of the data's own, by the embedding's name."""

    name: str
    points: list[Point]


@dataclass(frozen=True, eq=False)
class Stage:
    """Everything measured on is here once, so that intact and broken models see the same.

    baseline: NLL of the same hidden values by the gene-marginal baseline. types: the cell type of
    each cell.
    """

    model: ScGPT
    batch: Batch
    masked: Masks
    baseline: Values
    types: list[str] | None
    adata: Any
    record: StageRecord
    fingerprint: str

    def of(self, cells: Tensor) -> Stage:
        """Some of the cells, by number."""
        return replace(
            self,
            batch=self.batch.of(cells),
            masked=self.masked[:, cells],
            baseline=self.baseline[:, cells],
            types=None if self.types is None else [self.types[i] for i in cells.tolist()],
        )

    def column(self, name: str) -> list[str]:
        """A column of `obs` for the measured cells, as text. Raises: as the function."""
        return column(self.adata, name, self.batch.cell_names)

    def embedding(self, per_cell: dict[str, float]) -> Embedding | None:
        """The cells on the first embedding that the data have. None if they have none."""
        key = next((key for key in EMBEDDINGS if key in self.adata.obsm), None)
        if key is None:
            return None
        places = self.adata.obsm[key][self.adata.obs_names.get_indexer(list(per_cell)), :2]
        points = [
            Point(float(x), float(y), nats)
            for (x, y), nats in zip(places, per_cell.values(), strict=True)
        ]
        return Embedding(EMBEDDINGS[key], points)


def open_stage(config: StageConfig, seed: int = 0) -> Stage:
    """Load a model and the cells to measure it on.

    Cells are those the model was not trained on, where its training.json tells; their number is cut
    at random. The baseline is the one trained beside the model, or else fitted on the cells that
    are left.
    Raises: BadInput, BadCheckpoint as `load_cells`, `read_cells`, `expression` and `tokenise`;
    BadInput for a column that is not there, or no place for ‹write_h5ad›.
    """
    if config.write_h5ad is not None and not Path(config.write_h5ad).parent.is_dir():
        raise BadInput(
            f"there is no folder to write {config.write_h5ad} into; make it, or choose another"
            " place."
        )
    loaded, adata = load_cells(config.folder), read_cells(config.data)
    trained_on = loaded.training.get("source", "auto")
    values = expression(adata, trained_on if config.source == "auto" else config.source)
    known = [name for name in TYPE_COLUMNS if name in adata.obs]
    type_column = config.type or (known[0] if known else None)
    chosen, rest, held_out = _choose(values, loaded, config.cells, seed)
    tokens = replace(loaded.tokens, max_length=min(loaded.tokens.max_length, config.genes + 1))
    batch = tokenise(values.of(chosen), loaded.vocab, tokens, seed)
    masked = masks(batch, config.ratio, config.draws, seed)
    marginal = loaded.marginal or _marginal(values, rest, loaded, seed)
    reading = loaded.model.reading
    baseline = marginal.nll(batch, masked, reading)
    types = None if type_column is None else column(adata, type_column, batch.cell_names)
    about = (Path(config.data).name, values.source, held_out, type_column)
    record = StageRecord(loaded.report, reading, *about)
    return Stage(loaded.model, batch, masked, baseline, types, adata, record, loaded.fingerprint)


def column(adata: Any, name: str, cells: Sequence[str]) -> list[str]:
    """A column of `obs` for these cells, as text.

    Raises: BadInput if it is not there, or has no value for one of the cells.
    """
    if name not in adata.obs:
        columns = ", ".join(map(str, adata.obs.columns)) or "none"
        raise BadInput(f"obs has no column {name!r}; it has {columns}.")
    values = adata.obs[name].loc[list(cells)]
    if values.isna().any():
        raise BadInput(
            f"the column {name!r} has no value for {int(values.isna().sum())} of the {len(cells)}"
            " cells; fill it in."
        )
    return [str(v) for v in values]


def _choose(
    values: Expression, loaded: LoadedCells, most: int, seed: int
) -> tuple[list[int], list[int], bool]:
    """Cells to measure on and the other usable ones, by number; and whether the first are known not
    to have been trained on.
    """
    known = [i for i, gene in enumerate(values.gene_names) if gene in loaded.vocab]
    usable = (values.matrix[:, known].getnnz(axis=1) > 1).nonzero()[0].tolist()
    split = {part: set(names) for part, names in loaded.training.get("split", {}).items()}
    pools = [
        [i for i in usable if values.cell_names[i] in split.get(part, ())]
        for part in ("test", "validation")
    ]
    # data the model was never trained on are held out as a whole
    unknown = not split.get("train", set()) & set(values.cell_names)
    held_out = bool(split) and (bool(pools[0]) or unknown)
    if not pools[0]:
        pools = [usable]
    generator = torch.Generator().manual_seed(seed)
    order = [
        pool[i] for pool in pools for i in torch.randperm(len(pool), generator=generator).tolist()
    ]
    chosen = sorted(order[:most])
    if not chosen:
        raise BadInput(
            "no cell of the data has two detected genes that the model knows; check that both use"
            " the same gene names."
        )
    return chosen, sorted({*usable} - {*chosen}), held_out


def _marginal(values: Expression, rest: list[int], loaded: LoadedCells, seed: int) -> Marginal:
    if len(rest) < 10:
        raise BadInput(
            f"the checkpoint has no gene-marginal baseline, and beside those measured {len(rest)}"
            " cells are left to fit one on; use fewer ‹cells›."
        )
    # the values of a cell do not depend on which of its genes are tokens, so all of them may be
    batch = tokenise(values.of(rest), loaded.vocab, loaded.tokens, seed)
    return fit_marginal(batch, loaded.model.shape.n_tokens, loaded.model.shape.n_bins)
