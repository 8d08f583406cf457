"""`find`: the weights a model cannot live without."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from ..anatomy import StreamedAnatomy
from ..find import (
    Candidate,
    Detection,
    ExpertProfile,
    FindConfig,
    FindResult,
    detect,
    find,
    profile_experts,
)
from ..settings import nested, setting
from .lab import Lab, TextSettings

MOST_ENTRIES = 16  # of each candidate in a result of detection


@dataclass(frozen=True)
class Settings:
    """Find the weights MODEL cannot live without, and verify them against matched controls.

    "None found" is a result.
    """

    search: FindConfig = nested(FindConfig)
    text: TextSettings = nested(partial(TextSettings, windows=40))
    detect_only: bool = setting(
        False, "stop after detection: candidates, without damage and controls, so nothing is vital"
    )
    experts: bool = setting(
        False, "of a mixture of experts, also the profile: which experts write the outliers"
    )


def run(lab: Lab, settings: Settings) -> FindResult | Detection:
    search = settings.search
    corpus = lab.corpus(settings.text)
    probe = corpus.windows[: search.probe_windows]
    profile: list[ExpertProfile] = []
    if settings.experts:
        lab.tell("experts", 0, 1)
        end = None if search.detect.layers is None else search.detect.layers[1]
        profile = profile_experts(lab.anatomy, probe, end)
    provenance = lab.provenance(settings, corpus.record())
    if settings.detect_only:
        lab.tell("detect", 0, 1)
        detection = detect(lab.anatomy, probe, search.detect)
        strongest = [_with_strongest(one) for one in detection.candidates]
        return replace(detection, candidates=strongest, experts=profile, provenance=provenance)
    result = find(lab.anatomy, corpus, search, lab.tell)
    bytes_read = None
    if isinstance(lab.anatomy, StreamedAnatomy):
        bytes_read = lab.anatomy.shards.bytes_read
    return replace(result, experts=profile, bytes_read=bytes_read, provenance=provenance)


def _with_strongest(candidate: Candidate) -> Candidate:
    """A candidate with its strongest entries only: a row can have tens of thousands."""
    return replace(candidate, contributions=candidate.contributions[:MOST_ENTRIES])
