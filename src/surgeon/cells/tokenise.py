"""Cells as tokens: a gene each, with its expression as one of 51 bins.

A bin is a quantile among the non-zero values of the same cell; bin 0 is zero. Counts are small
whole numbers, so many values of a cell tie, and ties are spread at random over the bins they span.
Two tokenisations of one cell therefore differ: tokenise once, and give the same batch to the intact
and to the broken model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int64
from torch import Tensor

from ..errors import BadInput
from .data import Expression

CLS, PAD, END = "<cls>", "<pad>", "<eoc>"


@dataclass(frozen=True)
class TokenConfig:
    """How a model wants its cells; kept in its args.json."""

    n_bins: int = field(default=51, metadata={"help": "bins of the expression, bin 0 for zero"})
    max_length: int = field(
        default=1200,
        metadata={"help": "most tokens of a cell; of more genes a random choice is taken"},
    )
    include_zeros: bool = field(
        default=False, metadata={"help": "also tokens for genes that were not detected"}
    )
    pad_value: float = field(default=-2.0, metadata={"help": "value at padding and at <cls>"})


@dataclass(frozen=True, eq=False)
class Batch:
    """Tokenised cells.

    gene_names: of every token, by its id. `values` are bins; `pad_value` at <cls>, the first place,
    and at padding.
    """

    genes: Int64[Tensor, "cell pos"]
    values: Float32[Tensor, "cell pos"]
    padding: Bool[Tensor, "cell pos"]
    gene_names: list[str]
    cell_names: list[str]


@dataclass(frozen=True, eq=False)
class Ties:
    """The bins that the values of one cell may fall into: low + 1 to high; both 0 where the value
    is zero. Shapes: (gene,).
    """

    low: np.ndarray
    high: np.ndarray

    def draw(self, random: np.random.Generator) -> np.ndarray:
        """One bin for each value, uniform among those it may fall into."""
        bins: np.ndarray = np.ceil(
            self.high - random.random(self.high.shape) * (self.high - self.low)
        )
        return bins


def ties(values: np.ndarray, n_bins: int) -> Ties:
    """The bins of one cell's values (gene,), between the quantiles of the non-zero ones.

    Source: scGPT's preprocessing.
    """
    low, high = np.zeros(len(values)), np.zeros(len(values))
    there = values.nonzero()[0]
    if len(there):
        edges = np.quantile(values[there], np.linspace(0, 1, n_bins - 1))
        low[there], high[there] = (
            np.digitize(values[there], edges, right=True),
            np.digitize(values[there], edges),
        )
        # between two edges there is one bin, and `digitize` gives it from either side
        low = np.where((low == high) & (high > 0), high - 1, low)
    return Ties(low, high)


def known_genes(expression: Expression, vocab: Mapping[str, int]) -> tuple[list[int], list[int]]:
    """Columns of the genes that the vocabulary has, and their token ids.

    Raises: BadInput if it has none.
    """
    columns = [i for i, name in enumerate(expression.gene_names) if name in vocab]
    if not columns:
        raise BadInput(
            f"none of the {len(expression.gene_names)} genes is in the model's vocabulary: the data"
            f" have names like {expression.gene_names[0]}, the model like {_example(vocab)}; rename"
            " var_names to what the model knows."
        )
    return columns, [vocab[expression.gene_names[i]] for i in columns]


def tokenise(
    expression: Expression,
    vocab: Mapping[str, int],
    config: TokenConfig = TokenConfig(),
    seed: int = 0,
) -> Batch:
    """Tokens of every cell: <cls>, then genes in the order of the data. Genes the vocabulary lacks
    are left out before binning.

    Of more genes than `max_length` leaves room for, a random choice is taken; undetected ones count
    as genes under `include_zeros`.
    Raises: BadInput if the vocabulary has none of the genes or no <cls> or <pad>, or a cell has no
    detected gene left.
    """
    for special in (CLS, PAD):
        if special not in vocab:
            raise BadInput(
                f"the vocabulary has no {special}; use the vocab.json that came with the"
                " checkpoint."
            )
    columns, ids = known_genes(expression, vocab)
    random = np.random.default_rng(seed)
    matrix = expression.matrix[:, columns]
    rows: list[tuple[np.ndarray, np.ndarray]] = []
    for i, name in enumerate(expression.cell_names):
        row = matrix[i].toarray()[
            0
        ]  # one cell at a time: all of a large data set do not fit as a dense matrix
        bins = ties(row, config.n_bins).draw(random)
        kept = np.arange(len(row)) if config.include_zeros else row.nonzero()[0]
        if not row.any():
            raise BadInput(
                f"the cell {name} has no detected gene that the model knows; leave such cells out."
            )
        if len(kept) > config.max_length - 1:
            kept = np.sort(random.choice(kept, config.max_length - 1, replace=False))
        rows.append((np.array(ids)[kept], bins[kept]))
    width = 1 + max(len(r[0]) for r in rows)
    genes = torch.full((len(rows), width), vocab[PAD], dtype=torch.int64)
    values = torch.full((len(rows), width), config.pad_value, dtype=torch.float32)
    for i, (tokens, bins) in enumerate(rows):
        genes[i, 1 : len(tokens) + 1] = torch.from_numpy(tokens)
        values[i, 1 : len(tokens) + 1] = torch.from_numpy(bins)
    padding = genes == vocab[PAD]
    genes[:, 0], padding[:, 0] = vocab[CLS], False
    return Batch(genes, values, padding, names_by_id(vocab), list(expression.cell_names))


def names_by_id(vocab: Mapping[str, int]) -> list[str]:
    """The name of every token id up to the largest; an id without a name gets its number."""
    names = [f"<{i}>" for i in range(max(vocab.values()) + 1)]
    for name, i in vocab.items():
        names[i] = name
    return names


def _example(vocab: Mapping[str, int]) -> str:
    return next((name for name in vocab if not name.startswith("<")), "none")
