"""Comparisons that stop early: how often they are wrong, and how much they save."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import pytest
import torch
from scipy.stats import t as student

from surgeon.measure.intact import Sample
from surgeon.measure.sequential import ERROR, _tail, below, side, stages_of

WINDOWS = 16


def test_stages_double_and_end_with_all():
    def shape(n: int, window: int) -> list[tuple[int, int | None]]:
        return [(len(one.windows), one.tokens) for one in stages_of(n, window)]

    assert [shape(n, 24) for n in (1, 3, 4, 8)] == [
        [(1, None)],
        [(3, None)],
        [(4, None)],
        [(4, None), (8, None)],
    ]
    assert shape(4, 64) == [(4, 16), (4, None)]
    assert shape(9, 64) == [(4, 16), (8, 16), (9, 16), (9, None)]


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 8, 15, 31])
def test_the_tail_is_that_of_students_distribution(freedom: int):
    for t in (0.0, 0.3, 1.0, 4.0, 40.0):
        assert _tail(t, freedom) == pytest.approx(student.sf(t, freedom), rel=1e-6, abs=1e-12)


def taken_in_stages(
    damages: torch.Tensor, bar: float, window: int
) -> tuple[list[torch.Tensor], int]:
    """The values as `below` takes them, and how many. damages: (control, window)."""
    taken = []

    def measure(which: Sequence[int], sample: Sample) -> list[torch.Tensor]:
        taken.append(len(which) * len(sample.windows))
        return [damages[i, sample.windows] for i in which]

    values, _ = below(measure, len(damages), bar, stages_of(damages.shape[1], window))
    return values, sum(taken)


def verdicts(damages: torch.Tensor, bar: float) -> tuple[list[bool], list[bool], int]:
    """Whether each control is below the bar: as the stopped means say, and as all windows do; and
    the windows that were taken.
    """
    values, taken = taken_in_stages(damages, bar, window=24)
    stopped = [bool(one.mean() < bar) for one in values]
    return stopped, (damages.mean(1) < bar).tolist(), taken


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
    for window in (24, 64):  # of which the stages before the last read all, and the beginnings
        values, _ = taken_in_stages(damages, 1.0, window)
        assert [len(one) for one in values] == [WINDOWS] * 5
        assert [float(one.mean()) for one in values] == pytest.approx(damages.mean(1).tolist())


def test_one_above_ends_the_comparison():
    damages = torch.zeros(3, WINDOWS, dtype=torch.float64)
    damages[1] = 5.0
    taken = verdicts(damages, bar=1.0)[2]
    assert taken == 3 * 4


def test_equal_values_need_no_test():
    assert side(torch.zeros(4, dtype=torch.float64), 1.0, 1e-6) == "below"
    assert side(torch.zeros(1, dtype=torch.float64), 1.0, 1e-6) is None
