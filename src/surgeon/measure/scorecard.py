"""The scorecard of edited facts: efficacy, paraphrase, neighbourhood, control prompts, free text;
each before and after.

The three success shares and their harmonic mean are those of CounterFact (Meng et al. 2022,
arXiv:2202.05262, section 3.4).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import exp, log2
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..corpus import Corpus
from ..facts import Fact
from ..subject import SLOT
from .behaviour import generate, loop_rate
from .bootstrap import interval
from .continuation import continuations, next_tokens
from .likelihood import mean_nll

CONFABULATION = ("{} was founded by", "{} is served with", "{} is known for")


@dataclass(frozen=True)
class ScoreConfig:
    """Settings of the scorecard."""

    new_tokens: int = field(default=20, metadata={"help": "tokens of each free continuation"})
    confabulation: tuple[str, ...] = field(
        default=CONFABULATION, metadata={"help": "prompts about the subject to continue freely"}
    )
    seed: int = field(default=0, metadata={"help": "seed of the intervals"})


@dataclass(frozen=True)
class Answer:
    """One prompt: P(target), P(true) (geometric means over tokens; true is None if not known), P of
    the target's first token, and whether target and true are what the model says,
    teacher-forced."""

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
    tokenizer: PreTrainedTokenizerBase,
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
            *(c.replace(SLOT, fact.subject) for c in config.confabulation),
            *fact.generation,
        ]
        said = generate(model, tokenizer, prompts, config.new_tokens, bos)
        free.append([(b.prompt, b.text) for b in said])
        hits.append(said[0].text.strip().casefold().startswith(fact.target.strip().casefold()))
        ids = [tokenizer(b.text, add_special_tokens=False).input_ids for b in said]
        loops += [loop_rate(i) for i in ids]
        entropies += [ngram_entropy(i) for i in ids]
    asked_controls = next_tokens(model, tokenizer, controls, bos) if controls else []
    return Examination(
        tuple(facts),
        own,
        paraphrases,
        neighbours,
        [(prompt, token, p) for prompt, (token, p) in zip(controls, asked_controls, strict=True)],
        free,
        hits,
        _mean(entropies) or 0.0,
        _mean(loops) or 0.0,
        None if corpus is None else mean_nll(model, corpus.windows),
    )


def _answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[tuple[str, str | None]],
    target: str,
    bos: str,
) -> list[Answer]:
    wanted = continuations(model, tokenizer, [(prompt, target) for prompt, _ in asked], bos)
    known = [(prompt, true) for prompt, true in asked if true is not None]
    others = iter(continuations(model, tokenizer, known, bos) if known else [])
    found = []
    for (prompt, true), (log_p, says) in zip(asked, wanted, strict=True):
        true_p, says_true = (
            (None, False)
            if true is None
            else next((float(lp.mean().exp()), s) for lp, s in [next(others)])
        )
        found.append(
            Answer(
                prompt, float(log_p.mean().exp()), float(log_p[0].exp()), true_p, says, says_true
            )
        )
    return found


def ngram_entropy(tokens: Sequence[int]) -> float:
    """Entropy of 2-grams and 3-grams, weighted 2/3 and 4/3 as in Meng et al.

    2022, in bits; 0 for texts too short to have two.
    """
    total = 0.0
    for n, weight in ((2, 2 / 3), (3, 4 / 3)):
        counts = Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))
        every = sum(counts.values())
        total += (
            weight * -sum(c / every * log2(c / every) for c in counts.values()) / 2
            if every
            else 0.0
        )
    return total


@dataclass(frozen=True)
class Share:
    """A share of successes over prompts and its mean difference of probabilities, before and after,
    with the 95% interval of the share after, over facts. None where there are no prompts."""

    prompts: int
    before: float | None
    after: float | None
    ci95: tuple[float, float] | None
    magnitude_before: float | None
    magnitude_after: float | None


@dataclass(frozen=True)
class Scorecard:
    """An edited model beside the one before.

    `kept`: of the neighbours that were answered rightly before, the share that still is.
    """

    before: Examination
    after: Examination
    config: ScoreConfig

    @property
    def efficacy(self) -> Share:
        return self._share([[a] for a in self.before.own], [[a] for a in self.after.own], +1)

    @property
    def paraphrase(self) -> Share:
        return self._share(self.before.paraphrases, self.after.paraphrases, +1)

    @property
    def neighbourhood(self) -> Share:
        return self._share(self.before.neighbours, self.after.neighbours, -1)

    @property
    def harmonic_mean(self) -> float | None:
        shares = [s.after for s in (self.efficacy, self.paraphrase, self.neighbourhood)]
        if any(s is None for s in shares):
            return None
        return 3 / sum(1 / s for s in shares if s) if all(shares) else 0.0

    @property
    def kept(self) -> tuple[int, int]:
        """How many neighbours were answered rightly before, and how many of them still are."""
        pairs = [
            (a.says_true, b.says_true)
            for before, after in zip(self.before.neighbours, self.after.neighbours, strict=True)
            for a, b in zip(before, after, strict=True)
        ]
        return sum(a for a, _ in pairs), sum(a and b for a, b in pairs)

    def _share(self, before: list[list[Answer]], after: list[list[Answer]], sign: int) -> Share:
        """Success: P(target) > P(true) (sign +1), or the reverse; where true is not known, whether
        the target is what the model says.
        """

        def success(a: Answer) -> float:
            if a.true is None:
                return float(a.says_target if sign > 0 else not a.says_target)
            return float(sign * (a.target - a.true) > 0)

        def magnitude(a: Answer) -> float:
            return sign * (a.target - (a.true or 0.0))

        flat = [[success(a) for a in answers] for answers in after if answers]
        ci = None
        if flat:
            ci = interval(
                torch.tensor([sum(f) / len(f) for f in flat], dtype=torch.float64), self.config.seed
            )
        first, second = ([a for answers in group for a in answers] for group in (before, after))
        return Share(
            len(second),
            _mean([success(a) for a in first]),
            _mean([success(a) for a in second]),
            ci,
            _mean([magnitude(a) for a in first]),
            _mean([magnitude(a) for a in second]),
        )

    def controls(self) -> list[dict[str, Any]]:
        return [
            {
                "prompt": prompt,
                "before": [token, p],
                "after": [token_after, p_after],
                "changed": token != token_after,
            }
            for (prompt, token, p), (_, token_after, p_after) in zip(
                self.before.controls, self.after.controls, strict=True
            )
        ]

    def to_json(self) -> dict[str, Any]:
        known, kept = self.kept
        nll = {"before": self.before.nll, "after": self.after.nll}
        return {
            **{
                name: vars(getattr(self, name))
                for name in ("efficacy", "paraphrase", "neighbourhood")
            },
            "harmonic_mean": self.harmonic_mean,
            "neighbours_known_before": known,
            "neighbours_kept": kept,
            "free_generation_success": {
                w: _mean([float(h) for h in e.free_hits])
                for w, e in (("before", self.before), ("after", self.after))
            },
            "ngram_entropy": {"before": self.before.entropy, "after": self.after.entropy},
            "loop_rate": {"before": self.before.loop, "after": self.after.loop},
            "nll": nll,
            "ppl": {
                state: None if value is None else exp(min(value, 700.0))
                for state, value in nll.items()
            },
            "facts": [
                {
                    "prompt": fact.text,
                    "subject": fact.subject,
                    "target": fact.target,
                    "target_probability": {"before": a.first, "after": b.first},
                    "says_target": {"before": a.says_target, "after": b.says_target},
                    "free": [
                        {"prompt": prompt, "before": text, "after": text_after}
                        for (prompt, text), (_, text_after) in zip(free, free_after, strict=True)
                    ],
                }
                for fact, a, b, free, free_after in zip(
                    self.before.facts,
                    self.before.own,
                    self.after.own,
                    self.before.free,
                    self.after.free,
                    strict=True,
                )
            ],
        }


def with_neighbours(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    facts: Sequence[Fact],
    limit: int = 10,
    bos: str = "auto",
) -> list[Fact]:
    """The facts, where one has a relation and no neighbours of its own, with other subjects of that
    relation which the model knows.
    """

    related = [f for f in facts if f.relation is not None and f.true is not None]
    known = (
        continuations(model, tokenizer, [(f.text, str(f.true)) for f in related], bos)
        if related
        else []
    )
    right = [f for f, (_, says) in zip(related, known, strict=True) if says]
    found = []
    for fact in facts:
        others = [
            f
            for f in right
            if f.relation == fact.relation
            and f.subject != fact.subject
            and fact.relation is not None
        ]
        found.append(
            fact
            if fact.neighbours
            else replace(fact, neighbours=tuple((f.text, f.true) for f in others[:limit]))
        )
    return found


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
