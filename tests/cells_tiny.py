"""A tiny model of gene expression, trained in a second on made cells of two types."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from types import SimpleNamespace

import numpy as np
import pandas
import torch
from scipy.sparse import csr_matrix
from torch.nn.functional import cross_entropy

from surgeon.cells import Expression, Stage
from surgeon.cells.checkpoint import LoadReport
from surgeon.cells.likelihood import fit_marginal, masks
from surgeon.cells.model import CellConfig, ScGPT
from surgeon.cells.stage import StageRecord
from surgeon.cells.tokenise import Batch

GENES = [f"G{i}" for i in range(24)]
TYPES = ("even", "odd")
VOCAB = {"<cls>": 0, **{gene: i + 1 for i, gene in enumerate(GENES)}, "<pad>": 25}


def expression_of(
    values: object, genes: Sequence[str] | None = None, kind: str = "counts"
) -> Expression:
    """Expression data of these values (cell, gene)."""
    matrix = csr_matrix(np.asarray(values, dtype=np.float32))
    n, width = matrix.shape
    names = genes or [f"G{i}" for i in range(width)]
    return Expression(matrix, [*names], [f"c{i}" for i in range(n)], "X", kind)


def cells(n: int, seed: int) -> tuple[Batch, list[str]]:
    """Genes of even index are high in cells of the even type, the others in the odd; 3 levels with
    noise, shuffled positions.
    """
    generator = torch.Generator().manual_seed(seed)
    odd = torch.arange(n) % 2
    order = torch.rand(n, 24, generator=generator).argsort(1)
    high = (order % 2) == odd[:, None]
    noise = torch.rand(n, 24, generator=generator)
    values = torch.where(high, 30.0, 5.0) + torch.where(noise < 0.3, 10.0, 0.0)
    genes = torch.cat([torch.zeros(n, 1, dtype=torch.long), order + 1], 1)
    values = torch.cat([torch.zeros(n, 1), values], 1)
    batch = Batch(
        genes,
        values,
        torch.zeros_like(genes, dtype=torch.bool),
        ["<cls>", *GENES, "<pad>"],
        [f"cell{seed}.{i}" for i in range(n)],
    )
    return batch, [TYPES[i] for i in odd.tolist()]


@cache
def tiny() -> Stage:
    """The model and cells it was not trained on, in `obs` with their type and one of six donors.

    The same objects for all tests: nothing may change the model.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ScGPT(CellConfig(26, 32, 2, 24, 2, pad_id=25, dropout=0.0, categorical=True))
        train, _ = cells(64, 1)
        optimiser = torch.optim.AdamW(model.parameters(), 5e-3)
        for step in range(300):
            masked = masks(train, 0.4, 1, step)[0]
            hidden = train.values.masked_fill(masked, -1)
            logits = model(train.genes, hidden, train.padding).logits
            assert logits is not None
            loss = cross_entropy(logits[masked], train.values.long()[masked])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    model.eval().requires_grad_(False)
    batch, types = cells(36, 2)
    masked = masks(batch, 0.3, 2, 99)
    baseline = fit_marginal(train, 26, 51).nll(batch, masked)
    donors = [f"d{i % 6}" for i in range(36)]  # even cells have the donors 0, 2, 4
    obs = pandas.DataFrame({"type": types, "donor": donors, "one": "d0"}, index=batch.cell_names)
    record = StageRecord(LoadReport("m", 9, [], 0), "categorical", "made", "X", True, "type")
    adata = SimpleNamespace(obs=obs, obsm={})
    return Stage(model, batch, masked, baseline, types, adata, record, "0" * 64)
