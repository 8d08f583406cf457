"""What a screen or a map works on: a checkpoint, cells tokenised once, the draws of masks, the
baseline, and columns of `obs`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..errors import BadInput
from ..settings import setting
from .checkpoint import LoadedCells, load_cells
from .data import Expression, expression, read_cells
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


@dataclass(frozen=True)
class StageConfig:
    """How many cells, genes and masks a measurement takes, and what is read from the data."""

    cells: int = setting(
        128, "most cells to measure on; of those held out of training, where that is known"
    )
    genes: int = setting(256, "most genes of a cell, a random choice where it has more")
    draws: int = setting(3, "draws of masks over the same tokenised cells")
    ratio: float = setting(RATIO, "share of the values that a draw hides")
    source: str = setting(
        "auto", "expression: auto (as trained on), X, raw or layer:NAME", metavar="NAME"
    )
    type: str | None = setting(
        None, "column of obs with the cell type, or a usual one", metavar="COL"
    )
    seed: int = setting(0, "seed of the choice of cells, the tokens and the masks")

    def __post_init__(self) -> None:
        if min(self.cells, self.draws) < 1 or self.genes < 2:
            raise BadInput(
                "a measurement needs at least one cell and one draw, and two genes of each cell."
            )


@dataclass(frozen=True, eq=False)
class Stage:
    """Everything measured on is here once, so that intact and broken models see the same.

    about: the model, the data, and whether no cell was trained on, for every document.
    """

    model: ScGPT
    adata: Any
    batch: Batch
    masked: Masks
    baseline: Values
    types: list[str] | None
    about: dict[str, Any]

    def column(self, name: str) -> list[str]:
        """A column of `obs` for the measured cells, as text. Raises: as the function."""
        return column(self.adata, name, self.batch.cell_names)

    def embedding(self, per_cell: dict[str, float]) -> dict[str, Any] | None:
        """The cells on the first embedding that the data have: its name, and x, y and damage of
        each cell. None if they have none.
        """
        key = next((key for key in EMBEDDINGS if key in self.adata.obsm), None)
        if key is None:
            return None
        places = self.adata.obsm[key][self.adata.obs_names.get_indexer(list(per_cell)), :2]
        points = [
            {"x": float(x), "y": float(y), "nats": nats}
            for (x, y), nats in zip(places, per_cell.values(), strict=True)
        ]
        return {"name": EMBEDDINGS[key], "points": points}


def open_stage(
    folder: str | Path,
    data: str | Path,
    config: StageConfig = StageConfig(),
) -> Stage:
    """Load a model and the cells to measure it on.

    Cells are those the model was not trained on, where its training.json tells; their number is cut
    at random. The baseline is the one trained beside the model, or else fitted on the cells that
    are left.
    Raises: BadInput, BadCheckpoint as `load_cells`, `read_cells`, `expression` and `tokenise`;
    BadInput for a column that is not there.
    """
    loaded = load_cells(folder)
    adata = read_cells(data)
    trained_on = loaded.training.get("source", "auto")
    values = expression(adata, trained_on if config.source == "auto" else config.source)
    known = [name for name in TYPE_COLUMNS if name in adata.obs]
    type_column = config.type or (known[0] if known else None)
    chosen, rest, held_out = _choose(values, loaded, config)
    tokens = replace(loaded.tokens, max_length=min(loaded.tokens.max_length, config.genes + 1))
    batch = tokenise(values.of(chosen), loaded.vocab, tokens, config.seed)
    masked = masks(batch, config.ratio, config.draws, config.seed)
    marginal = loaded.marginal or _marginal(values, rest, loaded, config)
    about = {
        "model": str(folder),
        "fingerprint": loaded.fingerprint,
        "load": loaded.report,
        "reading": loaded.model.reading,
        "data": {
            "name": Path(data).name,
            "source": values.source,
            "held_out": held_out,
            "type_column": type_column,
        },
        "stage": asdict(config),
    }
    baseline = marginal.nll(batch, masked, loaded.model.reading)
    types = None if type_column is None else column(adata, type_column, batch.cell_names)
    return Stage(loaded.model, adata, batch, masked, baseline, types, about)


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
    values: Expression, loaded: LoadedCells, config: StageConfig
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
    generator = torch.Generator().manual_seed(config.seed)
    order = [
        pool[i] for pool in pools for i in torch.randperm(len(pool), generator=generator).tolist()
    ]
    chosen = sorted(order[: config.cells])
    if not chosen:
        raise BadInput(
            "no cell of the data has two detected genes that the model knows; check that both use"
            " the same gene names."
        )
    return chosen, sorted({*usable} - {*chosen}), held_out


def _marginal(
    values: Expression, rest: list[int], loaded: LoadedCells, config: StageConfig
) -> Marginal:
    if len(rest) < 10:
        raise BadInput(
            f"the checkpoint has no gene-marginal baseline, and beside those measured {len(rest)}"
            " cells are left to fit one on; use fewer ‹cells›."
        )
    # the values of a cell do not depend on which of its genes are tokens, so all of them may be
    batch = tokenise(values.of(rest), loaded.vocab, loaded.tokens, config.seed)
    return fit_marginal(batch, loaded.model.shape.n_tokens, loaded.model.shape.n_bins)
