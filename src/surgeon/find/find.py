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
#
# That is the published search, of `mlp.down` alone. Then everything else is looked at, see
# elsewhere.py, and what stands out there and is not part of a set already is verified likewise.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import ceil

import torch
from jaxtyping import Int64
from torch import Tensor

from ..anatomy import Anatomy, Entry, Region, Site, StreamedAnatomy
from ..corpus import Corpus
from ..errors import BadInput
from ..measure import Controls
from ..progress import Tell, silent
from ..result import Result, derived, record, result
from ..settings import nested, setting
from .damage import Damage, Variant, zeroed
from .detect import Candidate, Contribution, DetectConfig, Detection, Heights, Rejection, detect
from .elsewhere import Suspect, explained, suspects
from .experts import ExpertProfile
from .stream import damage_on
from .verify import Verification, VerifyConfig, entries_of, verify

CHOICE_TOKENS = 256  # on which the entries of a set are chosen
MOST_DROPPED = 16  # entries of a set of which each is tried whether it is needed


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
    only: str = setting(
        "everything",
        "where to look: everything, or mlp.down alone, as published",
        choices=("everything", "mlp.down"),
    )
    measured: int = setting(
        24,
        "of scales, entries, rows and columns each, how many are measured that the first-order map"
        " names",
        low=1,
        group="Search",
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

    share: of what its channel receives from its layer; in a set that no channel names, of the sum
    of its squared weights. rank_abs: its rank by |w| in its matrix, 1
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

    parts: the set as regions. channels: the residual channels that they write, where the set was
    named by them; heights: of each, by layer. agreement: in what share of the windows the first is
    high. windows_used: of the joint damage.
    """

    parts: list[Region]
    channels: list[int]
    heights: list[list[float]]
    agreement: float | None
    entries: list[CriticalEntry]
    damage: SetDamage
    controls: Controls
    vital: bool
    close: bool
    criteria: str
    windows_used: int

    @derived
    def geometry(self) -> str:
        return geometry([one.entry for one in self.entries])

    def weights(self) -> list[Region]:
        """What the set stands for where weights are named."""
        return self.parts


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
    # the first-order map goes backward through the model, which a streamed one cannot
    if config.only == "everything" and not isinstance(anatomy, StreamedAnatomy):
        examiner.look_elsewhere()
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
        self.judged = damage_on(anatomy, held_out.windows, 0)
        # what the choice of entries is made on, where some windows cost less than all
        most = max(self.damage.looks[0], ceil(CHOICE_TOKENS / probe.shape[1]))
        few = len(probe) if len(self.damage.looks) == 1 else min(most, len(probe))
        self.few = torch.arange(few)
        self.sets: list[CriticalSet] = []
        self.rejected: list[Rejection] = []

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
        return float(torch.cat([self.damage.base, self.judged.base]).mean())

    def _examine(self, group: Sequence[_Chain]) -> CriticalSet | Rejection:
        """The smallest prefix of the group's entries that covers the effect, verified; or why it is
        no critical set.
        """
        verifying = self.config.verify
        ordered = _writers(group, self.damage, self.few, self.config.cover)
        first = group[0].first
        where = ", ".join(f"L{chain.first.layer} channel {chain.first.channel}" for chain in group)
        height = max(chain.first.height for chain in group)
        if not ordered:
            why = "no entry contributes a measurable share of the channel's write"
            return Rejection(where, why, height=height, entries=0)

        curve = _Curve(self.damage, ordered, self.few)
        several = list(range(len(ordered)))
        full = max(curve.at(1, min(16, len(ordered)), len(ordered)))
        if verifying.is_large(2 * full):  # on few windows; what is far too small is left at that
            several = curve.smallest(self.config.cover)
            full = max(curve.whole(several), curve.whole(range(len(ordered))))
        if not verifying.is_large(full):
            return Rejection(
                f"{where} ({ordered[0].entry})",
                f"zeroing every entry that writes it costs less than {verifying.min_nats:g} nats",
                height=height,
                entries=len(ordered),
                joint_nats=full,
            )

        chosen = [ordered[k] for k in several]
        parts = [_region(c.entry) for c in chosen]
        verified = self._verify(parts)
        if not verified.vital:
            rejection = _not_above_controls(f"{where} ({chosen[0].entry})", verified)
            return replace(rejection, height=height, entries=len(ordered))
        return _critical_set(
            verified,
            [_critical_entry(self.anatomy, c.entry, c.share) for c in chosen],
            full_nats=full,
            full_size=len(ordered),
            channels=[chain.first.channel for chain in group],
            heights=[chain.first.heights for chain in group],
            agreement=first.agreement,
        )

    def look_elsewhere(self) -> None:
        """What is vital and writes no channel that stays high."""
        config = self.config
        named = suspects(
            self.anatomy,
            self.probe,
            self.damage,
            config.measured,
            config.verify.min_nats,
            config.cover,
            self.progress,
        )
        for one in named:
            if any(self._explains(known, one) for known in self.sets):
                continue
            verified = self._verify([one.part])
            if verified.vital:
                entries = _entries_of_part(self.anatomy, one.part)
                self.sets.append(
                    _critical_set(verified, entries, full_nats=one.nats, full_size=len(entries))
                )
            else:
                self.rejected.append(_not_above_controls(str(one.part), verified))

    def _explains(self, known: CriticalSet, suspect: Suspect) -> bool:
        entries = [one.entry for one in known.entries]
        return explained(suspect, entries, known.damage.full_nats, self.config.cover)

    def _verify(self, parts: Sequence[Region]) -> Verification:
        return verify(
            self.anatomy,
            parts,
            self.held_out,
            self.config.verify,
            self.progress,
            self.config.listed,
            self.judged,
            self.few,
        )


def _critical_set(
    verified: Verification,
    entries: list[CriticalEntry],
    full_nats: float,
    full_size: int,
    channels: Sequence[int] = (),
    heights: Sequence[list[float]] = (),
    agreement: float | None = None,
) -> CriticalSet:
    return CriticalSet(
        parts=verified.at,
        channels=list(channels),
        heights=list(heights),
        agreement=agreement,
        entries=entries,
        damage=SetDamage(
            joint_nats=verified.joint_nats,
            single_nats=verified.single_nats,
            leave_one_out_nats=verified.leave_one_out_nats,
            ci95=verified.ci95,
            p_value=verified.p_value,
            restored_nats=verified.restored_nats,
            tokens=verified.tokens,
            full_nats=full_nats,
            full_size=full_size,
        ),
        controls=verified.controls,
        vital=verified.vital,
        close=verified.close,
        criteria=verified.criteria,
        windows_used=verified.windows,
    )


def _not_above_controls(where: str, verified: Verification) -> Rejection:
    return Rejection(
        where,
        "the damage does not stand out from its matched controls",
        joint_nats=verified.joint_nats,
        control_max_nats=verified.controls.max_nats,
        control_median_nats=verified.controls.median_nats,
    )


def _writers(
    group: Sequence[_Chain], damage: Damage, few: Int64[Tensor, " k"], cover: float
) -> list[Contribution]:
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
        for d in damage.of(
            [Variant([_region(c.entry) for c in entries]) for entries in upto], chosen=few
        )
    ]
    return next(
        entries
        for entries, loss in zip(upto, nats, strict=True)
        # the second where zeroing does the model good, so that the share of it is above the whole
        if loss >= min(cover * max(nats), max(nats))
    )


class _Curve:
    """Damage of the first k entries on a few windows, each k measured once."""

    def __init__(
        self, damage: Damage, ordered: Sequence[Contribution], few: Int64[Tensor, " k"]
    ) -> None:
        self.damage, self.few = damage, few
        self.regions = [_region(c.entry) for c in ordered]
        self.known: dict[int, float] = {}

    def at(self, *sizes: int) -> list[float]:
        unknown = [k for k in dict.fromkeys(sizes) if k not in self.known]
        variants = [Variant(self.regions[:k]) for k in unknown]
        damages = self.damage.of(variants, chosen=self.few)
        self.known |= {k: float(d.mean()) for k, d in zip(unknown, damages, strict=True)}
        return [self.known[k] for k in sizes]

    def whole(self, chosen: Sequence[int]) -> float:
        """Damage of these entries on all windows."""
        return float(self.damage([self.regions[k] for k in chosen]).mean())

    def smallest(self, cover: float) -> list[int]:
        """Few entries that keep `cover` of the damage of all: the shortest prefix that does, by
        doubling, then bisection, less what it does as well without.
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
        return self._needed(list(range(high)), enough)

    def _needed(self, chosen: list[int], enough: float) -> list[int]:
        """The entries less those that the rest does as well without, the least needed first.

        Of a long set none is dropped: its entries each do little, and each step is a pass.
        """
        while 1 < len(chosen) <= MOST_DROPPED:
            rests = [[k for k in chosen if k != left_out] for left_out in chosen]
            variants = [Variant([self.regions[k] for k in rest]) for rest in rests]
            damages = self.damage.of(variants, chosen=self.few)
            nats, best = max((float(d.mean()), n) for n, d in enumerate(damages))
            if nats < enough:
                break
            chosen = rests[best]
        return chosen


def geometry(entries: Sequence[Entry]) -> str:
    """single, row (one channel of one matrix), column (one neuron), or mixed."""
    if len(entries) == 1:
        return "single"
    if len({(e.site, e.row) for e in entries}) == 1:
        return "row"
    return "column" if len({(e.site, e.col) for e in entries}) == 1 else "mixed"


def _region(entry: Entry) -> Region:
    return Region(entry.site, entry.row, entry.col)


def _critical_entry(anatomy: Anatomy, entry: Entry, share: float) -> CriticalEntry:
    matrix = anatomy.view(entry.site).read()
    value = matrix[entry.row, entry.col]
    rank = int((matrix.abs() > value.abs()).sum()) + 1
    return CriticalEntry(entry, float(value), share, rank)


def _entries_of_part(anatomy: Anatomy, part: Region) -> list[CriticalEntry]:
    """Every entry of the region, the largest first."""
    size = anatomy.view(part.site).read().detach().float().abs()
    ordered = size.flatten().sort().values
    entries = entries_of(anatomy, part)
    mine = torch.tensor([[e.row, e.col] for e in entries]).T
    squares = size.cpu()[mine[0], mine[1]] ** 2
    below = torch.searchsorted(ordered, size[mine[0], mine[1]], right=True)
    values = anatomy.view(part.site).get(mine[0], mine[1]).float()
    shares = (squares / squares.sum().clamp_min(1e-30)).tolist()
    known = [
        CriticalEntry(e, value, share, len(ordered) - under + 1)
        for e, value, share, under in zip(
            entries, values.tolist(), shares, below.tolist(), strict=True
        )
    ]
    return sorted(known, key=lambda one: one.rank_abs)
