"""What a screen or a map works on: a checkpoint, cells tokenised once, the draws of masks, the
baseline, and columns of `obs`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import BadInput
from .checkpoint import LoadedCells, load_cells
from .data import Expression, expression, read_cells
from .likelihood import RATIO, Marginal, fit_marginal, masks
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
    """How many cells, genes and masks a measurement takes."""

    cells: int = field(
        default=128,
        metadata={
            "help": "most cells to measure on; of those held out of training, where that is known"
        },
    )
    genes: int = field(
        default=256, metadata={"help": "most genes of a cell, a random choice where it has more"}
    )
    draws: int = field(default=3, metadata={"help": "draws of masks over the same tokenised cells"})
    ratio: float = field(default=RATIO, metadata={"help": "share of the values that a draw hides"})
    seed: int = field(
        default=0, metadata={"help": "seed of the choice of cells, the tokens and the masks"}
    )

    def __post_init__(self) -> None:
        if min(self.cells, self.draws) < 1 or self.genes < 2:
            raise BadInput(
                "a measurement needs at least one cell and one draw, and two genes of each cell."
            )


@dataclass(frozen=True, eq=False)
class Stage:
    """Everything measured on is here once, so that intact and broken models see the same.

    held_out: whether no cell was trained on.
    """

    loaded: LoadedCells
    adata: Any
    batch: Batch
    masked: Tensor
    baseline: Tensor
    types: list[str] | None
    type_column: str | None
    held_out: bool
    data: str
    source: str
    folder: str
    config: StageConfig

    @property
    def model(self) -> ScGPT:
        return self.loaded.model

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.folder,
            "fingerprint": self.loaded.fingerprint,
            "load": self.loaded.report.to_json(),
            "reading": self.model.reading,
            "data": {
                "name": Path(self.data).name,
                "source": self.source,
                "held_out": self.held_out,
                "type_column": self.type_column,
            },
            "stage": asdict(self.config),
        }

    def embedding(self, per_cell: dict[str, float]) -> dict[str, Any] | None:
        """The cells on the first embedding that the data have: its name, and x, y and damage of
        each cell. None if they have none.
        """
        for key, name in EMBEDDINGS.items():
            if key in self.adata.obsm:
                places = dict(
                    zip(
                        map(str, self.adata.obs_names),
                        self.adata.obsm[key][:, :2].tolist(),
                        strict=True,
                    )
                )
                return {
                    "name": name,
                    "points": [
                        {"x": places[c][0], "y": places[c][1], "nats": v}
                        for c, v in per_cell.items()
                    ],
                }
        return None


def open_stage(
    folder: str | Path,
    data: str | Path,
    config: StageConfig = StageConfig(),
    type_column: str | None = None,
    source: str = "auto",
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
    values = expression(
        adata, loaded.training.get("source", source) if source == "auto" else source
    )
    types_in = (
        type_column
        if type_column is not None
        else next((c for c in TYPE_COLUMNS if c in adata.obs), None)
    )
    chosen, rest, held_out = _choose(values, loaded, config)
    tokens = replace(loaded.tokens, max_length=min(loaded.tokens.max_length, config.genes + 1))
    batch = tokenise(values.of(chosen), loaded.vocab, tokens, config.seed)
    masked = masks(batch, config.ratio, config.draws, config.seed)
    marginal = (
        loaded.marginal if loaded.marginal is not None else _marginal(values, rest, loaded, config)
    )
    return Stage(
        loaded,
        adata,
        batch,
        masked,
        marginal.nll(batch, masked, loaded.model.reading),
        None if types_in is None else column(adata, types_in, batch.cell_names),
        types_in,
        held_out,
        str(data),
        values.source,
        str(folder),
        config,
    )


def column(adata: Any, name: str, cells: Sequence[str]) -> list[str]:
    """A column of `obs` for these cells, as text.

    Raises: BadInput if it is not there, or has no value for one of the cells.
    """
    if name not in adata.obs:
        raise BadInput(
            f"obs has no column {name!r}; it has"
            f" {', '.join(map(str, adata.obs.columns)) or 'none'}."
        )
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
    detected = values.matrix[:, known].getnnz(axis=1)
    usable = [i for i in range(len(values.cell_names)) if detected[i] > 1]
    split = loaded.training.get("split", {})
    parts = [set(split.get(part, ())) for part in ("test", "validation")]
    pools = [[i for i in usable if values.cell_names[i] in part] for part in parts]
    trained = set(split.get("train", ()))
    # data the model was never trained on are held out as a whole
    held_out = bool(split) and (
        bool(pools[0]) or not any(name in trained for name in values.cell_names)
    )
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
    taken = set(chosen)
    return chosen, [i for i in usable if i not in taken], held_out


def _marginal(
    values: Expression, rest: list[int], loaded: LoadedCells, config: StageConfig
) -> Marginal:
    if len(rest) < 10:
        raise BadInput(
            f"the checkpoint has no gene-marginal baseline, and beside those measured {len(rest)}"
            " cells are left to fit one on; use fewer --cells."
        )
    # the values of a cell do not depend on which of its genes are tokens, so all of them may be
    batch = tokenise(values.of(rest), loaded.vocab, loaded.tokens, config.seed)
    return fit_marginal(batch, loaded.model.shape.n_tokens, loaded.model.shape.n_bins)
