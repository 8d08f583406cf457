"""Find critical sets: detect, zero, look again; then the smallest set that covers the effect."""

# How this works.
#
# Detection names channels that rise and stay, and the entries that write each. Zeroing the whole
# row that writes a channel and looking again shows layers that take over, up to `rounds` times; the
# bar that a channel must pass is fixed in the first round. So each channel has a chain of links:
# the layer that raised it, then those that took over.
#
# Channels whose strongest entries share a column of one layer are one group. Of a group the fewest
# layers are kept that do `cover` of the damage of all, and of their entries, by contribution, the
# shortest prefix that does. That prefix is the set; it is verified beside matched controls on
# windows that neither detection nor this choice has seen. If nothing is vital alone, all groups
# together are tried once.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..anatomy import Anatomy, Entry, Region, Site
from ..corpus import Corpus
from ..errors import BadInput
from ..measure import Controls
from ..progress import Tell, silent
from ..result import Result, derived, record, result
from ..settings import nested, setting
from .damage import Damage, Variant, zeroed
from .detect import Candidate, Contribution, DetectConfig, Detection, Heights, Rejection, detect
from .experts import ExpertProfile
from .stream import damage_on
from .verify import VerifyConfig, verify


@dataclass(frozen=True)
class FindConfig:
    """Settings of the search."""

    detect: DetectConfig = nested(DetectConfig)
    verify: VerifyConfig = nested(VerifyConfig)
    probe_windows: int = setting(
        8,
        "windows for detection and for choosing the set; the others verify it",
        low=1,
        group="Search",
    )
    rounds: int = setting(
        4, "how often to zero what was accepted and look again", low=1, group="Search"
    )
    channels: int = setting(6, "most channels examined", low=1, group="Search")
    cover: float = setting(
        0.8, "share of the effect that the smallest set must keep", low=0, high=1, group="Search"
    )
    listed: int = setting(
        16,
        "entries, strongest first, whose single and leave-one-out damage is measured",
        low=1,
        group="Search",
    )


@record
class CriticalEntry:
    """One entry of a critical set.

    share: of what its channel receives from its layer. rank_abs: its rank by |w| in its matrix, 1
    for the largest.
    """

    entry: Entry
    weight: float
    share: float
    rank_abs: int

    @derived
    def layer(self) -> int | None:
        return self.entry.site.layer

    @derived
    def row(self) -> int:
        return self.entry.row

    @derived
    def col(self) -> int:
        return self.entry.col

    @derived
    def expert(self) -> int | None:
        return self.entry.site.expert


@record
class SetDamage:
    """Damage of a set in nats per token, on windows that neither detection nor the choice saw.

    single_nats, leave_one_out_nats: of the strongest entries. restored_nats: what is left after
    restoring the super activation alone. full_nats: of all `full_size` entries that write the
    channels, on the probe windows.
    """

    joint_nats: float
    single_nats: list[float]
    leave_one_out_nats: list[float]
    ci95: tuple[float, float]
    p_value: float
    restored_nats: float | None
    tokens: int
    full_nats: float
    full_size: int


@record
class CriticalSet:
    """Entries that are vital together.

    channels: the residual channels that they write; heights: of each, by layer. agreement: in what
    share of the windows the first is high.
    """

    channels: list[int]
    heights: list[list[float]]
    agreement: float
    entries: list[CriticalEntry]
    damage: SetDamage
    controls: Controls
    vital: bool
    criteria: str

    @derived
    def geometry(self) -> str:
        return geometry([one.entry for one in self.entries])

    @derived
    def parts(self) -> list[Region]:
        """The set as regions."""
        return self.weights()

    def weights(self) -> list[Region]:
        """What the set stands for where weights are named."""
        return [_region(one.entry) for one in self.entries]


@record
class SearchedHeights(Heights):
    """What detection saw of the channels, and the NLL of the intact model on all windows."""

    base_nll: float


@result("find")
class FindResult(Result):
    """What was found, and with what numbers the rest was rejected."""

    sets: list[CriticalSet]
    rejected: list[Rejection]
    detection: SearchedHeights
    experts: list[ExpertProfile] = field(default_factory=list)
    bytes_read: int | None = None

    @derived
    def verdict(self) -> str:
        return "found" if any(one.vital for one in self.sets) else "none"

    def weights(self) -> list[Region]:
        """Its first set. Raises: BadInput if there is none."""
        if not self.sets:
            raise BadInput("this finding holds no set; name weights instead.")
        return self.sets[0].weights()

    def rows(self) -> list[dict[str, object]]:
        """A row for each set; one row, without the columns of a set, where none was found."""
        known = {
            "verdict": self.verdict,
            "sets": len(self.sets),
            "base_nll": self.detection.base_nll,
        }
        return [
            {
                **known,
                "set": number,
                "geometry": one.geometry,
                "entries": len(one.entries),
                "strongest": one.entries[0].entry,
                "layer": one.entries[0].layer,
                "joint_nats": one.damage.joint_nats,
                "single_max_nats": max(one.damage.single_nats),
                "ci95_low": one.damage.ci95[0],
                "ci95_high": one.damage.ci95[1],
                "p_value": one.damage.p_value,
                "controls_median_nats": one.controls.median_nats,
                "controls_max_nats": one.controls.max_nats,
                "vital": one.vital,
            }
            for number, one in enumerate(self.sets, 1)
        ] or [known]


