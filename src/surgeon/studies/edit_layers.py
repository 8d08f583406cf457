"""`edit layers`: which layer to edit; causal tracing is a prior, trial edits decide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ..edit import SEVERAL_LAYERS, EditConfig, Preparation, edit
from ..errors import BadInput, SurgeonError
from ..facts import Fact
from ..measure import Examination, ScoreConfig, examine, interval, require_causal, scorecard
from ..result import Result, record, result
from ..settings import nested, setting
from ..trace import LayerEffect, TraceConfig, suggest_prior, trace_facts
from .edit import (
    CovarianceSettings,
    FactSettings,
    FactsSettings,
    as_recorded,
    asked,
    completed,
    preparation,
    require_facts,
)
from .lab import Lab, PromptSettings, TextSettings

LIGHT = ScoreConfig(new_tokens=1, confabulation=())


@dataclass(frozen=True)
class Settings:
    """Try edits in the layers of MODEL and rank the layers; no patch is written.

    A causal trace says which layers to try, unless they are named. A layer's score is the mean over
    facts of what there is of P(target), the share of paraphrases that prefer the target, and the
    share of neighbours that keep their answer.
    """

    fact: FactSettings = nested(FactSettings)
    source: FactsSettings = nested(FactsSettings)
    trials: int = setting(6, "facts to try, the first of all", low=1, metavar="N")
    candidates: int = setting(
        8, "layers to try, those with the strongest trace", low=1, metavar="N"
    )
    edit: EditConfig = nested(EditConfig)
    covariance: CovarianceSettings = nested(CovarianceSettings)
    prompts: PromptSettings = nested(PromptSettings)

    def __post_init__(self) -> None:
        require_facts(self.fact, self.source)
        if self.edit.method in SEVERAL_LAYERS:
            raise BadInput(
                f"layers are tried one at a time, and {self.edit.method} changes several; use"
                " ‹method› rome."
            )


@record
class LayerTrial:
    """Trial edits in one layer. ci95: of the score, over facts. relative_damage: as foreseen, mean
    over the edits that could be made. prior: the effect of its MLP in the trace, None where it was
    not traced.
    """

    layer: int
    score: float
    ci95: tuple[float, float]
    relative_damage: float | None
    prior: float | None
    prior_ci95: tuple[float, float] | None


@result("edit layers")
class LayerRanking(Result):
    """Layers by their trial edits, best first. facts: how many were tried in each."""

    method: str
    facts: int
    layers: list[LayerTrial]

    @property
    def as_good(self) -> list[LayerTrial]:
        """Layers that cannot be told from the best on so few facts."""
        return [one for one in self.layers[1:] if one.ci95[1] >= self.layers[0].ci95[0]]

    def rows(self) -> list[dict[str, object]]:
        return [vars(one) for one in self.layers]


def run(lab: Lab, settings: Settings) -> LayerRanking:
    require_causal(lab.model)
    bos = settings.prompts.bos
    facts = completed(lab, asked(settings.fact, settings.source), bos)[: settings.trials]
    ready = preparation(lab, settings.covariance, TextSettings(bos=bos))
    prior = _prior(lab, facts, bos)
    by_trace = _candidates(len(lab.anatomy.layers), prior)[: settings.candidates]
    layers = sorted(settings.edit.layers or by_trace)
    ready.gather(layers)
    before = [_examined(lab, fact, bos) for fact in facts]
    trials = []
    for done, layer in enumerate(layers, 1):
        config = replace(settings.edit, layers=(layer,))
        trials.append(_trial(lab, ready, before, config, prior.get(layer)))
        lab.tell("layers", done, len(layers))
    recorded = replace(settings, source=as_recorded(settings.source))
    return LayerRanking(
        settings.edit.method,
        len(facts),
        sorted(trials, key=lambda trial: -trial.score),
        provenance=lab.provenance(recorded),
    )


def _prior(lab: Lab, facts: Sequence[Fact], bos: str) -> dict[int, LayerEffect]:
    """The effect of each layer's MLP in a causal trace; empty where no fact says what is true, or
    the model knows none: then the trials decide alone.
    """
    config = TraceConfig(kinds=("mlp",))
    try:
        average = trace_facts(lab.anatomy, lab.tokenizer, facts, config, bos, lab.tell)
    except SurgeonError:
        return {}
    return {ranked[0]: LayerEffect(*ranked) for ranked in suggest_prior(average)}


def _candidates(depth: int, prior: Mapping[int, LayerEffect]) -> list[int]:
    """Layers by their prior, strongest first; never the last, in which nothing reads the edit."""
    strength = {layer: one.effect for layer, one in prior.items()}
    return sorted(range(max(1, depth - 1)), key=lambda layer: -strength.get(layer, 0.0))


def _trial(
    lab: Lab,
    ready: Preparation,
    before: Sequence[Examination],
    config: EditConfig,
    prior: LayerEffect | None,
) -> LayerTrial:
    """Each fact edited alone in one layer."""
    scores, damages = [], []
    for intact in before:
        fact = intact.facts[0]
        try:
            edited = edit(ready, [fact], config)
        except BadInput:
            raise
        except SurgeonError:  # the key cannot be used there
            scores.append(0.0)
            continue
        with edited.patch.applied(lab.anatomy):
            after = _examined(lab, fact, ready.config.bos)
        scores.append(_score(intact, after))
        damages.append(edited.preflight.relative_damage)
    values = torch.tensor(scores, dtype=torch.float64)
    return LayerTrial(
        config.layers[0],
        float(values.mean()),
        interval(values, ready.config.seed),
        sum(damages) / len(damages) if damages else None,
        None if prior is None else prior.effect,
        None if prior is None else prior.ci95,
    )


def _examined(lab: Lab, fact: Fact, bos: str) -> Examination:
    return examine(lab.model, lab.tokenizer, [fact], config=LIGHT, bos=bos)


def _score(before: Examination, after: Examination) -> float:
    card = scorecard(before, after)
    parts = [after.own[0].target]
    if card.paraphrase.after is not None:
        parts.append(card.paraphrase.after)
    if card.neighbours_known_before:
        parts.append(card.neighbours_kept / card.neighbours_known_before)
    return sum(parts) / len(parts)
