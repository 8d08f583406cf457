"""`edit many`: facts rewritten one after the other, with guard rails."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from ..edit import EditConfig, SessionConfig, Step, session, worst_of
from ..errors import BadInput
from ..measure import require_causal
from ..result import derived, result
from ..settings import nested
from .edit import (
    ControlSettings,
    CovarianceSettings,
    EditResult,
    FactSettings,
    FactsSettings,
    ScoringSettings,
    as_recorded,
    asked,
    completed,
    preparation,
    scored,
)
from .lab import Lab


@dataclass(frozen=True)
class Settings:
    """Rewrite facts of MODEL one after the other, each on the model with those before it.

    After each edit guard rails look at unrelated text, at the earlier edits and at the size of the
    change. The first edit that breaks one is taken back and ends it; the patch holds those before.
    """

    source: FactsSettings = nested(FactsSettings)
    controls: ControlSettings = nested(ControlSettings)
    edit: EditConfig = nested(EditConfig)
    covariance: CovarianceSettings = nested(CovarianceSettings)
    scoring: ScoringSettings = nested(ScoringSettings)
    rails: SessionConfig = nested(SessionConfig)

    def __post_init__(self) -> None:
        if self.source.facts is None:
            raise BadInput("edit many needs ‹facts›.")


@result("edit many")
class EditsResult(EditResult):
    """Edits made one after the other, scored together.

    The forecast is that of the worst edit, on the model with those before it. steps: each edit as
    the model stood after it, also the one that was taken back. stopped: why it ended early, None
    where every edit stayed.
    """

    steps: list[Step] = field(kw_only=True)
    stopped: str | None = field(kw_only=True)

    @derived
    def kept_edits(self) -> int:
        """How many edits the patch holds."""
        return len(self.scorecard.facts)


def run(lab: Lab, settings: Settings) -> EditsResult:
    require_causal(lab.model)
    scoring = settings.scoring
    facts = completed(lab, asked(FactSettings(), settings.source), scoring.text.bos)
    prompts = settings.controls.read()
    corpus = lab.corpus(scoring.text, fit=True)
    ready = preparation(lab, settings.covariance, scoring.text)
    ran = session(ready, facts, corpus.windows, settings.edit, settings.rails, lab.tell)
    kept = facts[: len(ran.edits)]
    scores = scored(lab, ran.patch, kept, prompts, scoring, ready.config.seed)
    recorded = replace(settings, source=as_recorded(settings.source))
    return EditsResult(
        settings.edit.method,
        worst_of([one.preflight for one in ran.edits]),
        scores.scorecard,
        scores.controls,
        scores.radar,
        sum(one.seconds for one in ran.edits),
        ran.patch,
        steps=ran.steps,
        stopped=ran.stopped,
        provenance=lab.provenance(recorded, corpus.record()),
    )
