"""Comparisons that stop early: how often they are wrong, and how much they save."""

from __future__ import annotations

from math import sqrt

import pytest
import torch
from scipy.stats import t as student

from surgeon.measure.sequential import ERROR, _tail, below, looks_at, side

WINDOWS = 16


def test_looks_double_and_end_with_all():
    assert [looks_at(n) for n in (1, 2, 3, 8, 9)] == [[1], [2], [2, 3], [2, 4, 8], [2, 4, 8, 9]]


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 8, 15, 31])
def test_the_tail_is_that_of_students_distribution(freedom: int):
    for t in (0.0, 0.3, 1.0, 4.0, 40.0):
        assert _tail(t, freedom) == pytest.approx(student.sf(t, freedom), rel=1e-6, abs=1e-12)


def verdicts(damages: torch.Tensor, bar: float) -> tuple[list[bool], list[bool], int]:
    """Whether each control is below the bar: as the stopped means say, and as all windows do; and
    the windows that were taken. damages: (control, window).
    """
    values = below(
        lambda which, chosen: [damages[i, chosen] for i in which],
        len(damages),
        bar,
        looks_at(damages.shape[1]),
        seed=0,
    )
    stopped = [bool(one.mean() < bar) for one in values]
    return stopped, (damages.mean(1) < bar).tolist(), sum(map(len, values))


@pytest.mark.parametrize("spread", ["normal", "skewed"])
def test_a_stopped_verdict_is_rarely_wrong(spread: str):
    """20 controls near the bar, 400 times: the verdict is whether all are below it."""
    generator = torch.Generator().manual_seed(0)
    wrong = 0
    for _ in range(400):
        noise = torch.randn(20, WINDOWS, generator=generator, dtype=torch.float64)
        if spread == "skewed":
            noise = (0.5 * noise).exp() - (0.125 * torch.ones(())).exp()
        middle = torch.rand(20, 1, generator=generator, dtype=torch.float64)  # of the bar
        damages = middle + noise / sqrt(WINDOWS)
        stopped, truth, _ = verdicts(damages, bar=1.0)
        wrong += all(stopped) != all(truth)
    assert wrong <= 2 * ERROR * 400


def test_small_controls_take_few_windows():
    """As they mostly are: a thousandth of the set's damage."""
    generator = torch.Generator().manual_seed(0)
    damages = 1e-3 * torch.randn(20, WINDOWS, generator=generator, dtype=torch.float64)
    stopped, truth, taken = verdicts(damages, bar=1.0)
    assert stopped == truth == [True] * 20
    assert taken <= 20 * 4


def test_what_is_near_the_bar_is_measured_on_all():
    generator = torch.Generator().manual_seed(1)
    damages = 1.0 + torch.randn(5, WINDOWS, generator=generator, dtype=torch.float64)
    values = below(
        lambda which, chosen: [damages[i, chosen] for i in which], 5, 1.0, looks_at(WINDOWS), 0
    )
    assert [len(one) for one in values] == [WINDOWS] * 5
    assert [float(one.mean()) for one in values] == pytest.approx(damages.mean(1).tolist())


def test_one_above_ends_the_comparison():
    damages = torch.zeros(3, WINDOWS, dtype=torch.float64)
    damages[1] = 5.0
    taken = verdicts(damages, bar=1.0)[2]
    assert taken == 3 * 2


def test_equal_values_need_no_test():
    assert side(torch.zeros(4, dtype=torch.float64), 1.0, 1e-6) == "below"
    assert side(torch.zeros(1, dtype=torch.float64), 1.0, 1e-6) is None
