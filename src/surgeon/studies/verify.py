"""`verify`: what a model loses without given weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from ..anatomy import Region
from ..corpus import Corpus
from ..find import Verification, VerifyConfig, verify
from ..measure import STOP_WORDS, Behaviours, Reference, behaviour_state
from ..patch import ablate
from ..settings import nested, setting
from .lab import Lab, TextSettings
from .naming import AT_HELP, regions_of

PROMPTS = (
    "Once upon a time, there was a little",
    "The capital of France is",
    "My favorite food is",
)


@dataclass(frozen=True)
class Settings:
    """Measure what MODEL loses without given weights: alone, together, all but one, and controls.

    Damage is in nats per token: NLL with the weights at zero, less NLL of the intact model.
    """

    at: Any = setting(help=AT_HELP, metavar="ENTRY", many=True)
    verify: VerifyConfig = nested(VerifyConfig)
    listed: int = setting(
        16, "parts, in their order, whose damage alone and left out is measured, too", low=1
    )
    text: TextSettings = nested(partial(TextSettings, windows=40))
    behaviour: bool = setting(
        False,
        "also: KL and top-1 agreement, stop-word probability, loop rate of greedy generations",
        group="Behaviour",
    )
    prompts: tuple[str, ...] = setting(
        PROMPTS, "prompt to generate from", spelled="prompt", group="Behaviour"
    )
    stop_words: tuple[str, ...] = setting(
        STOP_WORDS, "word counted as a stop word", spelled="stop-word", group="Behaviour"
    )


def run(lab: Lab, settings: Settings) -> Verification:
    parts = regions_of(lab, settings.at, settings.text, settings.verify.seed)
    settings = replace(settings, at=[str(part) for part in parts])
    corpus = lab.corpus(settings.text)
    result = verify(lab.anatomy, parts, corpus, settings.verify, lab.tell, settings.listed)
    behaviour = _behaviours(lab, parts, corpus, settings) if settings.behaviour else None
    provenance = lab.provenance(settings, corpus.record())
    return replace(result, behaviour=behaviour, provenance=provenance)


def _behaviours(
    lab: Lab, parts: Sequence[Region], corpus: Corpus, settings: Settings
) -> Behaviours:
    injury = ablate(lab.anatomy, parts)
    state = partial(
        behaviour_state,
        lab.model,
        lab.tokenizer,
        corpus.windows,
        settings.prompts,
        settings.stop_words,
        settings.text.bos,
    )
    away = Reference(lab.model, corpus.windows).compare(partial(injury.applied, lab.anatomy))
    base = state()
    with injury.applied(lab.anatomy):
        ablated = state()
    return Behaviours(away.kl, away.top1_agreement, base, ablated)
