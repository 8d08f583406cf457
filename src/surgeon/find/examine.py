"""What becomes of candidates: critical sets, or why they are none."""

# How this works.
#
# A group of channels has the entries that write them, largest contribution first. Of the layers
# that write them the fewest are kept that do `cover` of the damage of all, and of their entries the
# shortest prefix that does. The prefix is found by doubling and bisection on a sample of the probe
# windows. A contribution is no damage, so the prefix holds some entries that the others do as well
# without: each is left out, and dropped if that costs less than a tenth of the damage. What is left
# is the set. A suspect from elsewhere is one region, and its own set.
#
# Either is verified beside matched controls on windows that neither detection nor this choice has
# seen. What costs too little on the probe windows is not verified.

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..anatomy import Anatomy, Entry, Region, Site
from ..corpus import Corpus
from ..measure.intact import Sample
from ..progress import Tell
from .damage import Damage, Variant
from .detect import Candidate, Contribution, Rejection
from .elsewhere import Suspect, crosses
from .results import CriticalSet, critical_entry, entries_of_part
from .stream import damage_on
from .verify import Verification, Verifier, VerifyConfig

CHOICE_TOKENS = 256  # on which the entries of a set are chosen
LEFT_OUT_TOKENS = 128  # and on which each is left out
ASIDE_WINDOWS = 4  # on which single parts, all but one, and restored are measured
MOST_DROPPED = 16  # entries of a set of which each is tried whether it is needed
NEAR = 1.5  # a damage on a sample by so much above or below the bar tells nothing
MOST_NAMED = 3  # parts by which a rejected set is named
ORDINARY = 2  # weights of one kind and matrix that are like their controls, and then no more
NEEDED = 0.1  # share of the set's damage that goes without an entry, if the entry is needed


@dataclass
class Chain:
    """One channel and everything that writes it: the onset layer first, then layers that took over
    once that was zeroed.
    """

    first: Candidate
    links: list[Candidate]

    def contributions(self, links: int) -> list[Contribution]:
        return [c for link in self.links[:links] for c in link.contributions if c.magnitude > 0]