def find(
    anatomy: Anatomy,
    corpus: Corpus,
    config: FindConfig = FindConfig(),
    progress: Tell = silent,
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
            " Use more text or a smaller ‹window›."
        )
    cut = min(config.probe_windows, n // 2)
    probe, held_out = corpus.windows[:cut], Corpus(corpus.name, corpus.windows[cut:], corpus.bos)
    first, chains = _chains(anatomy, probe, config, progress)
    examiner = _Examiner(anatomy, probe, held_out, config, progress)
    weak = []
    for group in _groups(chains):
        if not examiner.accepts(group):
            weak += group
    if len(weak) > 1 and not examiner.sets:  # nothing is vital alone; perhaps they are together
        examiner.accepts(weak)
    sets = sorted(examiner.sets, key=lambda one: -one.damage.joint_nats)
    bar, heights = first.detection.bar, first.detection.heights
    searched = SearchedHeights(bar, heights, examiner.base_nll())
    return FindResult(sets, [*first.rejected, *examiner.rejected], searched)


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
    anatomy: Anatomy, probe: Tensor, config: FindConfig, progress: Tell
) -> tuple[Detection, list[_Chain]]:
    """Zero the rows that write the accepted channels, look again, until nothing new stands above
    the bar of round 0.
    """
    chains: dict[int, _Chain] = {}
    gone: list[Region] = []
    first: Detection | None = None
    for number in range(config.rounds):
        progress("detect", number + 1, config.rounds)
        with zeroed(anatomy, gone):
            bar = first.detection.bar if first else None
            detection = detect(anatomy, probe, config.detect, bar)
        first = first or detection
        grown = False
        for candidate in detection.candidates:
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
    set: one neuron writes them all.
    """
    groups: dict[tuple[Site, int], list[_Chain]] = {}
    for chain in chains:
        strongest = chain.first.contributions[0].entry
        groups.setdefault((strongest.site, strongest.col), []).append(chain)
    return list(groups.values())


class _Examiner:
    """What becomes of groups of channels: critical sets, or why they are none."""

    def __init__(
        self,
        anatomy: Anatomy,
        probe: Tensor,
        held_out: Corpus,
        config: FindConfig,
        progress: Tell,
    ) -> None:
        self.anatomy, self.probe, self.held_out = anatomy, probe, held_out
        self.config, self.progress = config, progress
        self.damage = damage_on(anatomy, probe, 0)
        self.sets: list[CriticalSet] = []
        self.rejected: list[Rejection] = []
        self._held_out_nll: float | None = None  # of the intact model, once a verification took it

    def accepts(self, group: Sequence[_Chain]) -> bool:
        """Whether the group holds a critical set, which is kept; else the reason is."""
        outcome = self._examine(group)
        if isinstance(outcome, Rejection):
            self.rejected.append(outcome)
            return False
        self.sets.append(outcome)
        return True

    def base_nll(self) -> float:
        """Of the intact model on all windows."""
        if self._held_out_nll is None:  # in one pass, which for a streamed model reads all of it
            both = torch.cat([self.probe, self.held_out.windows])
            return float(damage_on(self.anatomy, both, 0).base.mean())
        n, n_held_out = len(self.probe), len(self.held_out.windows)
        total = float(self.damage.base.sum()) + n_held_out * self._held_out_nll
        return total / (n + n_held_out)

    def _examine(self, group: Sequence[_Chain]) -> CriticalSet | Rejection:
        """The smallest prefix of the group's entries that covers the effect, verified; or why it is
        no critical set.
        """
        verifying = self.config.verify
        ordered = _writers(group, self.damage, self.config.cover)
        first = group[0].first
        where = ", ".join(f"L{chain.first.layer} channel {chain.first.channel}" for chain in group)
        height = max(chain.first.height for chain in group)
        if not ordered:
            why = "no entry contributes a measurable share of the channel's write"
            return Rejection(where, why, height=height, entries=0)

        curve = _Curve(self.damage, ordered)
        size, full = curve.smallest(self.config.cover)
        if not verifying.is_large(full):
            return Rejection(
                f"{where} ({ordered[0].entry})",
                f"zeroing every entry that writes it costs less than {verifying.min_nats:g} nats",
                height=height,
                entries=len(ordered),
                joint_nats=full,
            )

        chosen = sorted(ordered[:size], key=lambda c: -c.magnitude)
        parts = [_region(c.entry) for c in chosen]
        verified = verify(
            self.anatomy, parts, self.held_out, verifying, self.progress, self.config.listed
        )
        self._held_out_nll = verified.base_nll
        if not verified.vital:
            return Rejection(
                f"{where} ({chosen[0].entry})",
                "the damage does not stand out from its matched controls",
                height=height,
                entries=len(ordered),
                joint_nats=verified.joint_nats,
                control_max_nats=verified.controls.max_nats,
                control_median_nats=verified.controls.median_nats,
            )
        return CriticalSet(
            channels=[chain.first.channel for chain in group],
            heights=[chain.first.heights for chain in group],
            agreement=first.agreement,
            entries=[_critical_entry(self.anatomy, c) for c in chosen],
            damage=SetDamage(
                joint_nats=verified.joint_nats,
                single_nats=verified.single_nats,
                leave_one_out_nats=verified.leave_one_out_nats,
                ci95=verified.ci95,
                p_value=verified.p_value,
                restored_nats=verified.restored_nats,
                tokens=verified.tokens,
                full_nats=full,
                full_size=len(ordered),
            ),
            controls=verified.controls,
            vital=verified.vital,
            criteria=verified.criteria,
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
        # the second where zeroing does the model good, so that the share of it is above the whole
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
        # to a sixteenth: the last entries of a long prefix tell little, and each step is a pass
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


def _critical_entry(anatomy: Anatomy, contribution: Contribution) -> CriticalEntry:
    entry = contribution.entry
    matrix = anatomy.view(entry.site).read()
    value = matrix[entry.row, entry.col]
    rank = int((matrix.abs() > value.abs()).sum()) + 1
    return CriticalEntry(entry, float(value), contribution.share, rank)
