"""`edit`: a fact or several rewritten as one patch, with the forecast and the scorecard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ..corpus import read_text
from ..edit import (
    REFUSE,
    CovarianceCache,
    EditConfig,
    Preflight,
    Preparation,
    PrepareConfig,
    Radar,
    default_folder,
    edit,
    radar,
)
from ..errors import BadInput, Refused
from ..facts import Fact, as_record, facts_of
from ..measure import (
    BeforeAfter,
    Control,
    FreeText,
    Scorecard,
    ScoreConfig,
    compared_controls,
    examine,
    require_causal,
    scorecard,
    with_neighbours,
)
from ..patch import Patch, applied_patches
from ..result import Result, attached, derived, result
from ..settings import nested, setting
from .lab import Lab, TextSettings


@dataclass(frozen=True)
class FactSettings:
    """The one fact that is edited."""

    prompt: str | None = setting(
        None,
        "prompt of the fact, with {} where the subject stands: 'The capital of {} is'",
        metavar="TEMPLATE",
    )
    subject: str | None = setting(None, "what the fact is about", metavar="WORDS")
    target: str | None = setting(None, "what the model is to say next", metavar="WORDS")
    true: str | None = setting(
        None, "what it says now, if you want the two compared", metavar="WORDS"
    )

    @property
    def given(self) -> bool:
        return any(v is not None for v in (self.prompt, self.subject, self.target))


@dataclass(frozen=True)
class FactsSettings:
    """Several facts. facts: a file, or in Python a list of `Fact` or of mappings."""

    facts: Any = setting(
        None,
        "facts: JSON lines with prompt, subject, target; or CounterFact's JSON",
        metavar="FILE",
        is_file=True,
    )
    limit: int | None = setting(None, "use the first N facts", low=1, metavar="N")

    def read(self) -> list[Fact]:
        """Raises: BadText, BadInput."""
        return facts_of(self.facts)[: self.limit]


@dataclass(frozen=True)
class CovarianceSettings:
    """What usual keys are: the text that their covariance is taken on, and where it is kept."""

    prepare: PrepareConfig = nested(PrepareConfig)
    covariance_text: str | None = setting(
        None,
        "text for the covariance of the keys; not given: text that the model writes itself",
        metavar="FILE",
        is_file=True,
        group="Covariance",
    )
    cache: str | None = setting(
        None,
        "where covariances are kept; not given: $SURGEON_CACHE, or the user's cache folder",
        metavar="DIR",
        group="Covariance",
    )
    no_cache: bool = setting(False, "keep no covariance", group="Covariance")


@dataclass(frozen=True)
class ScoringSettings:
    """What the edited model is asked beside the one before. text: unrelated text, on which the
    perplexity is measured.
    """

    score: ScoreConfig = nested(ScoreConfig)
    radar: int = setting(
        0,
        "show the N places of the text that the edit changes most",
        low=0,
        metavar="N",
        group="Scorecard",
    )
    text: TextSettings = nested(partial(TextSettings, windows=20))


@dataclass(frozen=True)
class ControlSettings:
    """Prompts that should not change: a file, or in Python a list."""

    controls: Any = setting(
        None, "prompts that should not change, one a line", metavar="FILE", is_file=True
    )

    def read(self) -> list[str]:
        """Raises: BadText."""
        if self.controls is None:
            return []
        lines = self.controls
        if isinstance(lines, str | Path):
            lines = read_text(lines).splitlines()
        return [line.strip() for line in lines if line.strip()]


@dataclass(frozen=True)
class Settings:
    """Make MODEL say something else about a subject, as a patch.

    The damage is foreseen before a weight changes, and the edit refused where it is too great; a
    scorecard holds the edited model beside the one before. Facts of a file are written together.
    The text is unrelated text, on which the perplexity before and after is measured.
    """

    fact: FactSettings = nested(FactSettings)
    source: FactsSettings = nested(FactsSettings)
    controls: ControlSettings = nested(ControlSettings)
    edit: EditConfig = nested(EditConfig)
    covariance: CovarianceSettings = nested(CovarianceSettings)
    scoring: ScoringSettings = nested(ScoringSettings)
    force: bool = setting(False, "make the patch also if the forecast says refuse", group="Limits")

    def __post_init__(self) -> None:
        require_facts(self.fact, self.source)


@result("edit")
class EditResult(Result):
    """An edit: what was foreseen, and the edited model beside the one before.

    seconds: that the edit took, without the scorecard.
    """

    method: str
    preflight: Preflight
    scorecard: Scorecard
    controls: list[Control]
    radar: Radar | None
    seconds: float
    patch: Patch | None = attached("edit.safetensors")

    @derived
    def layers(self) -> list[int]:
        """The layers that were changed."""
        return [one.site.layer for one in self.preflight.layers if one.site.layer is not None]

    @derived
    def target_probability(self) -> BeforeAfter:
        """Of the first token of each target, mean over the facts."""
        both = [fact.target_probability for fact in self.scorecard.facts]
        before, after = sum(one.before for one in both), sum(one.after for one in both)
        return BeforeAfter(before / len(both), after / len(both))

    @derived
    def free_generation(self) -> FreeText:
        """What is written after the first fact's own prompt."""
        return self.scorecard.facts[0].free[0]

    def rows(self) -> list[dict[str, object]]:
        return [
            {
                "prompt": fact.prompt,
                "subject": fact.subject,
                "target": fact.target,
                "target_before": fact.target_probability.before,
                "target_after": fact.target_probability.after,
                "says_target": fact.says_target.after,
            }
            for fact in self.scorecard.facts
        ]


