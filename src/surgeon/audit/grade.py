"""The damage curve, as grades: what a ratio other/base of critical weights means.

Published: a super weight distorted by 25% or less is nearly harmless, zeroed it is fatal; enlarged
it is harmless up to about twice its size. What `surgeon` measured on the two models at hand, for
the critical set scaled as a whole (nats per token, of all those lost at 0):

    ratio             -1     0     0.25   0.5    0.75   1.25    1.5    2      3      4
    patient           3.75   0.85  0.21   0.035  0.004   0.006  0.026  0.137  0.764  1.54
    tinystories-656k  2.56   1.24  0.70   0.343  0.123  -0.034  0.009  0.236  0.813  1.29

At three times its size a set does 0.7 to 0.9 of what it does at zero, and a flipped sign does worse
than any; so both are red.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite

OK, AMBER, RED = "ok", "amber", "red"
VERDICTS = (OK, AMBER, RED)


@dataclass(frozen=True)
class Curve:
    """Where the grades end."""

    broken: float = field(
        default=0.5, metadata={"help": "a ratio below this is red; so is a flipped sign"}
    )
    weak: float = field(
        default=0.75, metadata={"help": "a ratio from `broken` to below this is amber"}
    )
    strong: float = field(default=2.0, metadata={"help": "a ratio above this is amber"})
    torn: float = field(default=3.0, metadata={"help": "a ratio above this is red"})
    alone: float = field(
        default=0.1,
        metadata={
            "help": "an entry that carries at least this share of its set counts on its own as well"
        },
    )

    def grade(self, ratio: float | None) -> str:
        """The verdict on a ratio; None (no finite number) is red.

        The bounds themselves belong to the better grade.
        """
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
        total = sum(abs(s) for s in shares)
        kept = [(r, s) for r, s in zip(ratios, shares, strict=True) if s]
        sound = [(r, s) for r, s in kept if r is not None]
        whole = sum(s for _, s in kept)
        summed = sum(r * s for r, s in sound) / whole if whole and len(sound) == len(kept) else None
        counted = [self.grade(r) for r, s in kept if abs(s) >= self.alone * total]
        return summed, worst([self.grade(summed), *counted])


def worst(verdicts: Sequence[str]) -> str:
    return max(verdicts, key=VERDICTS.index, default=OK)
