"""MEMIT: many facts spread over several layers, each as well as the others allow."""

from __future__ import annotations

import torch
from jaxtyping import Float64
from torch import Tensor

from .covariance import CholeskyFactor


def spread_change(
    keys: Float64[Tensor, "n in"],
    residuals: Float64[Tensor, "n out"],
    factor: CholeskyFactor,
    weight: float,
) -> tuple[Float64[Tensor, "out n"], Float64[Tensor, "n in"]]:
    """min over D of weight E|D k|^2 over the usual keys + sum_i |D k_i - residual_i|^2: factors of
    D.

    D = R' (I + K C^-1 K' / weight)^-1 K C^-1 / weight, which solves n equations instead of d_mlp
    (Woodbury). weight: how many usual keys the covariance stands for. Source: Meng et al. 2023,
    arXiv:2210.07229, eq. 14.
    """
    solved = factor.solve(keys.T) / weight
    inner = keys @ solved
    inner.diagonal().add_(1.0)
    return torch.linalg.solve(inner, residuals).T, solved.T
