"""AlphaEdit: a change that acts only where usual keys have next to no energy."""

from __future__ import annotations

import torch
from jaxtyping import Float64
from torch import Tensor

from ..errors import BadInput


def null_basis(covariance: Float64[Tensor, "in in"], energy: float) -> Float64[Tensor, "in m"]:
    """The directions in which usual keys have the least energy, together at most the share `energy`
    of it; orthonormal.

    Chosen by energy and not by an absolute size, which would depend on how the model happens to be
    scaled.
    Raises: BadInput if no direction has as little as that. Source: Fang et al. 2024,
    arXiv:2410.02355, section 3.2.
    """
    values, vectors = torch.linalg.eigh(covariance)  # in ascending order
    # rounding makes some of the smallest a little negative
    share = values.clamp_min(0).cumsum(0) / values.clamp_min(0).sum()
    kept = int((share <= energy).sum())
    if not kept:
        raise BadInput(
            f"no direction of the keys holds as little as {energy:.3g} of their energy; use a"
            " larger ‹energy›."
        )
    basis: Tensor = vectors[:, :kept]
    return basis


def null_space_change(
    keys: Float64[Tensor, "n in"],
    residuals: Float64[Tensor, "n out"],
    basis: Float64[Tensor, "in m"],
    ridge: float,
    earlier: Float64[Tensor, "e in"] | None = None,
) -> tuple[Float64[Tensor, "out n"], Float64[Tensor, "n in"]]:
    """min over D of sum_i |D P k_i - r_i|^2 + sum over earlier keys |D P k|^2 + ridge |D|^2, acting
    in the span of `basis`: factors of D.

    ridge: absolute. Solved in the n + e dimensions that the keys span (Woodbury). Source: Fang et
    al. 2024, arXiv:2410.02355, eq. 14.
    """
    inside = keys @ basis  # (n, m)
    everything = inside if earlier is None else torch.cat([earlier @ basis, inside])
    inner = everything @ everything.T
    inner.diagonal().add_(ridge)
    right = (inside - (inside @ everything.T) @ torch.linalg.solve(inner, everything)) / ridge
    return residuals.T.contiguous(), right @ basis.T


def projection_loss(
    keys: Float64[Tensor, "n in"], basis: Float64[Tensor, "in m"]
) -> Float64[Tensor, " n"]:
    """The share of each key's squared norm that lies outside the span of `basis`, where the edit
    cannot reach.
    """
    lost: Tensor = 1 - (keys @ basis).pow(2).sum(1) / keys.pow(2).sum(1)
    return lost
