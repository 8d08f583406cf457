"""Comparisons that stop when they are decided: is a mean over windows below a bar?

How this works. The windows are taken in random order, and the mean is looked at in stages: on the
first tokens of 4, 8, 16, ... windows (of windows that are short anyway: on the whole of them). At a
stage Student's t-test says how likely a mean on the other side of the bar would show what was seen;
the comparison is decided if that is less likely than its share of the error. The error of a verdict
is shared out evenly over its comparisons and their stages (alpha spending), so it bounds the chance
that any of them was decided wrongly, as far as the damages of the windows are not wildly skewed.
What is not decided before is measured on all tokens, and then there is nothing left to infer.
tests/measure/test_sequential.py measures the error rate by simulation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import atan, cos, inf, pi, sin, sqrt

import torch
from jaxtyping import Float64
from torch import Tensor

from .intact import Sample

FIRST_STAGE = 4  # windows
BEGINNING = 16  # tokens of a window that a stage before the last reads
ERROR = 0.01  # of a verdict: that any of its comparisons is stopped on the wrong side


def stages_of(n: int, window: int, seed: int = 0) -> list[Sample]:
    """What a comparison is looked at on, one after another; the last is all of the n windows.

    >>> [(len(one.windows), one.tokens) for one in stages_of(12, 128)]
    [(4, 16), (8, 16), (12, 16), (12, None)]
    >>> [(len(one.windows), one.tokens) for one in stages_of(12, 24)]
    [(4, None), (8, None), (12, None)]
    """
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    sizes = [FIRST_STAGE]
    while sizes[-1] < n:
        sizes.append(min(2 * sizes[-1], n))
    if sizes[-1] > n:
        return [Sample(torch.arange(n))]
    is_long = window >= 2 * BEGINNING
    early = [Sample(order[:k], BEGINNING if is_long else None) for k in sizes]
    return [*(early if is_long else early[:-1]), Sample(torch.arange(n))]


def below(
    measure: Callable[[Sequence[int], Sample], list[Float64[Tensor, " k"]]],
    many: int,
    bar: float,
    stages: Sequence[Sample],
    hopeless: float = inf,
) -> tuple[list[Float64[Tensor, " k"]], list[Sample]]:
    """The values of `many` things by window, each in as many stages as it takes to say whether its
    mean is below the bar, and the stage of each. Once one is above, the others are not taken
    further.

    measure: values of the things with these numbers on a sample. hopeless: a mean at a stage from
    which on it is taken to be above the bar, without a test.
    """
    error = ERROR / (many * max(1, len(stages) - 1))
    values = [torch.empty(0, dtype=torch.float64)] * many
    used = [stages[0]] * many
    undecided = list(range(many))
    before: Sample | None = None
    for stage in stages:
        fresh = stage.windows
        if before is not None and before.tokens == stage.tokens:
            fresh = fresh[~torch.isin(fresh, before.windows)]
        seen = measure(undecided, Sample(fresh, stage.tokens))
        old = len(stage.windows) - len(fresh)
        for number, more in zip(undecided, seen, strict=True):
            values[number] = torch.cat([values[number][:old], more])
            used[number] = stage
        if stage is stages[-1]:
            break
        sides = {number: side(values[number], bar, error) for number in undecided}
        undecided = [number for number, one in sides.items() if one is None]
        worst = max(float(one.mean()) for one in values)
        if "above" in sides.values() or worst >= hopeless or not undecided:
            break
        before = stage
    return values, used


def side(values: Float64[Tensor, " k"], bar: float, error: float) -> str | None:
    """On which side of the bar the mean of all windows lies, "below" or "above"; None: undecided.

    error: how likely the answer may be wrong.
    """
    k = len(values)
    if k < 2:
        return None
    away = float(values.mean()) - bar
    spread = float(values.std()) / sqrt(k)
    if spread > 0 and _tail(abs(away) / spread, k - 1) > error:
        return None
    return "above" if away > 0 else "below"


def _tail(t: float, freedom: int) -> float:
    """P(T > t) of Student's distribution, t >= 0. Source: Abramowitz and Stegun, 26.7.3-4."""
    angle = atan(t / sqrt(freedom))
    odd = freedom % 2
    term = cos(angle) if odd else 1.0
    total = term if freedom > 1 else 0.0
    for power in range(2 + odd, freedom - 1, 2):
        term *= cos(angle) ** 2 * (power - 1) / power
        total += term
    inside = 2 / pi * (angle + sin(angle) * total) if odd else sin(angle) * total
    return (1 - inside) / 2
