"""Which other prompts an edit touches: its output change at thousands of keys in one product."""

from __future__ import annotations

import torch
from jaxtyping import Float64
from torch import Tensor

from .preflight import Factors


def output_change(keys: Float64[Tensor, "n in"], factors: Factors) -> Float64[Tensor, " n"]:
    """|D k| for each key. For one fact with one key it is |r| |k' C^-1 n| / (k' C^-1 k). Source: follows from Meng et al. 2022, eq. 2."""
    left, right = factors
    inner = left.T @ left
    written = keys @ right.T
    change: Tensor = ((written @ inner) * written).sum(1).clamp_min(0).sqrt()
    return change


def ranked(change: Float64[Tensor, " n"], top: int) -> list[int]:
    """The keys that change most, as indices."""
    return [int(i) for i in torch.argsort(change, descending=True, stable=True)[:top]]