def run(lab: Lab, settings: Settings) -> EditResult:
    require_causal(lab.model)
    facts = completed(lab, asked(settings.fact, settings.source), settings.scoring.text.bos)
    prompts = settings.controls.read()
    corpus = lab.corpus(settings.scoring.text, fit=True)
    ready = preparation(lab, settings.covariance, settings.scoring.text)
    edited = edit(ready, facts, settings.edit)
    if not settings.force:
        _refuse_harm(edited.preflight)
    scores = scored(lab, edited.patch, facts, prompts, settings.scoring, ready.config.seed)
    recorded = replace(settings, source=as_recorded(settings.source))
    return EditResult(
        edited.method,
        edited.preflight,
        scores.scorecard,
        scores.controls,
        scores.radar,
        edited.seconds,
        edited.patch,
        provenance=lab.provenance(recorded, corpus.record()),
    )


def _refuse_harm(preflight: Preflight) -> None:
    """Raises: Refused if the forecast is as bad as that."""
    worst = preflight.worst
    if worst.verdict == "refuse":
        raise Refused(
            f"the output of {worst.site} would change by {worst.relative_damage:.0%} on ordinary"
            f" text, over the limit of {REFUSE:.0%}, so no patch was made; try other ‹layers›, more"
            " ‹tokens›, a prompt with words before the subject, or ‹force›."
        )


# -- what the studies of edits share --------------------------------------------------------------


def require_facts(fact: FactSettings, source: FactsSettings) -> None:
    """Raises: BadInput unless one fact is named, or several."""
    if source.facts is not None and fact.given:
        raise BadInput("give either ‹facts›, or ‹prompt›, ‹subject› and ‹target›.")
    if source.facts is None and None in (fact.prompt, fact.subject, fact.target):
        raise BadInput("an edit needs ‹prompt›, ‹subject› and ‹target›, or ‹facts›.")


def asked(fact: FactSettings, source: FactsSettings) -> list[Fact]:
    """The facts to edit. Raises: BadText, BadInput; BadInput for one without a target."""
    if source.facts is None:
        facts = [Fact(str(fact.prompt), str(fact.subject), fact.target, fact.true)]
    else:
        facts = source.read()
    for number, one in enumerate(facts, 1):
        if one.target is None or not one.target.strip():
            which = f"fact {number} ({one.text!r})" if source.facts is not None else "the fact"
            raise BadInput(
                f"the ‹target› of {which} is empty; give the word or words that the model should"
                " say, like Rome."
            )
    return facts


def as_recorded(source: FactsSettings) -> FactsSettings:
    """The same, with facts that are no file as they are written down."""
    if source.facts is None or isinstance(source.facts, str | Path):
        return source
    return replace(source, facts=[as_record(fact) for fact in facts_of(source.facts)])


def completed(lab: Lab, facts: Sequence[Fact], bos: str) -> list[Fact]:
    """The facts with the neighbours that the others of their relation make."""
    return with_neighbours(lab.model, lab.tokenizer, facts, bos=bos)


def preparation(lab: Lab, settings: CovarianceSettings, text: TextSettings) -> Preparation:
    """Contexts and covariances of the lab's model as it stands, made once.

    text: how the text of the covariance is cut, if one is named.
    """
    patches = tuple(patch.digest for patch in applied_patches(lab.anatomy))
    key = ("preparation", settings, text.window, text.bos, patches)
    ready: Preparation = lab.once(key, partial(_prepare, lab, settings, text))
    ready.progress = lab.tell
    return ready


def _prepare(lab: Lab, settings: CovarianceSettings, text: TextSettings) -> Preparation:
    corpus = None
    if settings.covariance_text is not None:
        window = min(text.window, lab.positions or text.window)
        corpus = lab.corpus(
            TextSettings(text=settings.covariance_text, window=window, bos=text.bos)
        )
    cache = None
    if lab.fingerprint is not None and not settings.no_cache:
        cache = CovarianceCache(Path(settings.cache) if settings.cache else default_folder())
    config = replace(settings.prepare, bos=text.bos)
    return Preparation(lab.anatomy, lab.tokenizer, config, corpus, cache, lab.fingerprint or "")


class Scores(NamedTuple):
    """What the edited model was found to do."""

    scorecard: Scorecard
    controls: list[Control]
    radar: Radar | None


def scored(
    lab: Lab,
    patch: Patch,
    facts: Sequence[Fact],
    prompts: Sequence[str],
    settings: ScoringSettings,
    seed: int,
) -> Scores:
    """The model examined without the patch and with it. seed: of the intervals."""
    corpus = lab.corpus(settings.text, fit=True)
    look = partial(
        examine,
        lab.model,
        lab.tokenizer,
        facts,
        prompts,
        corpus,
        settings.score,
        settings.text.bos,
    )
    lab.tell("scorecard", 0, 2)
    before = look()
    lab.tell("scorecard", 1, 2)
    with patch.applied(lab.anatomy):
        after = look()
    lab.tell("scorecard", 2, 2)
    touched = None
    if settings.radar:
        touched = radar(lab.anatomy, lab.tokenizer, patch, corpus.windows, settings.radar)
    return Scores(scorecard(before, after, seed), compared_controls(before, after), touched)
