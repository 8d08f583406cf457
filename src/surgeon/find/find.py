"""Find critical sets: detect, zero, look again; estimate everything else, and measure it."""

# How this works.
#
# Detection names channels that rise and stay, and the entries that write each. Zeroing the whole
# row that writes a channel and looking again shows layers that take over, up to `rounds` times; the
# bar that a channel must pass is fixed in the first round. So each channel has a chain of links:
# the layer that raised it, then those that took over. Channels whose strongest entries share a
# column of one layer are one group, which is examined (examine.py). If nothing is vital alone, all
# groups together are tried once.
#
# That is the published search, of `mlp.down` alone. Then everything else is looked at, see
# elsewhere.py.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..anatomy import Anatomy, Region, Site, StreamedAnatomy
from ..corpus import Corpus
from ..errors import BadInput
from ..progress import Tell, silent
from ..settings import nested, setting
from .detect import DetectConfig, Detection, detect
from .elsewhere import Suspect, estimated, suspects, without_doubles
from .examine import Chain, Examiner
from .links import Link, links
from .results import FindResult, SearchedHeights
from .verify import VerifyConfig
from .zeroed import zeroed


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
        32,
        "of norm scales, entries, rows and columns each, how many of the largest estimates are"
        " measured",
        low=1,
        group="Search",
    )
    sets: int = setting(
        10, "most sets verified, dearest first; of the others a sample says", low=1, group="Search"
    )
    listed: int = setting(
        16,
        "entries, strongest first, whose single and leave-one-out damage is measured",
        low=1,
        group="Search",
    )


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
    verifying, cover = config.verify, config.cover
    examiner = Examiner(anatomy, probe, held_out, verifying, cover, config.listed, progress)
    weak = []
    for group in _groups(chains):
        if not examiner.accepts(group):
            weak += group
    if len(weak) > 1 and not examiner.sets:  # nothing is vital alone; perhaps they are together
        examiner.accepts(weak)
    measured: list[Suspect] = []
    if config.only == "everything":
        everything = estimated(anatomy, probe, progress)
        if config.detect.layers is not None:
            first_layer, end = config.detect.layers
            within = range(first_layer, end)
            everything = [one for one in everything if one.part.site.layer in within]
        examiner.taken = [one.part for one in everything]
        measured = suspects(anatomy, everything, examiner.damage, config.measured, progress)
        examiner.weigh(without_doubles(measured, cover), config.sets)
    sets = sorted(examiner.sets, key=lambda one: -one.damage.joint_nats)
    bar, heights = first.detection.bar, first.detection.heights
    searched = SearchedHeights(bar, heights, examiner.base_nll())
    chained: list[Link] = []
    if not isinstance(anatomy, StreamedAnatomy):  # it would be read twice for each pair
        chained = links(anatomy, [one.parts for one in sets], probe, examiner.damage)
    rejected = [*first.rejected, *examiner.rejected]
    return FindResult(sets, rejected, searched, measured, chained)


def _chains(
    anatomy: Anatomy, probe: Tensor, config: FindConfig, progress: Tell
) -> tuple[Detection, list[Chain]]:
    """Zero the rows that write the accepted channels, look again, until nothing new stands above
    the bar of round 0.
    """
    chains: dict[int, Chain] = {}
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
            chain = chains.setdefault(candidate.channel, Chain(candidate, []))
            chain.links.append(candidate)
            gone.extend(rows)
            grown = True
        if not grown:
            break
    assert first is not None
    return first, list(chains.values())


def _groups(chains: Sequence[Chain]) -> list[list[Chain]]:
    """Channels whose strongest entry sits in the same column of the same layer belong to one
    set: one neuron writes them all.
    """
    groups: dict[tuple[Site, int], list[Chain]] = {}
    for chain in chains:
        strongest = chain.first.contributions[0].entry
        groups.setdefault((strongest.site, strongest.col), []).append(chain)
    return list(groups.values())
