"""EMMET: many facts in one matrix, each exactly."""

from __future__ import annotations

import torch
from jaxtyping import Float64
from torch import Tensor

from .covariance import CholeskyFactor
from .rome import require_distinct


def exact_change(
    keys: Float64[Tensor, "n in"], deltas: Float64[Tensor, "n out"], factor: CholeskyFactor
) -> tuple[Float64[Tensor, "out n"], Float64[Tensor, "n in"]]:
    """The least change D, in the norm of the keys' covariance C, with D k_i = delta_i for every i:
    factors of D.

    D = deltas' (K C^-1 K')^-1 K C^-1. Raises: UnusableKey if the keys cannot be told apart.
    Source: Gupta et al. 2024, arXiv:2403.14236, eq. 9.
    """
    solved = factor.solve(keys.T)
    inner = keys @ solved
    require_distinct(inner)
    return torch.linalg.solve(inner, deltas).T, solved.T
