"""Uncertainty of a mean over windows."""

from __future__ import annotations

import torch
from jaxtyping import Float64
from torch import Tensor


def interval(
    values: Float64[Tensor, " n"], seed: int = 0, resamples: int = 2000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values`, resampling windows, in the unit of
    `values`.

    With a single window there is nothing to resample and the interval is that value alone.
    Source: Efron & Tibshirani 1993, chapter 13.
    """
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(len(values), (resamples, len(values)), generator=generator)
    means = values[draws].mean(1)
    tail = (1 - level) / 2
    low, high = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=means.dtype)).tolist()
    return low, high