class Examiner:
    """Chooses entries on the probe windows, and verifies on the held-out ones."""

    def __init__(
        self,
        anatomy: Anatomy,
        probe: Tensor,
        held_out: Corpus,
        verifying: VerifyConfig,
        cover: float,
        listed: int,
        progress: Tell,
    ) -> None:
        self.anatomy, self.verifying, self.cover = anatomy, verifying, cover
        self.damage = damage_on(anatomy, probe, 0, verifying.exhaustive)
        self.verifier = Verifier(anatomy, held_out, verifying, progress, listed)
        self.few = self.damage.few(CHOICE_TOKENS)
        self.sets: list[CriticalSet] = []
        self.rejected: list[Rejection] = []
        self.taken: list[Region] = []  # the largest estimates of each matrix, which are no controls

    def base_nll(self) -> float:
        """Of the intact model on all windows."""
        return float(torch.cat([self.damage.base, self.verifier.damage.base]).mean())

    def accepts(self, group: Sequence[Chain]) -> bool:
        """Whether the group holds a critical set, which is kept; else the reason is."""
        outcome = self._examined(group)
        if isinstance(outcome, Rejection):
            self.rejected.append(outcome)
            return False
        self.sets.append(outcome)
        return True

    def _examined(self, group: Sequence[Chain]) -> CriticalSet | Rejection:
        """The smallest set of the group's entries that covers the effect, verified; or why it is no
        critical set.
        """
        first = group[0].first
        where = ", ".join(f"L{chain.first.layer} channel {chain.first.channel}" for chain in group)
        height = max(chain.first.height for chain in group)
        ordered = self._writers(group)
        if not ordered:
            why = "no entry contributes a measurable share of the channel's write"
            return Rejection(where, why, height=height, entries=0)

        curve = _Curve(self.damage, ordered, self.few, self.damage.few(LEFT_OUT_TOKENS))
        full = max(curve.at(1, min(16, len(ordered)), len(ordered)))
        least = self.verifying.min_nats
        if least / NEAR <= full < least * NEAR:  # what is near the bar is measured on everything
            full = curve.whole()
        if not self.verifying.is_large(full):
            why = f"zeroing every entry that writes it costs less than {least:g} nats"
            where = f"{where} ({ordered[0].entry})"
            return Rejection(where, why, height, entries=len(ordered), joint_nats=full)

        chosen = [ordered[k] for k in curve.smallest(self.cover)]
        full = max(curve.known.values())
        verified = self._verified([_region(c.entry) for c in chosen])
        if isinstance(verified, Rejection):
            where = f"{where} ({ordered[0].entry})"
            return replace(verified, entry=where, height=height, entries=len(ordered))
        return CriticalSet.of(
            verified,
            [critical_entry(self.anatomy, c.entry, c.share) for c in chosen],
            size=len(chosen),
            full_nats=full,
            full_size=len(ordered),
            channels=[chain.first.channel for chain in group],
            heights=[chain.first.heights for chain in group],
            agreement=first.agreement,
        )

    def _writers(self, group: Sequence[Chain]) -> list[Contribution]:
        """The entries of the fewest layers that cover the effect of all that write these channels,
        largest contribution first.
        """
        most = max(len(chain.links) for chain in group)
        upto = [
            sorted(
                (c for chain in group for c in chain.contributions(n)), key=lambda c: -c.magnitude
            )
            for n in range(1, most + 1)
        ]
        if most == 1 or not upto[0]:
            return upto[-1]
        variants = [Variant([_region(c.entry) for c in entries]) for entries in upto]
        nats = [float(d.mean()) for d in self.damage.of(variants, sample=self.few)]
        return next(
            entries
            for entries, loss in zip(upto, nats, strict=True)
            # the second where zeroing does the model good, so that a share of it is above the whole
            if loss >= min(self.cover * max(nats), max(nats))
        )

    def weigh(self, suspects: Sequence[Suspect], most: int) -> None:
        """Verify suspects, dearest first, until there are `most` sets; say of the others what they
        cost on the sample.
        """
        ordinary: Counter[tuple[Site, str]] = Counter()  # of a kind, those like their controls
        for one in suspects:
            # half of the bar: beginnings of windows can show less than the whole
            if not self.verifying.is_large(2 * one.nats):
                continue
            if any(self._explains(known, one) for known in self.sets):
                continue
            kind = (one.part.site, one.kind)
            why = self._why_not(one, most, ordinary[kind])
            if why is not None:
                why = f"{why}; measured on a sample"
                self.rejected.append(Rejection(str(one.part), why, joint_nats=one.nats))
                continue
            verified = self._verified([one.part])
            if isinstance(verified, Rejection):
                self.rejected.append(verified)
                ordinary[kind] += verified.control_max_nats is not None
            else:
                entries, size = entries_of_part(self.anatomy, one.part)
                self.sets.append(CriticalSet.of(verified, entries, size, one.nats, size))

    def _why_not(self, one: Suspect, most: int, ordinary: int) -> str | None:
        """Why a suspect is not verified; None if it is to be. ordinary: how many dearer ones of its
        kind and matrix were like their controls.
        """
        if one.kind == "token":
            return "it is of one token, and costs what the places cost where that token stands"
        for known in self.sets:
            for scale in _scales_read_by(one, known):
                return f"it reads what {scale} scales, which is a set"
        if len(self.sets) >= most:
            return f"not verified: {most} dearer sets were (‹sets›)"
        if ordinary >= ORDINARY:
            return (
                f"not verified: {ORDINARY} dearer {one.kind}s of the same matrix did not stand out"
                " from their controls"
            )
        return None

    def _explains(self, known: CriticalSet, suspect: Suspect) -> bool:
        """Whether a set does already what this region does: the region holds, or is, one of its
        parts, and costs no more than the set.
        """
        meets = any(part == suspect.part or crosses(part, suspect.part) for part in known.parts)
        return meets and known.damage.full_nats >= self.cover * suspect.nats

    def _verified(self, parts: Sequence[Region]) -> Verification | Rejection:
        """The verification of a vital set; or why it is none."""
        where = ", ".join(map(str, parts[:MOST_NAMED]))
        verifier = self.verifier
        if verifier.stops_early and not self.verifying.is_large(verifier.joint(parts)):
            why = (
                f"zeroing it costs less than {self.verifying.min_nats:g} nats on the windows that"
                " verify"
            )
            return Rejection(where, why, joint_nats=verifier.joint(parts))
        # whole windows, since these numbers stand beside the joint damage of whole windows
        some = torch.arange(min(ASIDE_WINDOWS, len(verifier.damage.base)))
        aside_on = Sample(some) if verifier.stops_early else None
        verified = verifier(parts, aside_on, self.taken)
        if verified.vital:
            return verified
        return Rejection(
            where,
            "the damage does not stand out from its matched controls",
            joint_nats=verified.joint_nats,
            control_max_nats=verified.controls.max_nats,
            control_median_nats=verified.controls.median_nats,
        )


