"""The scorecard of edited facts: efficacy, paraphrase, neighbourhood, control prompts, free text;
each before and after.

`examine` asks a model everything once; `scorecard` holds the examination of a model before an edit
beside the one after it. The three success shares and their harmonic mean are those of CounterFact
(Meng et al. 2022, arXiv:2202.05262, section 3.4).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import log2

import torch
import transformers
from torch import nn

from ..corpus import Corpus
from ..facts import Fact
from ..result import derived, record
from ..settings import setting
from ..subject import SLOT
from .behaviour import generate, loop_rate
from .bootstrap import interval
from .continuation import continuations, next_tokens
from .likelihood import mean_nll, perplexity

CONFABULATION = ("{} was founded by", "{} is served with", "{} is known for")


@dataclass(frozen=True)
class ScoreConfig:
    """Settings of the scorecard."""

    new_tokens: int = setting(
        20, "tokens of each free continuation", low=1, group="Scorecard", metavar="N"
    )
    confabulation: tuple[str, ...] = setting(
        CONFABULATION,
        "prompt to continue freely, with {} where the subject stands; not given: three",
        group="Scorecard",
        metavar="PROMPT",
    )


@dataclass(frozen=True)
class Answer:
    """What a model makes of one prompt.

    target, true: the probability of the words, a geometric mean over their tokens; true is None if
    it is not known. first: the probability of the target's first token. says_target, says_true:
    whether they are what the model says, teacher-forced.
    """

    prompt: str
    target: float
    first: float
    true: float | None
    says_target: bool
    says_true: bool


@dataclass(frozen=True)
class Examination:
    """One model, examined on some facts. Per fact: the prompt itself, its paraphrases, its
    neighbours, free continuations.

    For a neighbour `true` is its own answer. controls: most likely next token and its probability.
    free: prompt and text, the first the fact's own prompt. entropy: of n-grams, in bits, mean over
    free texts.
    """

    facts: tuple[Fact, ...]
    own: list[Answer]
    paraphrases: list[list[Answer]]
    neighbours: list[list[Answer]]
    controls: list[tuple[str, str, float]]
    free: list[list[tuple[str, str]]]
    free_hits: list[bool]
    entropy: float
    loop: float
    nll: float | None


def examine(
    model: nn.Module,
    tokenizer: transformers.PreTrainedTokenizerBase,
    facts: Sequence[Fact],
    controls: Sequence[str] = (),
    corpus: Corpus | None = None,
    config: ScoreConfig = ScoreConfig(),
    bos: str = "auto",
) -> Examination:
    """Ask the model as it stands.

    Every fact needs a target. corpus: unrelated text for the perplexity.
    """
    own, paraphrases, neighbours, free, hits, loops, entropies = [], [], [], [], [], [], []
    for fact in facts:
        assert fact.target is not None
        asked = [(fact.text, fact.true), *((p, fact.true) for p in fact.paraphrases)]
        about = [(p, answer if answer is not None else fact.true) for p, answer in fact.neighbours]
        answers = _answers(model, tokenizer, [*asked, *about], fact.target, bos)
        own.append(answers[0])
        paraphrases.append(answers[1 : len(asked)])
        neighbours.append(answers[len(asked) :])
        prompts = [
            fact.text,
            *(prompt.replace(SLOT, fact.subject) for prompt in config.confabulation),
            *fact.generation,
        ]
        written = generate(model, tokenizer, prompts, config.new_tokens, bos)
        free.append([(one.prompt, one.text) for one in written])
        begins = written[0].text.strip().casefold()
        hits.append(begins.startswith(fact.target.strip().casefold()))
        ids = [tokenizer(one.text, add_special_tokens=False).input_ids for one in written]
        loops += [loop_rate(i) for i in ids]
        entropies += [ngram_entropy(i) for i in ids]
    tops = next_tokens(model, tokenizer, controls, bos) if controls else []
    return Examination(
        tuple(facts),
        own,
        paraphrases,
        neighbours,
        [(prompt, token, p) for prompt, (token, p) in zip(controls, tops, strict=True)],
        free,
        hits,
        _mean(entropies) or 0.0,
        _mean(loops) or 0.0,
        None if corpus is None else mean_nll(model, corpus.windows),
    )


def _answers(
    model: nn.Module,
    tokenizer: transformers.PreTrainedTokenizerBase,
    asked: Sequence[tuple[str, str | None]],
    target: str,
    bos: str,
) -> list[Answer]:
    wanted = continuations(model, tokenizer, [(prompt, target) for prompt, _ in asked], bos)
    known = [(prompt, true) for prompt, true in asked if true is not None]
    others = iter(continuations(model, tokenizer, known, bos) if known else [])
    answers = []
    for (prompt, true), (log_p, says_target) in zip(asked, wanted, strict=True):
        true_p, says_true = None, False
        if true is not None:
            true_log_p, says_true = next(others)
            true_p = float(true_log_p.mean().exp())
        p, first = float(log_p.mean().exp()), float(log_p[0].exp())
        answers.append(Answer(prompt, p, first, true_p, says_target, says_true))
    return answers


def ngram_entropy(tokens: Sequence[int]) -> float:
    """Entropy of 2-grams and 3-grams, weighted 2/3 and 4/3 as in Meng et al. 2022, in bits; 0 for
    texts too short to have two.
    """
    total = 0.0
    for n, weight in ((2, 2 / 3), (3, 4 / 3)):
        counts = Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))
        every = sum(counts.values())
        if every:
            entropy = -sum(c / every * log2(c / every) for c in counts.values())
            total += weight * entropy / 2
    return total


# -- before and after -----------------------------------------------------------------------------


@record
class BeforeAfter:
    """A number of the model before the edit, and of the edited model."""

    before: float
    after: float


@record
class Says:
    """Whether the target is what the model says, before the edit and after it."""

    before: bool
    after: bool


@record
class Share:
    """A share of successes over prompts, before and after, with the 95% interval of the share
    after, over facts; None where there are no prompts.

    Success: P(target) > P(true), for neighbours the reverse; where true is not known, that the
    target is what the model says, for neighbours that it is not. magnitude: the mean of
    P(target) - P(true), for neighbours of P(true) - P(target); it can be below 0.
    """

    prompts: int
    before: float | None
    after: float | None
    ci95: tuple[float, float] | None
    magnitude_before: float | None
    magnitude_after: float | None


@record
class FreeText:
    """What the model writes after a prompt, greedily, before the edit and after it."""

    prompt: str
    before: str
    after: str


@record
class Control:
    """A prompt that should not change: the likeliest next token and its probability."""

    prompt: str
    before: tuple[str, float]
    after: tuple[str, float]

    @derived
    def changed(self) -> bool:
        return self.before[0] != self.after[0]


@record
class ScoredFact:
    """One fact. target_probability: of the target's first token after the fact's own prompt.
    free: the first prompt is the fact's own.
    """

    prompt: str
    subject: str
    target: str
    target_probability: BeforeAfter
    says_target: Says
    free: list[FreeText]


@record
class Scorecard:
    """An edited model beside the one before.

    neighbours_kept: of the `neighbours_known_before`, which were answered rightly before, those
    that still are. free_generation_success: the share of facts whose free continuation begins with
    the target. ngram_entropy: of the free texts, in bits. nll: in nats per token, on unrelated
    text; None where none was given.
    """

    efficacy: Share
    paraphrase: Share
    neighbourhood: Share
    neighbours_known_before: int
    neighbours_kept: int
    free_generation_success: BeforeAfter
    ngram_entropy: BeforeAfter
    loop_rate: BeforeAfter
    nll: BeforeAfter | None
    facts: list[ScoredFact]

    @derived
    def harmonic_mean(self) -> float | None:
        """Of the three shares after the edit; None where one has no prompts."""
        shares = [one.after for one in (self.efficacy, self.paraphrase, self.neighbourhood)]
        known = [share for share in shares if share is not None]
        if len(known) < len(shares):
            return None
        return len(known) / sum(1 / share for share in known) if all(known) else 0.0

    @derived
    def ppl(self) -> BeforeAfter | None:
        """exp(nll)."""
        if self.nll is None:
            return None
        return BeforeAfter(perplexity(self.nll.before), perplexity(self.nll.after))


def scorecard(before: Examination, after: Examination, seed: int = 0) -> Scorecard:
    """Two examinations with the same questions beside one another. seed: of the intervals."""
    nll = None
    if before.nll is not None and after.nll is not None:
        nll = BeforeAfter(before.nll, after.nll)
    known, kept = _kept(before, after)
    return Scorecard(
        _share([[a] for a in before.own], [[a] for a in after.own], +1, seed),
        _share(before.paraphrases, after.paraphrases, +1, seed),
        _share(before.neighbours, after.neighbours, -1, seed),
        known,
        kept,
        BeforeAfter(_hit_rate(before), _hit_rate(after)),
        BeforeAfter(before.entropy, after.entropy),
        BeforeAfter(before.loop, after.loop),
        nll,
        _facts(before, after),
    )


def compared_controls(before: Examination, after: Examination) -> list[Control]:
    """The control prompts of two examinations."""
    pairs = zip(before.controls, after.controls, strict=True)
    return [Control(prompt, (a, p), (b, q)) for (prompt, a, p), (_, b, q) in pairs]


def _facts(before: Examination, after: Examination) -> list[ScoredFact]:
    facts = []
    for i, fact in enumerate(before.facts):
        first, second = before.own[i], after.own[i]
        free = zip(before.free[i], after.free[i], strict=True)
        facts.append(
            ScoredFact(
                fact.text,
                fact.subject,
                str(fact.target),
                BeforeAfter(first.first, second.first),
                Says(first.says_target, second.says_target),
                [FreeText(prompt, text, text_after) for (prompt, text), (_, text_after) in free],
            )
        )
    return facts


def _kept(before: Examination, after: Examination) -> tuple[int, int]:
    """How many neighbours were answered rightly before, and how many of them still are."""
    pairs = [
        (a.says_true, b.says_true)
        for answers, later in zip(before.neighbours, after.neighbours, strict=True)
        for a, b in zip(answers, later, strict=True)
    ]
    return sum(a for a, _ in pairs), sum(a and b for a, b in pairs)


def _hit_rate(one: Examination) -> float:
    return _mean([float(hit) for hit in one.free_hits]) or 0.0


def _share(
    before: Sequence[Sequence[Answer]], after: Sequence[Sequence[Answer]], sign: int, seed: int
) -> Share:
    """sign: +1 where the target should be said, -1 where it should not."""

    def success(a: Answer) -> float:
        if a.true is None:
            return float(a.says_target if sign > 0 else not a.says_target)
        return float(sign * (a.target - a.true) > 0)

    def magnitude(a: Answer) -> float:
        return sign * (a.target - (a.true or 0.0))

    by_fact = [_mean([success(a) for a in answers]) for answers in after if answers]
    ci95 = None
    if by_fact:
        ci95 = interval(torch.tensor(by_fact, dtype=torch.float64), seed)
    first, second = ([a for answers in group for a in answers] for group in (before, after))
    return Share(
        len(second),
        _mean([success(a) for a in first]),
        _mean([success(a) for a in second]),
        ci95,
        _mean([magnitude(a) for a in first]),
        _mean([magnitude(a) for a in second]),
    )


# -- neighbours -----------------------------------------------------------------------------------


def with_neighbours(
    model: nn.Module,
    tokenizer: transformers.PreTrainedTokenizerBase,
    facts: Sequence[Fact],
    limit: int = 10,
    bos: str = "auto",
) -> list[Fact]:
    """The facts, where one has a relation and no neighbours of its own, with other subjects of that
    relation which the model knows.
    """
    related = [f for f in facts if f.relation is not None and f.true is not None]
    if not related:
        return list(facts)
    said = continuations(model, tokenizer, [(f.text, str(f.true)) for f in related], bos)
    right = [f for f, (_, says) in zip(related, said, strict=True) if says]
    completed = []
    for fact in facts:
        others = [f for f in right if f.relation == fact.relation and f.subject != fact.subject]
        neighbours = fact.neighbours or tuple((f.text, f.true) for f in others[:limit])
        completed.append(replace(fact, neighbours=neighbours))
    return completed


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
