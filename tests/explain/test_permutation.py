"""The permutation tests on data whose truth is known."""

import pytest
import torch

from surgeon.explain import document_null, holm, p_value, stratified_test

UNITS, STRATA = 240, 8


def p_of(sums, sizes, labels, strata, seed=0):
    observed, null = stratified_test(
        sums, sizes, labels, strata, 2, 99, torch.Generator().manual_seed(seed)
    )
    return p_value(float(observed[1]), null[:, 1])


def simulated(seed, effect=0.0):
    """Strata differ in level, the label is dealt unevenly over the strata (as the words of one
    article are), units differ in size.
    """
    g = torch.Generator().manual_seed(seed)
    strata = torch.arange(UNITS) % STRATA
    level = torch.randn(STRATA, generator=g, dtype=torch.float64) * 2
    labels = (torch.rand(UNITS, generator=g) < 0.1 + 0.8 * (strata == level.argmax())).long()
    sizes = torch.randint(1, 9, (UNITS,), generator=g).double()
    word = torch.randn(UNITS, generator=g, dtype=torch.float64)  # all tokens of a unit share it
    return sizes * (level[strata] + word + effect * labels), sizes, labels, strata


@pytest.mark.slow
def test_p_is_uniform_when_there_is_no_effect():
    p = torch.tensor([p_of(*simulated(seed), seed) for seed in range(300)], dtype=torch.float64)
    distance = (p.sort().values - torch.arange(1, 301) / 300).abs().max()
    assert distance < 1.63 / 300**0.5  # Kolmogorov-Smirnov at 1%
    assert (p <= 0.05).double().mean() < 0.09


def test_without_strata_the_same_data_look_significant():
    naive = [
        p_of(sums, sizes, labels, torch.zeros_like(strata), s)
        for s in range(40)
        for sums, sizes, labels, strata in [simulated(s)]
    ]
    assert sum(p <= 0.05 for p in naive) > 30


def test_p_is_small_when_an_effect_was_planted():
    assert all(p_of(*simulated(seed, effect=1.5), seed) <= 0.02 for seed in range(10))


def test_labels_stay_in_their_stratum():
    sums, strata = torch.arange(6, dtype=torch.float64), torch.tensor([0, 0, 0, 1, 1, 1])
    labels = torch.tensor([1, 0, 0, 0, 0, 0])
    observed, null = stratified_test(
        sums, torch.ones(6, dtype=torch.float64), labels, strata, 2, 200, torch.Generator()
    )
    assert observed.tolist() == [0.2, -1]
    assert set(null[:, 1].tolist()) == {-1.0, 0.0, 1.0}
    assert null.shape == (200, 2)


def test_documents_change_places_whole():
    weights = torch.tensor([[2.0, 2.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    means = torch.tensor([[4.0, 2.0], [0.0, 2.0], [1.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    null = document_null(weights, means, 400, torch.Generator().manual_seed(0))
    assert set(null.tolist()) == {3.0, 1.0, 0.0}
    assert p_value(3.0, null) == pytest.approx(0.25, abs=0.07)


def test_holm():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
    assert p_value(1.0, torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)) == 0.75


def test_levels_of_the_strata_do_not_come_in_by_the_size_of_the_units():
    """All of a stratum alike: whoever gets the label, nothing exceeds its stratum."""
    sizes, strata = (
        torch.tensor([9.0, 1.0, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64),
        torch.tensor([0, 0, 0, 1, 1, 1]),
    )
    observed, null = stratified_test(
        sizes * torch.tensor([5.0, 5, 5, 1, 1, 1]),
        sizes,
        torch.tensor([1, 0, 0, 1, 0, 0]),
        strata,
        2,
        50,
        torch.Generator(),
    )
    assert observed.abs().max() < 1e-12
    assert null.abs().max() < 1e-12
