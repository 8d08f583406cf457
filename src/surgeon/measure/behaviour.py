"""What a model writes: greedy generations, how often they loop, how much weight stop words get."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
import transformers
from jaxtyping import Int64
from torch import Tensor, nn

from ..corpus import prompt_ids
from ..result import record
from .decoder import Decoder
from .likelihood import batches, logits_of

_WORDS = "the a an and of to in is it was that on for with as at by"
STOP_WORDS = (*_WORDS.split(), ",", ".")
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
    tokenizer: transformers.PreTrainedTokenizerBase,
    prompts: Sequence[str],
    new_tokens: int = 40,
    bos: str = "auto",
) -> list[Behaviour]:
    """Greedy continuations of `new_tokens` tokens, or fewer if the model ends the text.

    Raises: BadInput for a prompt without a token.

    >>> import surgeon
    >>> patient = surgeon.load_model("patient")
    >>> generate(patient.model, patient.tokenizer, ["The capital of France is"], new_tokens=2)
    [Behaviour(prompt='The capital of France is', text=' Paris.', loop=0)]
    """
    longest = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    results = []
    # prompt by prompt: without padding there is no padding side to get wrong
    for prompt in prompts:
        ids = prompt_ids(tokenizer, prompt, bos)
        room = new_tokens if longest is None else min(new_tokens, longest - ids.shape[1])
        new = _greedy(model, ids, room, tokenizer.eos_token_id)
        text = str(tokenizer.decode(new, skip_special_tokens=True))
        results.append(Behaviour(prompt, text, loop_rate(new)))
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
    tokenizer: transformers.PreTrainedTokenizerBase,
    windows: Int64[Tensor, "n window"],
    prompts: Sequence[str],
    stop_words: Sequence[str] = STOP_WORDS,
    bos: str = "auto",
) -> BehaviourState:
    """The behaviour of the model as it is now, on a text and after prompts."""
    texts = generate(model, tokenizer, prompts, bos=bos)
    share = stop_word_share(model, windows, stop_word_ids(tokenizer, stop_words))
    return BehaviourState(share, sum(text.loop for text in texts) / len(texts), texts)


def _greedy(
    model: nn.Module, ids: Int64[Tensor, "1 pos"], new_tokens: int, stop: int | None
) -> list[int]:
    """The likeliest token after `ids`, then after that, and so on; it ends before `stop`."""
    decoder = Decoder(model)
    new: list[int] = []
    step = ids
    while len(new) < new_tokens:
        step = decoder.read(step).argmax(-1, keepdim=True)
        token = int(step)
        if token == stop:
            break
        new.append(token)
    return new


def loop_rate(tokens: Sequence[int]) -> float:
    """Share of 3-grams that already occurred earlier in the sequence.

    0 for a sequence too short to have two.

    >>> loop_rate([1, 2, 3, 1, 2, 3])
    0.25
    """
    grams = [tuple(tokens[i : i + LOOP_NGRAM]) for i in range(len(tokens) - LOOP_NGRAM + 1)]
    if len(grams) < 2:
        return 0.0
    return 1 - len(set(grams)) / len(grams)


def stop_word_ids(
    tokenizer: transformers.PreTrainedTokenizerBase, words: Sequence[str] = STOP_WORDS
) -> list[int]:
    """The ids of the words that are one token, with and without a leading space."""
    forms = [form for word in words for form in (word, f" {word}")]
    tokens = [tokenizer(form, add_special_tokens=False).input_ids for form in forms]
    return sorted({ids[0] for ids in tokens if len(ids) == 1})


@torch.no_grad()
def stop_word_share(
    model: nn.Module, windows: Int64[Tensor, "n window"], ids: Sequence[int]
) -> float:
    """Mean probability that the next token is one of `ids`, over all predicted tokens."""
    total = count = 0.0
    for batch in batches(windows):
        logits = logits_of(model, batch)[:, :-1].float()
        share = F.softmax(logits, -1)[..., list(ids)].sum(-1)
        total += float(share.double().sum())
        count += share.numel()
    return total / count
