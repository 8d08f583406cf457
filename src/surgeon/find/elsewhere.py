"""Vital weights wherever they lie: scales of norms, entries, rows and columns of every matrix."""

# How this works.
#
# The published super weights write a channel of the residual stream that stays high, and detection
# looks for those. A weight can be vital in other ways: the scale of a norm that reads such a
# channel, a row of the last layers, a token of the embedding. So the first-order map
# (first_order.py) estimates what every weight would cost, in one backward pass. It ranks well and
# measures badly, so its largest of each kind are zeroed one by one: first on a few windows, then,
# where that looks dear, on all probe windows. A line is dropped where one of its entries does
# nearly the same alone, and an entry where its line does much more. What is left is verified as any
# set is, on windows that neither the map nor this choice has seen, beside controls of the same
# kind.

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Int64
from torch import Tensor

from ..anatomy import Anatomy, Entry, Region
from ..progress import Tell
from .damage import Count, Damage, Variant
from .first_order import Estimate, first_order

TOKENS = 1024  # that go forward and back at once; more make the map no better and need more memory


@dataclass(frozen=True)
class Suspect:
    """A region, what the first-order map said of it, and its damage on the probe windows."""

    estimate: Estimate
    nats: float

    @property
    def part(self) -> Region:
        return self.estimate.part


def suspects(
    anatomy: Anatomy,
    windows: Int64[Tensor, "n window"],
    damage: Damage,
    most: int,
    min_nats: float,
    cover: float,
    tell: Tell,
) -> list[Suspect]:
    """The regions that cost at least `min_nats` on the probe windows, the dearest first; of a line
    and its entries those that say it best.

    damage: on these windows. most: how many estimates of each kind are measured. cover: an entry
    that does this share of its line's damage stands for the line.
    """
    several = max(1, TOKENS // windows.shape[1])
    estimates = first_order(anatomy, windows[:several], most)
    few = torch.arange(damage.looks[0])
    dear = _measured(damage, estimates, few, 0.5 * min_nats, partial(tell, "look"))
    if len(few) < len(windows):
        again = [one.estimate for one in dear]
        dear = _measured(damage, again, None, min_nats, partial(tell, "measure"))
    return _without_doubles(sorted(dear, key=lambda one: -one.nats), cover)


def _measured(
    damage: Damage,
    estimates: Sequence[Estimate],
    chosen: Int64[Tensor, " k"] | None,
    least: float,
    count: Count,
) -> list[Suspect]:
    """Those of the estimates that cost at least so much on the chosen windows."""
    variants = [Variant([one.part]) for one in estimates]
    nats = [float(one.mean()) for one in damage.of(variants, count, chosen)]
    return [Suspect(e, n) for e, n in zip(estimates, nats, strict=True) if n >= least]


def _without_doubles(ordered: Sequence[Suspect], cover: float) -> list[Suspect]:
    """Of every line and the entries in it that are suspect: the entry, where it does `cover` of the
    line's damage, else the line. Ordered by damage.
    """
    kept: list[Suspect] = []
    for one in ordered:
        rivals = [other for other in ordered if other is not one and crosses(one.part, other.part)]
        if one.part.geometry == "single":
            dropped = any(one.nats < cover * line.nats for line in rivals)
        else:
            dropped = any(
                entry.nats >= cover * one.nats
                for entry in rivals
                if entry.part.geometry == "single"
            )
        if not dropped:
            kept.append(one)
    return kept


def crosses(one: Region, other: Region) -> bool:
    """Whether two regions have an entry in common, and are not both lines that merely cross."""
    if one.site != other.site or "single" not in (one.geometry, other.geometry):
        return False
    return all(
        a is None or b is None or a == b for a, b in ((one.row, other.row), (one.col, other.col))
    )


def explained(one: Suspect, known: Collection[Entry], joint_nats: float, cover: float) -> bool:
    """Whether a set that is known already does what this region does: the region holds, or is, one
    of its entries, and costs no more than the set.
    """
    holds = any(crosses(one.part, Region(e.site, e.row, e.col)) for e in known)
    return holds and joint_nats >= cover * one.nats
