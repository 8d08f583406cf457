"""The damage curve, as grades: what a ratio other/base of critical weights means.

Published: a super weight distorted by 25% or less is nearly harmless, zeroed it is fatal; enlarged
it is harmless up to about twice its size. What `surgeon` measured on the two models at hand, for
the critical set scaled as a whole (nats per token, of all those lost at 0):

    ratio             -1     0     0.25   0.5    0.75   1.25    1.5    2      3      4
    patient           3.75   0.85  0.21   0.035  0.004   0.006  0.026  0.137  0.764  1.54
    tinystories-656k  2.56   1.24  0.70   0.343  0.123  -0.034  0.009  0.236  0.813  1.29

At three times its size a set does 0.7 to 0.9 of what it does at zero, and a flipped sign does worse
than any; so both are red.

How this works. A ratio is graded by the bounds of a `Curve`, which were set by that table. Entries
that are vital together write one sum, and a compression may round the small ones of them to zero
without harm; so of a set the ratio of that sum is graded, each entry with its share. But a sum can
stay while two large entries change against one another, so an entry that carries much of it is
graded by itself, too, and the worst verdict is that of the set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

from ..errors import BadInput
from ..settings import setting

OK, AMBER, RED = "ok", "amber", "red"
VERDICTS = (OK, AMBER, RED)


@dataclass(frozen=True)
class Curve:
    """Where the grades end; a bound itself belongs to the better grade.

    >>> Curve().grade(0.6)
    'amber'
    """

    broken: float = setting(
        0.5, "a ratio below this is red; so is a flipped sign", low=0, group="Grades"
    )
    weak: float = setting(
        0.75, "a ratio from the bound of red to below this is amber", low=0, group="Grades"
    )
    strong: float = setting(2.0, "a ratio above this is amber", low=0, group="Grades")
    torn: float = setting(3.0, "a ratio above this is red", low=0, group="Grades")
    alone: float = setting(
        0.1,
        "an entry that carries at least this share of its set counts on its own as well",
        low=0,
        high=1,
        group="Grades",
    )

    def __post_init__(self) -> None:
        if not self.broken <= self.weak <= self.strong <= self.torn:
            raise BadInput(
                f"‹broken› {self.broken:g}, ‹weak› {self.weak:g}, ‹strong› {self.strong:g} and"
                f" ‹torn› {self.torn:g} must stand in this order, none above the next."
            )

    @property
    def criteria(self) -> str:
        """The rule, in words."""
        return (
            f"a ratio from {self.weak:g} to {self.strong:g} is ok, from {self.broken:g} to"
            f" {self.torn:g} amber, any other red; of a set it is what is left of its sum, and an"
            f" entry that carries {self.alone:.0%} of it or more counts on its own as well"
        )

    def grade(self, ratio: float | None) -> str:
        """The verdict on a ratio; None (no finite number) is red."""
        if ratio is None or not isfinite(ratio) or ratio < self.broken or ratio > self.torn:
            return RED
        return AMBER if ratio < self.weak or ratio > self.strong else OK

    def of_set(
        self, ratios: Sequence[float | None], shares: Sequence[float]
    ) -> tuple[float | None, str]:
        """What is left of the set's summed contribution, and the verdict: the worst of that and of
        the entries that carry much of it.

        shares: what each entry contributes, in any unit; only their proportions count. An entry of
        a large set may well be rounded to zero while the sum stays what it was; one that carries a
        tenth may not.
        """
        carrying = [(r, share) for r, share in zip(ratios, shares, strict=True) if share]
        sizes = sum(abs(share) for _, share in carrying)
        whole = sum(share for _, share in carrying)
        finite = [r * share for r, share in carrying if r is not None]
        left = sum(finite) / whole if whole and len(finite) == len(carrying) else None
        strong = [r for r, share in carrying if abs(share) >= self.alone * sizes]
        return left, worst([self.grade(ratio) for ratio in (left, *strong)])


def worst(verdicts: Sequence[str]) -> str:
    return max(verdicts, key=VERDICTS.index, default=OK)
