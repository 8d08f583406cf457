"""Permutation tests for groups of tokens: within strata, and of whole documents."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float64, Int64
from torch import Tensor


def stratified_test(
    sums: Float64[Tensor, " unit"],
    sizes: Float64[Tensor, " unit"],
    labels: Int64[Tensor, " unit"],
    strata: Int64[Tensor, " unit"],
    groups: int,
    permutations: int,
    generator: torch.Generator,
) -> tuple[Float64[Tensor, " group"], Float64[Tensor, "permutation group"]]:
    """The mean per token by which each group exceeds its strata, and the same with labels dealt
    anew among the units of each stratum.

    A unit is a bundle of tokens that stays together, with the `sums` of their values and their
    number in `sizes`. Exact whatever the values are, as long as the units of one stratum could
    change places. Values are taken from the mean of their stratum, since a label that moves to a
    larger unit would else give its stratum more weight, and differences between strata would come
    in again.
    """
    level = torch.bincount(strata, sums) / torch.bincount(strata, sizes).clamp_min(1)
    excess = sums - sizes * level[strata]

    def means(order: Tensor, dealt: Tensor) -> Tensor:
        return torch.bincount(dealt, excess[order], groups) / torch.bincount(
            dealt, sizes[order], groups
        )

    by_stratum = strata.argsort()
    dealt = labels[by_stratum]
    null = torch.empty(permutations, groups, dtype=torch.float64)
    for i in range(permutations):
        # a random order within each stratum, the strata in order
        null[i] = means(
            (strata + torch.rand(len(strata), generator=generator, dtype=torch.float64)).argsort(),
            dealt,
        )
    return means(by_stratum, dealt), null


def naive_null(
    values: Float64[Tensor, " token"],
    labels: Int64[Tensor, " token"],
    groups: int,
    permutations: int,
    generator: torch.Generator,
) -> Float64[Tensor, "permutation group"]:
    """The mean of each group when its tokens are drawn from anywhere: what a bare ranking takes for
    granted.
    """
    sizes = torch.bincount(labels, minlength=groups).clamp_min(1)
    null = torch.empty(permutations, groups, dtype=torch.float64)
    for i in range(permutations):
        null[i] = (
            torch.bincount(labels[torch.randperm(len(labels), generator=generator)], values, groups)
            / sizes
        )
    return null


def document_null(
    weights: Float64[Tensor, "document class"],
    means: Float64[Tensor, "document class"],
    permutations: int,
    generator: torch.Generator,
) -> Float64[Tensor, " permutation"]:
    """The weighted mean of `means` when whole documents change places: each keeps its profile of
    weights and gets another's values.
    """
    # [d, e]: what document d contributes with the values of document e
    each = weights @ means.T / weights.sum()
    n = len(weights)
    return torch.stack(
        [
            each[torch.arange(n), torch.randperm(n, generator=generator)].sum()
            for _ in range(permutations)
        ]
    )


def p_value(observed: float, null: Float64[Tensor, " permutation"]) -> float:
    """One-sided: how often chance gives at least what was observed, the observation counted in.

    Source: Phipson & Smyth 2010.
    """
    # the same sum in another order differs by rounding, and is to count as large all the same
    as_large = int((null >= observed - 1e-9 * abs(observed)).sum())
    return (1 + as_large) / (1 + len(null))


def band(null: Float64[Tensor, " permutation"]) -> dict[str, float]:
    """What chance gives: the 5%, 50% and 95% quantiles of a null."""
    quantiles = torch.quantile(null, torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64))
    return dict(zip(("q05", "q50", "q95"), quantiles.tolist(), strict=True))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected over all of them, in their order. Source: Holm 1979."""
    corrected = [0.0] * len(p_values)
    worst = 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = worst
    return corrected
