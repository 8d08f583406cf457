"""What the model writes in each state, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..anatomy import Anatomy
from ..measure import Behaviour, generate, require_causal
from ..patch import Patch
from .states import require_stack, stacked, states

PROMPTS = (
    "Once upon a time, there was a little",
    "The capital of France is",
    "My favourite food is",
    "She opened the door and saw",
    "The most important thing to remember is",
    "Water boils at",
    "In the morning the old man went to",
    '"Where are you going?" asked',
    "The three primary colours are red,",
    "It rained all day, so the children",
)
DISTINCT_N = (1, 2, 3)


@dataclass(frozen=True)
class Continuation:
    """What one state wrote after one prompt.

    loop: share of repeated 3-grams of tokens. distinct: different n-grams of words over all.
    """

    text: str
    loop: float
    distinct: dict[int, float]


@dataclass(frozen=True)
class SideBySide:
    """The continuations of each prompt by state, and the means over prompts."""

    prompts: list[str]
    states: dict[str, list[Continuation]]

    def loop_rate(self, state: str) -> float:
        """Mean share of repeated 3-grams of tokens."""
        return _mean([c.loop for c in self.states[state]])

    def distinct(self, state: str, n: int) -> float:
        """Mean share of different n-grams of words."""
        return _mean([c.distinct[n] for c in self.states[state]])

    def to_json(self) -> dict[str, Any]:
        summary: dict[str, dict[str, float]] = {}
        for state in self.states:
            summary[state] = {"loop_rate": self.loop_rate(state)}
            summary[state] |= {f"distinct_{n}": self.distinct(state, n) for n in DISTINCT_N}
        generations = []
        for i, prompt in enumerate(self.prompts):
            texts = {state: written[i].text for state, written in self.states.items()}
            generations.append({"prompt": prompt, **texts})
        return {"summary": summary, "generations": generations}


def side_by_side(
    anatomy: Anatomy,
    tokenizer: PreTrainedTokenizerBase,
    patches: Sequence[Patch],
    prompts: Sequence[str] = (),
    new_tokens: int = 40,
    bos: str = "auto",
) -> SideBySide:
    """Continue ten reference prompts and `prompts` greedily in every state.

    Raises: BadInput; as `Patch.apply_`.
    """
    require_causal(anatomy.model)
    require_stack(anatomy, patches)
    asked = [*PROMPTS, *prompts]
    written = {}
    for state, some in states(patches).items():
        with stacked(anatomy, some):
            continued = generate(anatomy.model, tokenizer, asked, new_tokens, bos)
        written[state] = [_continuation(behaviour) for behaviour in continued]
    return SideBySide(asked, written)


def _continuation(behaviour: Behaviour) -> Continuation:
    words = behaviour.text.split()
    share = {n: distinct(words, n) for n in DISTINCT_N}
    return Continuation(behaviour.text, behaviour.loop, share)


def distinct(words: Sequence[str], n: int) -> float:
    """Different n-grams over all n-grams; 0 for a text too short to have one.

    Source: Li et al. 2016, arXiv:1510.03055.

    >>> distinct("the cat and the cat".split(), 2)
    0.75
    """
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