def _scales_read_by(one: Suspect, known: CriticalSet) -> list[Region]:
    """The scales of norms in a set that the columns of this matrix read, in the same layer."""
    return [
        part
        for part in known.parts
        if part.site.role.startswith("norm.")
        and part.site.layer == one.part.site.layer
        and one.kind == "column"
        and part.row == one.part.col
    ]


class _Curve:
    """Damage of the first k entries on a sample, each k measured once."""

    def __init__(
        self, damage: Damage, ordered: Sequence[Contribution], few: Sample, fewer: Sample
    ) -> None:
        self.damage, self.few, self.fewer = damage, few, fewer
        self.regions = [_region(c.entry) for c in ordered]
        self.known: dict[int, float] = {}

    def at(self, *sizes: int) -> list[float]:
        unknown = [k for k in dict.fromkeys(sizes) if k not in self.known]
        self.known |= dict(zip(unknown, self._of([range(k) for k in unknown]), strict=True))
        return [self.known[k] for k in sizes]

    def _of(self, choices: Sequence[Sequence[int]], sample: Sample | None = None) -> list[float]:
        variants = [Variant([self.regions[k] for k in chosen]) for chosen in choices]
        damages = self.damage.of(variants, sample=sample or self.few)
        return [float(d.mean()) for d in damages]

    def whole(self) -> float:
        """Damage of all entries on all windows."""
        return float(self.damage(self.regions).mean())

    def smallest(self, cover: float) -> list[int]:
        """Few entries that keep about `cover` of the damage of all: the shortest prefix that does,
        less what the others do as well without.
        """
        (full,) = self.at(len(self.regions))
        high = 1
        while high < len(self.regions) and self.at(high)[0] < min(cover * full, full):
            high = min(2 * high, len(self.regions))
        low = high // 2
        full = max(full, *self.known.values())  # less than all may do more
        enough = min(cover * full, full)  # full itself where zeroing does the model good
        # to a sixteenth: the last entries of a long prefix tell little, and each step is a pass
        while high - low > max(1, high // 16):
            middle = (low + high) // 2
            low, high = (low, middle) if self.at(middle)[0] >= enough else (middle, high)
        return self._needed(list(range(high)))

    def _needed(self, chosen: list[int]) -> list[int]:
        """The entries less those that cost little to leave out, the least needed first; together
        they may cost no more than one may.

        Of a long set none is dropped: its entries each do little, and each step is a pass.
        """
        if not 1 < len(chosen) <= MOST_DROPPED:
            return chosen
        rests = [[k for k in chosen if k != left_out] for left_out in chosen]
        joint, *without = self._of([chosen, *rests], self.fewer)
        enough = (1 - NEEDED) * joint
        by_need = sorted(zip(without, chosen, strict=True), reverse=True)
        for nats, left_out in by_need:
            rest = [k for k in chosen if k != left_out]
            if nats < enough or not rest:
                break
            if len(rest) < len(by_need) - 1 and self._of([rest], self.fewer)[0] < enough:
                continue
            chosen = rest
        return chosen


def _region(entry: Entry) -> Region:
    return Region(entry.site, entry.row, entry.col)
