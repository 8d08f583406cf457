"""Vital weights wherever they lie: scales of norms, entries, rows and columns of every matrix."""

# How this works.
#
# The published super weights write a channel of the residual stream that stays high, and detection
# looks for those. A weight can be vital in other ways: the scale of a norm that reads such a
# channel, a row of the last layers, a token of the embedding. So every weight gets an estimate of
# what it would cost (estimates.py), and the largest of each kind are zeroed one by one on a small
# sample, the dearest of them again on a larger one.
# Two lines that are one thing are measured once: a tied weight has two names, and a neuron dies by
# its column of `mlp.down` as by its row of `mlp.up`. Of a line and an entry in it the one is kept
# that says it best. What is left is verified as any set is, on windows that neither the estimate
# nor this choice has seen, beside controls of the same kind.

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from math import isclose

from jaxtyping import Int64
from torch import Tensor

from ..anatomy import Anatomy, Region, Site
from ..progress import Tell
from ..result import record
from .damage import Count, Damage, Variant
from .estimates import KINDS, TOKENS, Estimate, estimates

FIRST_TOKENS, LOOK_TOKENS = 64, 256  # on which all are measured, and then the dearest
DEAREST = 24
SAME = 1e-3  # estimates of two lines that differ by less are of one thing
ORDER = {
    "scale": 0,
    "column": 1,
    "row": 2,
    "token": 3,
    "entry": 4,
}  # which of two names of one thing is kept


@record
class Suspect:
    """A region, what was estimated of it, and its measured damage on a sample, in nats per token.

    first, bend: the terms of the estimate, see estimates.py.
    """

    part: Region
    kind: str
    first: float
    bend: float
    nats: float


def estimated(anatomy: Anatomy, windows: Int64[Tensor, "n window"], tell: Tell) -> list[Estimate]:
    """The largest estimates of each matrix, on the beginnings of the windows."""
    tell("estimate", 0, 1)
    width = min(windows.shape[1], max(2, TOKENS // len(windows)))
    return estimates(anatomy, windows[:, :width])


def suspects(
    anatomy: Anatomy, everything: Sequence[Estimate], damage: Damage, most: int, tell: Tell
) -> list[Suspect]:
    """The `most` weights of each kind with the largest estimates, measured; dearest first."""
    named = _once(
        anatomy,
        [e for kind in KINDS for e in [e for e in everything if e.kind == kind][:most]],
    )
    first = _measured(named, damage, FIRST_TOKENS, partial(tell, "look"))
    dearest = _measured(first[:DEAREST], damage, LOOK_TOKENS, partial(tell, "look again"))
    return [*dearest, *first[DEAREST:]]


def _measured(
    named: Sequence[Estimate | Suspect], damage: Damage, tokens: int, count: Count
) -> list[Suspect]:
    """What each costs on a sample, dearest first."""
    damages = damage.of([Variant([one.part]) for one in named], count, damage.few(tokens))
    measured = [
        Suspect(one.part, one.kind, one.first, one.bend, float(nats.mean()))
        for one, nats in zip(named, damages, strict=True)
    ]
    return sorted(measured, key=lambda one: -one.nats)


def _once(anatomy: Anatomy, named: Iterable[Estimate]) -> list[Estimate]:
    """Each thing under one of its names."""
    kept: list[Estimate] = []
    tied = bool(anatomy.tied_to(Site(None, "embed")))
    for one in sorted(named, key=lambda one: ORDER[one.kind]):
        part = _untied(one.part) if tied else one.part
        if any(other.part == part or _is_same(one, other) for other in kept):
            continue
        is_line = one.kind in ("row", "column")
        kind = part.geometry if is_line else one.kind  # the embedding is the head transposed
        kept.append(Estimate(part, kind, one.first, one.bend))
    return kept


def _untied(part: Region) -> Region:
    """A part of an output head that is the embedding, under the embedding's name."""
    if part.site.role != "unembed":
        return part
    return Region(Site(None, "embed"), part.col, part.row)


def _is_same(one: Estimate, other: Estimate) -> bool:
    return one.part.site != other.part.site and all(
        isclose(a, b, rel_tol=SAME) and a != 0
        for a, b in ((one.first, other.first), (one.bend, other.bend))
    )


def without_doubles(ordered: Sequence[Suspect], cover: float) -> list[Suspect]:
    """Of every line and the entries in it: the entry, where it does `cover` of the line's damage,
    else the line.
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
