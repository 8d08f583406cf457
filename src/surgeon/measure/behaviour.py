"""What a model writes: greedy generations, how often they loop, how much weight stop words get."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Int64
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..corpus import prompt_ids
from ..result import record
from .decoder import Decoder
from .likelihood import batches, logits_of

STOP_WORDS = (
    "the",
    "a",
    "an",
    "and",
    "of",
    "to",
    "in",
    "is",
    "it",
    "was",
    "that",
    "on",
    "for",
    "with",
    "as",
    "at",
    "by",
    ",",
    ".",
)
LOOP_NGRAM = 3


@record
class Behaviour:
    """One prompt and what the model wrote after it, greedily.

    `loop` is the share of repeated 3-grams of tokens.
    """

    prompt: str
    text: str
    loop: float


@torch.no_grad()
def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    new_tokens: int = 40,
    bos: str = "auto",
) -> list[Behaviour]:
    """Greedy continuations, prompt by prompt (no padding, so no padding side to get wrong); ends
    early at EOS.
    """
    results = []
    device = next(model.parameters()).device
    longest = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    stop = tokenizer.eos_token_id
    for prompt in prompts:
        ids = prompt_ids(tokenizer, prompt, bos).to(device)
        start, decoder, step = ids.shape[1], Decoder(model), ids
        for _ in range(new_tokens if longest is None else max(0, min(new_tokens, longest - start))):
            step = decoder.read(step).argmax(-1, keepdim=True)
            if int(step) == stop:
                break
            ids = torch.cat([ids, step], 1)
        new = ids[0, start:].tolist()
        results.append(
            Behaviour(prompt, str(tokenizer.decode(new, skip_special_tokens=True)), loop_rate(new))
        )
    return results


@record
class BehaviourState:
    """What a model writes in one state: stop words' mean probability, loops, texts."""

    stop_word_probability: float
    loop_rate: float
    generations: list[Behaviour]


@record
class Behaviours:
    """The base beside the changed model: KL in nats, top-1 agreement, and what each writes."""

    kl_from_base: float
    top1_agreement: float
    base: BehaviourState
    ablated: BehaviourState


@torch.no_grad()
def behaviour_state(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    windows: Int64[Tensor, "n window"],
    prompts: Sequence[str],
    stop_words: Sequence[str] = STOP_WORDS,
    bos: str = "auto",
) -> BehaviourState:
    """The behaviour of the model as it is now, on a text and after prompts."""
    texts = generate(model, tokenizer, prompts, bos=bos)
    share = stop_word_share(model, windows, stop_word_ids(tokenizer, stop_words))
    return BehaviourState(share, sum(text.loop for text in texts) / len(texts), texts)


def loop_rate(tokens: Sequence[int]) -> float:
    """Share of 3-grams that already occurred earlier in the sequence; 0 for sequences too short to
    have two.
    """
    grams = [tuple(tokens[i : i + LOOP_NGRAM]) for i in range(len(tokens) - LOOP_NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if len(grams) > 1 else 0.0


def stop_word_ids(
    tokenizer: PreTrainedTokenizerBase, words: Sequence[str] = STOP_WORDS
) -> list[int]:
    """The ids of the words that are one token, with and without a leading space."""
    ids = {
        tuple(tokenizer(form, add_special_tokens=False).input_ids)
        for word in words
        for form in (word, f" {word}")
    }
    return sorted({one[0] for one in ids if len(one) == 1})


@torch.no_grad()
def stop_word_share(
    model: nn.Module, windows: Int64[Tensor, "n window"], ids: Sequence[int]
) -> float:
    """Mean probability that the next token is one of `ids`."""
    total = count = 0.0
    for batch in batches(windows):
        p = F.softmax(logits_of(model, batch)[:, :-1].float(), -1)[..., list(ids)].sum(-1)
        total += float(p.double().sum())
        count += p.numel()
    return total / count
