"""Uncertainty of a mean over windows."""

from __future__ import annotations

import torch
from jaxtyping import Float64
from torch import Tensor


def interval(
    values: Float64[Tensor, " n"], seed: int = 0, resamples: int = 2000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values`, in their unit.

    What is resampled are the values, one for each window, say: tokens of one window are not
    independent. With a single value there is nothing to resample, and the interval is that value.
    Source: Efron & Tibshirani 1993, chapter 13.

    >>> low, high = interval(torch.arange(100.0, dtype=torch.float64))
    >>> low < 49.5 < high, round(high - low)
    (True, 11)
    """
    n = len(values)
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(n, (resamples, n), generator=generator)
    means = values[draws].mean(1)
    tail = (1 - level) / 2
    ends = torch.tensor([tail, 1 - tail], dtype=means.dtype)
    low, high = torch.quantile(means, ends).tolist()
    return low, high
