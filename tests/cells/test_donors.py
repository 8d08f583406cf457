"""Donors as replicates: exact permutation tests against scipy, and what is refused."""

from __future__ import annotations

from itertools import combinations, product

import pytest
import torch

from surgeon.cells.donors import donor_test
from surgeon.errors import BadInput, Refused


def cells(
    means: dict[tuple[str, str], float], n: int = 3
) -> tuple[torch.Tensor, list[str], list[str]]:
    """n cells around the mean of each (condition, donor), their own mean exact."""
    rows = [
        (value + shift, c, d)
        for (c, d), value in means.items()
        for shift in torch.linspace(-1, 1, n).tolist()
    ]
    return (
        torch.tensor([r[0] for r in rows], dtype=torch.float64),
        [r[1] for r in rows],
        [r[2] for r in rows],
    )


def two_sided(observed: float, rearranged: list[float]) -> float:
    above = sum(value >= observed - 1e-12 for value in rearranged)
    below = sum(value <= observed + 1e-12 for value in rearranged)
    return min(1.0, 2 * min(above, below) / len(rearranged))


def test_unpaired_donors_as_an_exact_permutation_test():
    a, b = [0.1, 0.25, 0.3, 0.2], [0.5, 0.9, 0.28, 0.7]
    means = {("healthy", f"h{i}"): v for i, v in enumerate(a)} | {
        ("ill", f"i{i}"): v for i, v in enumerate(b)
    }
    found = donor_test(*cells(means))
    everyone = a + b
    rearranged = [
        sum(chosen) / 4 - (sum(everyone) - sum(chosen)) / 4 for chosen in combinations(everyone, 4)
    ]
    assert found.statistic == pytest.approx(sum(b) / 4 - sum(a) / 4)
    assert found.p == pytest.approx(two_sided(found.statistic, rearranged))
    assert (found.design, found.rearrangements, found.smallest_p) == (
        "unpaired",
        70,
        pytest.approx(2 / 70),
    )


def test_a_donor_counts_once_whatever_its_cells():
    means = {("a", "1"): 0.1, ("a", "2"): 0.2, ("b", "3"): 0.5, ("b", "4"): 0.6}
    few, many = donor_test(*cells(means, 3)), donor_test(*cells(means, 301))
    assert few.p == many.p == pytest.approx(2 / 6)


def test_donors_with_both_conditions_are_paired():
    before, after = [0.1, 0.5, 0.9, 0.3, 0.7], [0.2, 0.65, 1.1, 0.35, 0.8]
    means = {("1 before", f"d{i}"): v for i, v in enumerate(before)} | {
        ("2 after", f"d{i}"): v for i, v in enumerate(after)
    }
    found = donor_test(*cells(means))
    differences = [b - a for a, b in zip(before, after, strict=True)]
    rearranged = [
        sum(sign * d for sign, d in zip(signs, differences, strict=True)) / 5
        for signs in product((1, -1), repeat=5)
    ]
    expected = two_sided(sum(differences) / 5, rearranged)
    assert (found.design, found.p) == ("paired", pytest.approx(expected))
    assert found.p == pytest.approx(found.smallest_p)


def test_three_stages_are_tested_together():
    means = {(f"stage {s}", f"{s}{i}"): s + 0.01 * i for s in range(3) for i in range(4)}
    found = donor_test(*cells(means), permutations=999)
    assert found.p < 0.01
    # means of 0.015, 1.015 and 2.015 nats
    assert found.measure == "standard deviation of the means"
    assert found.statistic == pytest.approx((2 / 3) ** 0.5)
    flat = {key: 0.01 * i for i, key in enumerate(sorted(means, key=lambda k: k[1][::-1]))}
    assert donor_test(*cells(flat), permutations=999).p > 0.1


@pytest.mark.parametrize(
    "means",
    [{("a", "1"): 0.1, ("b", "1"): 0.2}, {("a", "1"): 0.1, ("a", "2"): 0.2, ("b", "3"): 0.2}],
)
def test_one_donor_is_no_replicate(means: dict[tuple[str, str], float]):
    with pytest.raises(Refused, match="at least two") as refused:
        donor_test(*cells(means))
    assert refused.value.exit_status == 3


def test_one_condition_or_a_mixed_design_is_refused():
    with pytest.raises(BadInput, match="one condition"):
        donor_test(*cells({("a", "1"): 0.1, ("a", "2"): 0.2}))
    with pytest.raises(BadInput, match="several conditions"):
        donor_test(*cells({("a", "1"): 0.1, ("a", "2"): 0.2, ("b", "1"): 0.2, ("b", "3"): 0.4}))
