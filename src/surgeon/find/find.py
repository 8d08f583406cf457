"""Find critical sets: detect, zero, look again; then the smallest set that covers the effect,
verified on unseen windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..anatomy import Anatomy, Entry, Region
from ..corpus import Corpus
from ..errors import BadInput
from .damage import Damage, Variant, zeroed
from .detect import Candidate, Contribution, DetectConfig, Detection, Rejection, detect
from .stream import damage_on
from .verify import Progress, Verification, VerifyConfig, verify


@dataclass(frozen=True)
class FindConfig:
    """Settings of the search."""

    detect: DetectConfig = field(default_factory=DetectConfig)
    verify: VerifyConfig = field(default_factory=VerifyConfig)
    probe_windows: int = field(
        default=8,
        metadata={"help": "windows for detection and for choosing the set; the others verify it"},
    )
    rounds: int = field(
        default=4, metadata={"help": "how often to zero what was accepted and look again"}
    )
    channels: int = field(default=6, metadata={"help": "most channels examined"})
    cover: float = field(
        default=0.8, metadata={"help": "share of the effect that the smallest set must keep"}
    )
    listed: int = field(
        default=16,
        metadata={
            "help": "entries, strongest first, whose single and leave-one-out damage is measured"
        },
    )


@dataclass(frozen=True)
class CriticalSet:
    """Entries that are vital together.

    `full_nats` is the damage of every entry that writes the channels, on the probe windows.
    """

    entries: list[Contribution]
    weights: list[float]
    ranks: list[int]
    channels: list[int]
    heights: list[list[float]]  # of each channel, by layer
    layer: int
    agreement: float
    verification: Verification
    full_nats: float
    full_size: int

    @property
    def geometry(self) -> str:
        return geometry([c.entry for c in self.entries])

    def to_json(self) -> dict[str, Any]:
        v = self.verification
        return {
            "geometry": self.geometry,
            "channels": self.channels,
            "heights": self.heights,
            "agreement": self.agreement,
            "entries": [
                {
                    "entry": str(c.entry),
                    "layer": c.entry.site.layer,
                    "row": c.entry.row,
                    "col": c.entry.col,
                    "expert": c.entry.site.expert,
                    "weight": weight,
                    "share": c.share,
                    "rank_abs": rank,
                }
                for c, weight, rank in zip(self.entries, self.weights, self.ranks, strict=True)
            ],
            "damage": {
                "joint_nats": v.joint,
                "single_nats": v.single,
                "leave_one_out_nats": v.leave_one_out,
                "ci95": list(v.ci95),
                "p_value": v.p_value,
                "restored_nats": v.restored,
                "full_nats": self.full_nats,
                "full_size": self.full_size,
            },
            "controls": v.controls.to_json(),
            "vital": v.vital,
            "criteria": v.criteria,
        }


@dataclass(frozen=True)
class FindResult:
    """What was found, and with what numbers the rest was rejected."""

    sets: list[CriticalSet]
    rejected: list[Rejection]
    bar: float
    heights: list[float]
    base_nll: float
    corpus: Corpus

    @property
    def verdict(self) -> str:
        return "found" if any(s.verification.vital for s in self.sets) else "none"

    def to_json(self) -> dict[str, Any]:
        return {
            "corpus": self.corpus.to_json(),
            "verdict": self.verdict,
            "sets": [s.to_json() for s in self.sets],
            "rejected": [r.to_json() for r in self.rejected],
            "detection": {"bar": self.bar, "heights": self.heights, "base_nll": self.base_nll},
        }


def find(
    anatomy: Anatomy,
    corpus: Corpus,
    config: FindConfig = FindConfig(),
    progress: Progress | None = None,
) -> FindResult:
    """Critical sets of the model on this corpus. "None" is a result: `rejected` says what was seen
    and why it is not vital.

    The first `probe_windows` windows detect channels and choose entries; damage and controls are
    measured on the rest.
    Raises: BadInput if the corpus has fewer than two windows.
    """
    n = len(corpus.windows)
    if n < 2:
        raise BadInput(
            f"{corpus.name} gives {n} window; find needs at least 2, one to look and one to verify."
            " Use more text or a smaller --window."
        )
    cut = min(config.probe_windows, n // 2)
    probe, held_out = corpus.windows[:cut], Corpus(corpus.name, corpus.windows[cut:], corpus.bos)
    first, found = _chains(anatomy, probe, config, progress)
    damage = damage_on(anatomy, probe, 0)
    sets: list[CriticalSet] = []
    rejected = list(first.rejected)
    weak: list[_Chain] = []
    for group in _groups(found):
        outcome = _examine(anatomy, group, damage, held_out, config, progress)
        if isinstance(outcome, CriticalSet):
            sets.append(outcome)
        else:
            rejected.append(outcome)
            weak.extend(group)
    if len(weak) > 1 and not sets:  # nothing is vital alone; perhaps they are together
        outcome = _examine(anatomy, weak, damage, held_out, config, progress)
        if isinstance(outcome, CriticalSet):
            sets.append(outcome)
        else:
            rejected.append(outcome)
    sets.sort(key=lambda s: -s.verification.joint)
    base = float(damage_on(anatomy, corpus.windows, 0).base.mean())
    return FindResult(sets, rejected, first.bar, first.heights, base, corpus)


@dataclass
class _Chain:
    """One channel and everything that writes it: the onset layer first, then layers that took over
    once that was zeroed.
    """

    first: Candidate
    links: list[Candidate]

    def contributions(self, links: int) -> list[Contribution]:
        return [c for link in self.links[:links] for c in link.contributions if c.magnitude > 0]


def _chains(
    anatomy: Anatomy, probe: Any, config: FindConfig, progress: Progress | None
) -> tuple[Detection, list[_Chain]]:
    """Zero the rows that write the accepted channels, look again, until nothing new stands above
    the bar of round 0.
    """
    chains: dict[int, _Chain] = {}
    gone: list[Region] = []
    first: Detection | None = None
    for number in range(config.rounds):
        if progress:
            progress("detect", number + 1, config.rounds)
        with zeroed(anatomy, gone):
            seen = detect(anatomy, probe, config.detect, bar=first.bar if first else None)
        first = first or seen
        grown = False
        for candidate in seen.candidates:
            sites = {c.entry.site for c in candidate.contributions if c.magnitude > 0}
            rows = [Region(site, candidate.channel, None) for site in sorted(sites)]
            rows = [r for r in rows if r not in gone]
            if not rows or (candidate.channel not in chains and len(chains) == config.channels):
                continue
            chain = chains.setdefault(candidate.channel, _Chain(candidate, []))
            chain.links.append(candidate)
            gone.extend(rows)
            grown = True
        if not grown:
            break
    assert first is not None
    return first, list(chains.values())


def _groups(chains: Sequence[_Chain]) -> list[list[_Chain]]:
    """Channels whose strongest entry sits in the same column of the same layer belong to one
    set.
    """
    groups: dict[tuple[Any, int], list[_Chain]] = {}
    for chain in chains:
        strongest = chain.first.contributions[0].entry
        groups.setdefault((strongest.site, strongest.col), []).append(chain)
    return list(groups.values())


def _examine(
    anatomy: Anatomy,
    group: Sequence[_Chain],
    damage: Damage,
    held_out: Corpus,
    config: FindConfig,
    progress: Progress | None,
) -> CriticalSet | Rejection:
    """The smallest prefix of the group's entries that covers the effect, verified; or why it is no
    critical set.
    """
    ordered = _writers(group, damage, config.cover)
    channels = [chain.first.channel for chain in group]
    where = ", ".join(f"L{chain.first.layer} channel {chain.first.channel}" for chain in group)
    numbers: dict[str, float] = {
        "height": max(chain.first.height for chain in group),
        "entries": len(ordered),
    }
    if not ordered:
        return Rejection(
            where, "no entry contributes a measurable share of the channel's write", numbers
        )
    curve = _Curve(damage, ordered)
    size, full = curve.smallest(config.cover)
    numbers["joint_nats"] = full
    if full < config.verify.min_nats:
        strongest = ordered[0].entry
        return Rejection(
            f"{where} ({strongest})",
            f"zeroing every entry that writes it costs less than {config.verify.min_nats:g} nats",
            numbers,
        )
    chosen = sorted(ordered[:size], key=lambda c: -c.magnitude)
    parts = [_region(c.entry) for c in chosen]
    verification = verify(anatomy, parts, held_out, config.verify, progress, listed=config.listed)
    if not verification.vital:
        numbers |= {
            "joint_nats": verification.joint,
            "control_max_nats": verification.controls.max,
            "control_median_nats": verification.controls.median,
        }
        return Rejection(
            f"{where} ({chosen[0].entry})",
            "the damage does not stand out from its matched controls",
            numbers,
        )
    weights, ranks = zip(*(_weight_and_rank(anatomy, c.entry) for c in chosen), strict=True)
    heights = [chain.first.heights for chain in group]
    first = group[0].first
    return CriticalSet(
        chosen,
        list(weights),
        list(ranks),
        channels,
        heights,
        first.layer,
        first.agreement,
        verification,
        full,
        len(ordered),
    )


def _writers(group: Sequence[_Chain], damage: Damage, cover: float) -> list[Contribution]:
    """The entries of the fewest layers that cover the effect of all that write these channels,
    largest contribution first.
    """
    most = max(len(chain.links) for chain in group)
    upto = [
        sorted((c for chain in group for c in chain.contributions(n)), key=lambda c: -c.magnitude)
        for n in range(1, most + 1)
    ]
    if most == 1 or not upto[0]:
        return upto[-1]
    nats = [
        float(d.mean())
        for d in damage.of([Variant([_region(c.entry) for c in entries]) for entries in upto])
    ]
    return next(
        entries
        for entries, loss in zip(upto, nats, strict=True)
        if loss >= min(cover * max(nats), max(nats))
    )


class _Curve:
    """Damage of the first k entries, each k measured once."""

    def __init__(self, damage: Damage, ordered: Sequence[Contribution]) -> None:
        self.damage, self.ordered = damage, ordered
        self.known: dict[int, float] = {}

    def at(self, *sizes: int) -> list[float]:
        unknown = [k for k in dict.fromkeys(sizes) if k not in self.known]
        variants = [Variant([_region(c.entry) for c in self.ordered[:k]]) for k in unknown]
        self.known |= {
            k: float(d.mean()) for k, d in zip(unknown, self.damage.of(variants), strict=True)
        }
        return [self.known[k] for k in sizes]

    def smallest(self, cover: float) -> tuple[int, float]:
        """The smallest k that keeps `cover` of the largest damage on the curve, and that damage; by
        doubling, then bisection.
        """
        n = len(self.ordered)
        sizes = [2**i for i in range(n.bit_length()) if 2**i < n] + [n]
        nats = self.at(*sizes)
        full = max(nats)
        enough = min(cover * full, full)  # full itself where zeroing does the model good
        high = next(k for k, loss in zip(sizes, nats, strict=True) if loss >= enough)
        low = max((k for k in sizes if k < high), default=0)
        while high - low > max(1, high // 16):
            middle = (low + high) // 2
            low, high = (low, middle) if self.at(middle)[0] >= enough else (middle, high)
        return high, full


def geometry(entries: Sequence[Entry]) -> str:
    """single, row (one channel of one matrix), column (one neuron), or mixed."""
    if len(entries) == 1:
        return "single"
    if len({(e.site, e.row) for e in entries}) == 1:
        return "row"
    return "column" if len({(e.site, e.col) for e in entries}) == 1 else "mixed"


def _region(entry: Entry) -> Region:
    return Region(entry.site, entry.row, entry.col)


def _weight_and_rank(anatomy: Anatomy, entry: Entry) -> tuple[float, int]:
    """The weight, and its rank by |w| in its matrix, 1 for the largest."""
    matrix = anatomy.view(entry.site).read()
    value = matrix[entry.row, entry.col]
    return float(value), int((matrix.abs() > value.abs()).sum()) + 1
