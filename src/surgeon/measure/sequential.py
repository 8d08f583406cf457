"""Comparisons that stop when they are decided: is a mean over windows below a bar?

How this works. The windows are taken in random order, and the mean is looked at after 2, 4, 8, ...
of them. At a look Student's t-test says how likely a mean on the other side of the bar would show
what was seen; the comparison is decided if that is less likely than its share of the error. The
error of a verdict is shared out evenly over its comparisons and their looks (alpha spending), so it
bounds the chance that any of them was decided wrongly, as far as the damages of the windows are not
wildly skewed. What is not decided before is measured on all windows, and then there is nothing left
to infer. tests/measure/test_sequential.py measures the error rate by simulation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import atan, cos, pi, sin, sqrt

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

FIRST_LOOK = 2
ERROR = 0.01  # of a verdict: that any of its comparisons is stopped on the wrong side


def looks_at(n: int) -> list[int]:
    """After how many of n windows a comparison is looked at.

    >>> looks_at(12)
    [2, 4, 8, 12]
    """
    looks = [FIRST_LOOK]
    while looks[-1] * 2 < n:
        looks.append(looks[-1] * 2)
    return [*looks, n] if looks[-1] < n else [n]


def below(
    measure: Callable[[Sequence[int], Int64[Tensor, " k"]], list[Float64[Tensor, " k"]]],
    many: int,
    bar: float,
    looks: Sequence[int],
    seed: int,
) -> list[Float64[Tensor, " k"]]:
    """The values of `many` things, each on as many windows as it takes to say whether its mean is
    below the bar. Once one is above, the others are not taken further.

    measure: values of the things with these numbers on the chosen windows. looks: as `looks_at`
    gives them; the last is the number of windows.
    """
    order = torch.randperm(looks[-1], generator=torch.Generator().manual_seed(seed))
    error = ERROR / (many * max(1, len(looks) - 1))
    values = [torch.empty(0, dtype=torch.float64)] * many
    undecided = list(range(many))
    done = 0
    for look in looks:
        seen = measure(undecided, order[done:look])
        for number, more in zip(undecided, seen, strict=True):
            values[number] = torch.cat([values[number], more])
        done = look
        sides = {number: side(values[number], bar, error) for number in undecided}
        undecided = [number for number, one in sides.items() if one is None]
        if "above" in sides.values() or not undecided:
            break
    return values


def side(values: Float64[Tensor, " k"], bar: float, error: float) -> str | None:
    """On which side of the bar the mean of all windows lies, "below" or "above"; None: undecided.

    error: how likely the answer may be wrong.
    """
    k = len(values)
    if k < FIRST_LOOK:
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
