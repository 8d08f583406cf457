"""What the model writes in each state, side by side."""

from __future__ import annotations

from collections.abc import Sequence

import transformers

from ..anatomy import Anatomy
from ..measure import Behaviour, generate, require_causal
from ..patch import Patch, stacked
from ..result import record
from .states import require_stack, states

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


@record
class Written:
    """What one state writes, as means over the prompts.

    loop_rate: share of repeated 3-grams of tokens. distinct_n: different n-grams of words over all.
    """

    loop_rate: float
    distinct_1: float
    distinct_2: float
    distinct_3: float


@record
class Continuations:
    """What each state writes after one prompt; `patched` is None without a repair."""

    prompt: str
    base: str
    broken: str
    patched: str | None = None


@record
class SideBySide:
    """The continuations of each prompt, and the means over prompts by state."""

    summary: dict[str, Written]
    generations: list[Continuations]


def side_by_side(
    anatomy: Anatomy,
    tokenizer: transformers.PreTrainedTokenizerBase,
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
    texts: dict[str, list[str]] = {}
    summary = {}
    for state, some in states(patches).items():
        with stacked(anatomy, some):
            written = generate(anatomy.model, tokenizer, asked, new_tokens, bos)
        texts[state] = [each.text for each in written]
        summary[state] = _summary(written)
    each = zip(*texts.values(), strict=True)
    generations = [
        Continuations(prompt, *several) for prompt, several in zip(asked, each, strict=True)
    ]
    return SideBySide(summary, generations)


def _summary(written: Sequence[Behaviour]) -> Written:
    words = [each.text.split() for each in written]
    means = [_mean([distinct(some, n) for some in words]) for n in (1, 2, 3)]
    return Written(_mean([each.loop for each in written]), *means)


def distinct(words: Sequence[str], n: int) -> float:
    """Different n-grams over all n-grams; 0 for a text too short to have one.

    Source: Li et al. 2016, arXiv:1510.03055.
    """
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
