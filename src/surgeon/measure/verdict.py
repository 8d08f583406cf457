"""The only place that says "vital": the rule, and what a damage is held against.

A small p-value is not enough: with enough text every weight matters a little. So a set is vital if
its damage is large in nats, large beside matched controls, unlike all of them, and above zero for
nearly every resampling of the windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..result import derived, record
from ..settings import check_values, setting

LEAST_CONTROLS = 20  # with fewer, no damage can be unlike the controls at the 5% level
ALPHA = 0.05
FATAL, SEVERE = 2.0, 0.3  # nats per token; two make a perplexity of 17 one of 126
GRADES = f"fatal from {FATAL:g} nats on, severe from {SEVERE:g}, else marginal"


@dataclass(frozen=True)
class VitalConfig:
    """What `vital` demands."""

    controls: int = setting(20, "number of matched control sets, at least 20", low=LEAST_CONTROLS)
    min_nats: float = setting(0.1, "least joint damage to be called vital, in nats per token")
    min_ratio: float = setting(
        3.0, "least joint damage as a multiple of the worst control's", group="Verdict"
    )

    def __post_init__(self) -> None:
        check_values(self)

    @property
    def criteria(self) -> str:
        """The rule, in words."""
        return (
            f"joint damage at least {self.min_nats:g} nats and {self.min_ratio:g} times the worst"
            f" of {self.controls} matched controls, p <= {ALPHA:g} against them, and a 95% interval"
            " over windows above 0"
        )

    def bar(self, joint_nats: float) -> float:
        """The damage that every control must stay below beside this joint damage."""
        return joint_nats / max(self.min_ratio, 1.0)

    def is_large(self, nats: float) -> bool:
        """Whether a damage is large enough to be vital; it is not yet, for that."""
        return nats >= self.min_nats


@record
class Controls:
    """Damage of the matched control sets, in nats per token, and how they were matched.

    windows, tokens: on how many windows each was measured, and on how many tokens of each, None
    where on all of them; not given where each was on everything.
    """

    nats: list[float]
    matched: str
    windows: list[int] | None = None
    tokens: list[int | None] | None = None

    @derived
    def n(self) -> int:
        return len(self.nats)

    @derived
    def max_nats(self) -> float:
        return max(self.nats)

    @derived
    def median_nats(self) -> float:
        return float(torch.tensor(self.nats, dtype=torch.float64).quantile(0.5))


def p_value(joint_nats: float, controls: Sequence[float]) -> float:
    """How likely a control does as much damage: (1 + those that do) / (1 + all)."""
    as_bad = sum(nats >= joint_nats for nats in controls)
    return (1 + as_bad) / (1 + len(controls))


def is_vital(
    joint_nats: float, ci95: tuple[float, float], controls: Controls, config: VitalConfig
) -> bool:
    """Whether this damage, with its 95% interval over windows, meets `config.criteria`."""
    significant = ci95[0] > 0 and p_value(joint_nats, controls.nats) <= ALPHA
    large = config.is_large(joint_nats)
    # controls that do the model good make it no easier
    beside_controls = joint_nats >= config.min_ratio * max(controls.max_nats, 0.0)
    return significant and large and beside_controls


def is_close(joint_nats: float, controls: Controls, config: VitalConfig) -> bool:
    """Whether the damage is within a tenth of one of the thresholds that decide."""
    thresholds = [config.min_nats, config.min_ratio * max(controls.max_nats, 0.0)]
    return any(0.9 * bar <= joint_nats <= 1.1 * bar for bar in thresholds if bar > 0)


def severity(low: float) -> str:
    """How bad a vital set's damage is, by the lower end of its 95% interval in nats: fatal from 2
    on, severe from 0.3 on, else marginal.

    >>> severity(9.1), severity(0.5), severity(0.11)
    ('fatal', 'severe', 'marginal')
    """
    return "fatal" if low >= FATAL else "severe" if low >= SEVERE else "marginal"
