"""Where to cut a matrix before it is rounded: by z-score, by percentile, or by least error, each
found by a grid search.

The limits are those of the ordinary entries: the critical ones, which the hold-out puts back, count
neither in the statistics nor in the error. Their own rounding never matters to it, and one weight a
thousand times the others would otherwise set every limit.
Source: Yu et al. 2024, arXiv:2411.07191, section 4, for the z-score of w and for putting back.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .config import QuantizeConfig
from .grid import Block, Limit, quantize_matrix

Z_SCORES = (1.0, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0, 12.0)
PERCENTS = (90.0, 95.0, 98.0, 99.0, 99.5, 99.8, 99.9, 99.95, 99.99, 100.0)
SHARES = tuple(i / 20 for i in range(6, 21))


@dataclass(frozen=True, eq=False)
class Clipping:
    """Limits of a matrix, each a number or one for each block. value: the z, the percentage, or the
    share of the range (mse; the mean over blocks), as given or as chosen."""

    low: Limit
    high: Limit
    value: float


@torch.no_grad()
def clipping(
    matrix: Float[Tensor, "out in"],
    config: QuantizeConfig,
    held: Bool[Tensor, "out in"] | None = None,
    importance: Float[Tensor, " in"] | None = None,
) -> Clipping:
    """The limits that `config` asks for; where it gives no value, those of least error on the
    entries that are not `held`.

    importance: the weight of each column's squared error, E[x^2] of its input; 1 if not given.
    """
    ordinary = matrix.detach().float()
    if held is not None and bool(held.any()):
        ordinary = ordinary.masked_fill(held, torch.nan)
    if config.clip == "mse":
        return _least_error(matrix, ordinary, config, importance)
    by = _by_z if config.clip == "z" else _by_percentile
    candidates = list(by(ordinary, config))
    if len(candidates) == 1:
        return candidates[0]

    def error(candidate: Clipping) -> float:
        errors = _errors(matrix, ordinary, config, candidate, importance)
        return float(errors.nansum(dtype=torch.float64))

    return min(candidates, key=error)


def _by_z(ordinary: Tensor, config: QuantizeConfig) -> Iterator[Clipping]:
    """mean +- z standard deviations; the last candidate reaches to the farthest ordinary entry, so
    that only held ones are clipped.
    """
    blocks = _pooled(ordinary, config)
    mean = blocks.nanmean(-1)
    deviations = (blocks - mean[..., None]).abs()
    sd = deviations.square().nanmean(-1).sqrt()
    farthest = float((deviations.nan_to_num(nan=0.0).amax(-1) / sd).nan_to_num(nan=0.0).max())
    # a little farther, or rounding could clip the farthest entry itself
    searched = (*(z for z in Z_SCORES if z < farthest), farthest * (1 + 1e-6))
    for z in (config.clip_value,) if config.clip_value else searched:
        yield _bounded(mean - z * sd, mean + z * sd, z)


def _by_percentile(ordinary: Tensor, config: QuantizeConfig) -> Iterator[Clipping]:
    """The middle p percent of the entries; 100: all ordinary ones, so that only held ones are
    clipped.
    """
    blocks = _pooled(ordinary, config).sort(-1).values  # NaN comes last
    last = blocks.isnan().logical_not().sum(-1, keepdim=True) - 1
    for percent in (config.clip_value,) if config.clip_value else PERCENTS:
        # half of what goes is cut at either end
        cut = (last * (100 - percent) / 200).floor().long()
        low, high = (blocks.gather(-1, i.clamp_min(0))[..., 0] for i in (cut, last - cut))
        yield _bounded(low, high, percent)


def _least_error(
    matrix: Tensor, ordinary: Tensor, config: QuantizeConfig, importance: Tensor | None
) -> Clipping:
    """For each block the share of its ordinary range that leaves the least squared error."""
    blocks = config.grid.block.split(ordinary)
    least = blocks.nan_to_num(nan=torch.inf).amin(-1)
    most = blocks.nan_to_num(nan=-torch.inf).amax(-1)
    # a symmetric grid reaches as far on both sides of zero; the other shrinks towards its own
    # middle
    half = torch.maximum(most, -least) if config.grid.symmetric else (most - least) / 2
    middle = torch.zeros_like(half) if config.grid.symmetric else (most + least) / 2
    best = torch.full_like(half, torch.inf)
    share = torch.ones_like(half)
    for candidate in (config.clip_value,) if config.clip_value else SHARES:
        clip = _bounded(middle - candidate * half, middle + candidate * half, candidate)
        errors = _errors(matrix, ordinary, config, clip, importance)
        error = config.grid.block.split(errors).nansum(-1)
        better = error < best
        best, share = torch.where(better, error, best), torch.where(better, candidate, share)
    chosen = _bounded(middle - share * half, middle + share * half, 0.0)
    return Clipping(chosen.low, chosen.high, float(share.mean()))


def _errors(
    matrix: Tensor,
    ordinary: Tensor,
    config: QuantizeConfig,
    clip: Clipping,
    importance: Tensor | None,
) -> Tensor:
    """Squared error of each entry (out, in), times its column's importance; NaN where it is
    held.
    """
    rounded = quantize_matrix(matrix, config.grid, clip.low, clip.high).dequantize()
    error = (rounded - ordinary).square_()
    return error if importance is None else error * importance.to(error)


def _pooled(ordinary: Tensor, config: QuantizeConfig) -> Tensor:
    """The entries that share their statistics: those of a block, or of the whole matrix."""
    return (config.grid.block if config.clip_per == "block" else Block("tensor")).split(ordinary)


def _bounded(low: Tensor, high: Tensor, value: float) -> Clipping:
    """Limits, none where no ordinary entry told any.

    Statistics of the whole matrix hold for every block.
    """
    low = low.nan_to_num(nan=-torch.inf, neginf=-torch.inf)
    high = high.nan_to_num(nan=torch.inf, posinf=torch.inf)
    nothing = low > high
    low, high = low.masked_fill(nothing, -torch.inf), high.masked_fill(nothing, torch.inf)
    if low.numel() == 1:
        return Clipping(float(low), float(high), value)
    return Clipping(low, high, value)
