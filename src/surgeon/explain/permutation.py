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
    """By how much each group exceeds its strata per token, and the same by chance.

    A unit is a bundle of tokens that stays together, with the `sums` of their values and their
    number in `sizes`. By chance: labels are dealt anew among the units of each stratum. The test is
    exact whatever the values are, as long as the units of one stratum could change places.

    Values are taken from the mean of their stratum: a label that moves to a larger unit would else
    give its stratum more weight, and differences between strata would come in again.
    """
    level = torch.bincount(strata, sums) / torch.bincount(strata, sizes).clamp_min(1)
    excess = sums - sizes * level[strata]

    def means(order: Tensor, labels_in_order: Tensor) -> Tensor:
        total = torch.bincount(labels_in_order, excess[order], groups)
        return total / torch.bincount(labels_in_order, sizes[order], groups)

    by_stratum = strata.argsort()
    labels_in_order = labels[by_stratum]
    null = torch.empty(permutations, groups, dtype=torch.float64)
    for i in range(permutations):
        # a random order within each stratum, the strata in order
        keys = strata + torch.rand(len(strata), generator=generator, dtype=torch.float64)
        null[i] = means(keys.argsort(), labels_in_order)
    return means(by_stratum, labels_in_order), null


def naive_null(
    values: Float64[Tensor, " token"],
    labels: Int64[Tensor, " token"],
    groups: int,
    permutations: int,
    generator: torch.Generator,
) -> Float64[Tensor, "permutation group"]:
    """The mean of each group when its tokens are drawn from anywhere.

    This is what a bare ranking takes for granted.
    """
    sizes = torch.bincount(labels, minlength=groups).clamp_min(1)
    null = torch.empty(permutations, groups, dtype=torch.float64)
    for i in range(permutations):
        shuffled = labels[torch.randperm(len(labels), generator=generator)]
        null[i] = torch.bincount(shuffled, values, groups) / sizes
    return null


def document_null(
    weights: Float64[Tensor, "document class"],
    means: Float64[Tensor, "document class"],
    permutations: int,
    generator: torch.Generator,
) -> Float64[Tensor, " permutation"]:
    """The weighted mean of `means` when whole documents change places.

    Each document keeps its profile of weights and gets another's values.
    """
    # contribution[d, e]: of document d with the values of document e
    contribution = weights @ means.T / weights.sum()
    documents = torch.arange(len(weights))
    null = torch.empty(permutations, dtype=torch.float64)
    for i in range(permutations):
        other = torch.randperm(len(weights), generator=generator)
        null[i] = contribution[documents, other].sum()
    return null


def p_value(observed: float, null: Float64[Tensor, " permutation"]) -> float:
    """One-sided: how often chance gives at least what was observed, the observation counted in.

    Source: Phipson & Smyth 2010.

    >>> p_value(3.0, torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    0.5
    """
    # rounding may leave the observed arrangement a little below itself
    as_large = int((null >= observed - 1e-9 * abs(observed)).sum())
    return (1 + as_large) / (1 + len(null))


def band(null: Float64[Tensor, " permutation"]) -> dict[str, float]:
    """What chance gives: the 5%, 50% and 95% quantiles of a null."""
    quantiles = torch.quantile(null, torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64))
    return dict(zip(("q05", "q50", "q95"), quantiles.tolist(), strict=True))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected over all of them, in their order. Source: Holm 1979.

    >>> holm([0.5, 0.01, 0.02])
    [0.5, 0.03, 0.04]
    """
    n = len(p_values)
    corrected = [0.0] * n
    worst = 0.0
    ascending = sorted(range(n), key=lambda i: p_values[i])
    for rank, i in enumerate(ascending):
        # never below a smaller one's, so that the order of the p-values is kept
        worst = max(worst, min(1.0, (n - rank) * p_values[i]))
        corrected[i] = worst
    return corrected
