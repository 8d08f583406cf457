"""One matrix, four ways: rounded; clipped and rounded; rounded with its critical entries put back;
and the hold-out, which clips and puts back.

Putting back without clipping gives nothing where the entry is the extremum of its block: that lies
on the grid already.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor

from ..anatomy import Entry
from ..result import record
from .clip import clipping
from .config import QuantizeConfig
from .grid import Limit, Quantized, limited, quantize_matrix

HELD_BITS = 48  # what an entry put back costs in storage: its value at 16 bits and its place at 32


@record
class MatrixReport:
    """What was done to one matrix.

    clip: the z, percentage or share that was used, None without clipping. clipped: entries beyond
    the limits. held: entries put back. error: sum of squared errors over that of the entries,
    without the critical ones, columns weighted by E[x^2] if `weighted`.
    """

    shape: tuple[int, int]
    bits: int
    blocks: int
    clip: float | None
    clipped: int
    held: int
    error: float
    weighted: bool
    bits_per_weight: float


@dataclass(frozen=True, eq=False)
class Treated:
    """A matrix after quantization.

    Shapes: matrix (out, in), what the model computes with, critical entries put back if asked; in
    float32, or wider if the original was. quantized: its codes, without what was put back. rows,
    cols: where entries were put back, (n,).
    """

    quantized: Quantized
    matrix: Float[Tensor, "out in"]
    rows: Tensor
    cols: Tensor
    report: MatrixReport


@torch.no_grad()
def treat(
    matrix: Float[Tensor, "out in"],
    config: QuantizeConfig,
    critical: Sequence[Entry] = (),
    importance: Float[Tensor, " in"] | None = None,
) -> Treated:
    """Quantize one matrix as `config` says. The same input gives the same bits, in memory and from
    a file.

    critical: entries of this matrix. importance: E[x^2] of each column, for the error of a weighted
    search.
    Raises: BadInput if the blocks do not divide the matrix and may not be padded; SurgeonError for
    NaN.
    """
    rows = torch.tensor([entry.row for entry in critical], dtype=torch.long)
    cols = torch.tensor([entry.col for entry in critical], dtype=torch.long)
    held = torch.zeros(matrix.shape, dtype=torch.bool)
    held[rows, cols] = True
    weights = importance if config.weighted else None
    clip = clipping(matrix, config, held, weights) if config.clips else None
    low, high = (None, None) if clip is None else (clip.low, clip.high)
    quantized = quantize_matrix(matrix, config.grid, low, high)
    # never narrower than the original, so that entries put back are exact
    result = quantized.dequantize().to(torch.promote_types(matrix.dtype, torch.float32))
    if config.restores:
        result[rows, cols] = matrix[rows, cols].to(result)
    else:
        rows = cols = rows[:0]
    n_out, n_in = matrix.shape
    held_bits = HELD_BITS * len(rows) / matrix.numel()
    report = MatrixReport(
        shape=(n_out, n_in),
        bits=config.grid.bits,
        blocks=prod(config.grid.block.counts((n_out, n_in))),
        clip=None if clip is None else clip.value,
        clipped=0 if clip is None else _beyond(matrix, config, low, high),
        held=len(rows),
        error=_relative_error(matrix, result, held, weights),
        weighted=weights is not None,
        bits_per_weight=config.grid.bits_per_weight((n_out, n_in)) + held_bits,
    )
    return Treated(quantized, result, rows, cols, report)


def _beyond(matrix: Tensor, config: QuantizeConfig, low: Limit, high: Limit) -> int:
    blocks = config.grid.block.split(matrix.float())
    # NaN, which pads the last blocks, differs from itself
    return int((limited(blocks, low, high) != blocks).sum() - blocks.isnan().sum())


def _relative_error(
    matrix: Tensor, result: Tensor, held: Tensor, importance: Tensor | None
) -> float:
    weights = (~held).float() if importance is None else (~held) * importance.float()

    def total(part: Tensor) -> float:
        return float((part.float().square() * weights).sum(dtype=torch.float64))

    error, size = total(result - matrix), total(matrix)
    return error / size if size > 0 else 0.0
