"""ROME: one fact, one matrix, a change of rank one."""

from __future__ import annotations

import torch
from jaxtyping import Float64
from torch import Tensor

from ..errors import SurgeonError
from .covariance import CholeskyFactor

SEPARATE = 1e-8  # least share of the largest eigenvalue by which keys are told apart


class UnusableKey(SurgeonError):
    """A key that cannot be told from the keys that are to be kept, or from another key of the
    edit.
    """


def least_change(
    keys: Float64[Tensor, "m in"], delta: Float64[Tensor, " out"], factor: CholeskyFactor
) -> tuple[Float64[Tensor, "out 1"], Float64[Tensor, "1 in"]]:
    """The least change D, in the norm of the keys' covariance C, with D k = delta for every one of
    the keys; it has rank one: factors.

    With one key, delta k' C^-1 / (k' C^-1 k). Raises: UnusableKey if k' C^-1 k is not above 0, or
    the keys cannot be told apart.
    Source: Meng et al. 2022, arXiv:2202.05262, eq. 2, with one key everywhere as Gupta et al. 2024,
    arXiv:2403.07175, have it.
    """
    solved = factor.solve(keys.T)
    inner = keys @ solved
    require_distinct(inner)
    u = solved @ torch.linalg.solve(inner, torch.ones(len(keys), dtype=inner.dtype))
    return delta[:, None], u[None]


def legacy_change(
    mean: Float64[Tensor, " in"],
    bare: Float64[Tensor, " in"],
    delta: Float64[Tensor, " out"],
    factor: CholeskyFactor,
) -> tuple[Float64[Tensor, "out 1"], Float64[Tensor, "1 in"]]:
    """As the published code has it: the direction of the mean key, scaled to be exact at the bare
    prompt. For comparison only.

    It explodes where the two keys disagree. Source: github.com/kmeng01/rome, rome/rome_main.py.
    """
    u = factor.solve(mean[:, None])[:, 0]
    reach = torch.dot(bare, u)
    require_distinct(reach[None, None].abs())
    return (delta / reach)[:, None], u[None]


def chosen_keys(keys: Float64[Tensor, "contexts in"], which: str) -> Float64[Tensor, "m in"]:
    """The keys that an edit is to hold at: the mean over contexts, the bare prompt's (the first),
    or both.
    """
    mean, bare = keys.mean(0, keepdim=True), keys[:1]
    if which == "mean":
        return mean
    return bare if which == "bare" or len(keys) == 1 else torch.cat([mean, bare])


def require_distinct(inner: Float64[Tensor, "m m"]) -> None:
    """Raises: UnusableKey unless K C^-1 K' is well above singular."""
    values = (
        torch.linalg.eigvalsh(inner)
        if bool(torch.isfinite(inner).all())
        else torch.full((1,), torch.nan)
    )
    if not bool(values[0] > SEPARATE * values[-1]):
        raise UnusableKey(
            f"the keys of this edit ({len(inner)}) are zero or cannot be told apart (eigenvalues of"
            f" K C^-1 K' from {float(values[0]):.3g} to {float(values[-1]):.3g}); leave out a fact"
            " that is given twice, or choose another layer."
        )
