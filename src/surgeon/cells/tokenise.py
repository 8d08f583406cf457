"""Cells as tokens: a gene each, with its expression as one of 51 bins.

A bin is a quantile among the non-zero values of the same cell; bin 0 is zero. Counts are small
whole numbers, so many values of a cell tie, and ties are spread at random over the bins they span.
Two tokenisations of one cell therefore differ: tokenise once, and give the same batch to the intact
and to the broken model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Int64, Shaped
from torch import Tensor

from ..errors import BadInput
from ..settings import setting
from .data import Expression

CLS, PAD, END, EOS = "<cls>", "<pad>", "<eoc>", "<eos>"


@dataclass(frozen=True)
class TokenConfig:
    """How a model wants its cells; kept in its args.json."""

    n_bins: int = setting(51, "bins of the expression, bin 0 for zero")
    max_length: int = setting(1200, "most tokens of a cell; of more genes a random choice is taken")
    include_zeros: bool = setting(False, "also tokens for genes that were not detected")
    pad_value: float = setting(-2.0, "value at padding and at <cls>")


@dataclass(frozen=True, eq=False)
class Batch:
    """Tokenised cells.

    genes: token ids. values: what a mask hides and the model tells: bins for scGPT (`pad_value` at
    <cls> and at padding), the tokens themselves for Geneformer. gene_names: of every token, by id.
    """

    genes: Int64[Tensor, "cell pos"]
    values: Shaped[Tensor, "cell pos"]
    padding: Bool[Tensor, "cell pos"]
    gene_names: list[str]
    cell_names: list[str]

    @cached_property
    def scored(self) -> Bool[Tensor, "cell pos"]:
        """Where a gene stands, whose value can be hidden."""
        special = [i for i, n in enumerate(self.gene_names) if n in (CLS, END, EOS)]
        return ~self.padding & ~torch.isin(self.genes, torch.tensor(special, dtype=torch.int64))

    def of(self, piece: slice | Tensor) -> Batch:
        """Some of the cells."""
        at = range(len(self.cell_names))[piece] if isinstance(piece, slice) else piece.tolist()
        names = [self.cell_names[i] for i in at]
        tensors = (self.genes[piece], self.values[piece], self.padding[piece])
        return Batch(*tensors, self.gene_names, names)

    def pieces(self, size: int) -> list[slice]:
        """All cells, `size` at a time."""
        n = len(self.cell_names)
        return [slice(at, min(at + size, n)) for at in range(0, n, size)]


def bin_range(values: np.ndarray, n_bins: int) -> tuple[np.ndarray, np.ndarray]:
    """The bins that each value (gene,) of one cell may fall into, low + 1 to high: those between
    its quantiles among the non-zero ones; both 0 where the value is zero.

    Source: scGPT's preprocessing.
    """
    low, high = np.zeros(len(values)), np.zeros(len(values))
    there = values.nonzero()[0]
    if len(there):
        edges = np.quantile(values[there], np.linspace(0, 1, n_bins - 1))
        low[there] = np.digitize(values[there], edges, right=True)
        high[there] = np.digitize(values[there], edges)
        # between two edges there is one bin, and `digitize` gives it from either side
        low = np.where((low == high) & (high > 0), high - 1, low)
    return low, high


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
                f"the vocabulary has no {special}; use the one that came with the model."
            )
    columns = [i for i, name in enumerate(expression.gene_names) if name in vocab]
    if not columns:
        example = next((name for name in vocab if not name.startswith("<")), "none")
        raise BadInput(
            f"none of the {len(expression.gene_names)} genes is in the model's vocabulary: the data"
            f" have names like {expression.gene_names[0]}, the model like {example}; rename"
            " var_names to what the model knows."
        )
    ids = np.array([vocab[expression.gene_names[i]] for i in columns])
    random = np.random.default_rng(seed)
    rows: list[tuple[np.ndarray, np.ndarray]] = []
    # one cell at a time: all of a large data set do not fit as a dense matrix
    for name, sparse in zip(expression.cell_names, expression.matrix[:, columns], strict=True):
        row = sparse.toarray().ravel()
        if not row.any():
            raise BadInput(
                f"the cell {name} has no detected gene that the model knows; leave such cells out."
            )
        low, high = bin_range(row, config.n_bins)
        bins = np.ceil(high - random.random(len(row)) * (high - low))
        kept = np.arange(len(row)) if config.include_zeros else row.nonzero()[0]
        if len(kept) > config.max_length - 1:
            kept = np.sort(random.choice(kept, config.max_length - 1, replace=False))
        rows.append((ids[kept], bins[kept]))
    width = 1 + max(len(tokens) for tokens, _ in rows)
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
