"""Texts to stand before a prompt, so that an edit holds wherever the subject is mentioned; and text
that a model writes by itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import transformers
from jaxtyping import Int64
from torch import Tensor

from ..anatomy import Anatomy
from ..corpus import bos_ids
from ..measure import Decoder
from ..settings import setting

STARTS = ("The", "Therefore", "Because", "I", "You")  # where there is no BOS to begin with
ROWS = 64  # texts in one batch


@dataclass(frozen=True)
class ContextConfig:
    """Settings of the contexts. The bare prompt is always one of them, the first."""

    contexts: int = setting(
        10, "texts, written by the model, to stand before the prompt", low=0, group="Value"
    )
    context_tokens: int = setting(10, "tokens of each of these texts", low=1, group="Value")
    own_contexts: tuple[str, ...] = setting(
        (), "text to use instead", spelled="context", metavar="TEXT", group="Value"
    )


def prefixes(
    anatomy: Anatomy,
    tokenizer: transformers.PreTrainedTokenizerBase,
    config: ContextConfig = ContextConfig(),
    seed: int = 0,
    bos: str = "auto",
) -> list[str]:
    """ "", then each context with the end of its sentence and a space."""
    texts = list(config.own_contexts)
    if not texts and config.contexts:
        ids = sampled(anatomy, tokenizer, config.contexts, config.context_tokens, seed, bos)
        texts = [
            str(tokenizer.decode(row, skip_special_tokens=True)).strip() for row in ids.tolist()
        ]
    return ["", *(f"{text.rstrip(' .,;:')}. " for text in texts if text.strip(" .,;:"))]


@torch.no_grad()
def sampled(
    anatomy: Anatomy,
    tokenizer: transformers.PreTrainedTokenizerBase,
    count: int,
    tokens: int,
    seed: int,
    bos: str = "auto",
) -> Int64[Tensor, "count pos"]:
    """Texts that the model writes after BOS, or after one of STARTS without it: ids (count, head +
    tokens), drawn on the CPU by `seed`.
    """
    generator = torch.Generator().manual_seed(seed)
    special = [i for i in tokenizer.all_special_ids if i is not None]
    head = bos_ids(tokenizer, bos)
    heads = [head or tokenizer(start, add_special_tokens=False).input_ids[:1] for start in STARTS]
    texts = []
    for first in range(0, count, ROWS):
        ids = torch.tensor([heads[i % len(heads)] for i in range(first, min(count, first + ROWS))])
        decoder, new = Decoder(anatomy.model), ids
        for _ in range(tokens):
            logits = decoder.read(new).cpu()
            # a special token would end the text, or begin another
            logits[:, [i for i in special if i < logits.shape[1]]] = -torch.inf
            new = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            ids = torch.cat([ids, new], 1)
        texts.append(ids)
    return torch.cat(texts)
