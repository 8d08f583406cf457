"""`trace`: which states carry a fact."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..errors import BadInput
from ..settings import nested, setting
from ..trace import TraceAverage, TraceConfig, TraceResult, trace, trace_facts
from .edit import FactsSettings, as_recorded
from .lab import Lab, PromptSettings


@dataclass(frozen=True)
class Settings:
    """Corrupt the subject of a prompt, put one clean state of MODEL back at a time, and see how
    much of the answer returns.

    With a file of facts: the average over those that the model knows.
    """

    prompt: str | None = setting(
        None, "prompt of the fact; {} may stand for the subject", metavar="S"
    )
    subject: str | None = setting(
        None, "the words to corrupt, as they stand in the prompt", metavar="S"
    )
    answer: str | None = setting(
        None,
        "the answer whose first token is followed; not given: what the model says",
        metavar="S",
    )
    versus: str | None = setting(
        None,
        "another answer, for the metric logit; not given: what the corrupted model says",
        metavar="S",
    )
    source: FactsSettings = nested(FactsSettings)
    corrupt: str = setting(
        "noise:3",
        "what is done to the subject: noise:F, Gaussian noise of F standard deviations of"
        " embeddings; or replace:WORDS, as many other tokens",
        metavar="HOW",
    )
    trace: TraceConfig = nested(TraceConfig)
    prompts: PromptSettings = nested(PromptSettings)

    def __post_init__(self) -> None:
        one = (self.prompt, self.subject, self.answer, self.versus)
        if self.source.facts is None and None in one[:2]:
            raise BadInput("a trace needs ‹prompt› and ‹subject›, or ‹facts›.")
        if self.source.facts is not None and any(value is not None for value in one):
            raise BadInput(
                "give either ‹facts›, or ‹prompt› and ‹subject› with what belongs to them."
            )
        if self.source.facts is not None and self.config.replace is not None:
            raise BadInput(
                f"‹corrupt› {self.corrupt} can take the place of one subject only; corrupt the"
                " subjects of ‹facts› with noise."
            )

    @property
    def config(self) -> TraceConfig:
        """The settings of the operation. Raises: BadInput for a corruption that is none."""
        how, _, what = self.corrupt.partition(":")
        if how == "replace":
            return replace(self.trace, replace=what)
        noise = _number(what) if how == "noise" else None
        if noise is None:
            raise BadInput(
                f"‹corrupt› {self.corrupt!r} is not known; use noise:F, like noise:3, or"
                " replace:WORDS."
            )
        return replace(self.trace, noise=noise)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def run(lab: Lab, settings: Settings) -> TraceResult | TraceAverage:
    recorded = replace(settings, source=as_recorded(settings.source))
    provenance = lab.provenance(recorded)
    config, bos = settings.config, settings.prompts.bos
    if settings.source.facts is not None:
        facts = settings.source.read()
        average = trace_facts(lab.anatomy, lab.tokenizer, facts, config, bos, lab.tell)
        return replace(average.result(), provenance=provenance)
    traced = trace(
        lab.anatomy,
        lab.tokenizer,
        str(settings.prompt),
        str(settings.subject),
        config,
        settings.answer,
        settings.versus,
        bos,
        progress=lab.tell,
    )
    return replace(traced.result(), provenance=provenance)
