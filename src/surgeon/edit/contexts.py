"""Texts to stand before a prompt, so that an edit holds wherever the subject is mentioned; and text
that a model writes by itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..anatomy import Anatomy
from ..corpus import bos_ids
from ..errors import BadInput
from ..measure import Decoder

STARTS = ("The", "Therefore", "Because", "I", "You")  # where there is no BOS to begin with
ROWS = 64  # texts in one batch


@dataclass(frozen=True)
class ContextConfig:
    """Settings of the contexts. The bare prompt is always one of them, the first."""

    count: int = field(
        default=10, metadata={"help": "texts, written by the model, to stand before the prompt"}
    )
    tokens: int = field(default=10, metadata={"help": "tokens of each text"})
    fixed: tuple[str, ...] = field(default=(), metadata={"help": "texts to use instead"})

    def __post_init__(self) -> None:
        if self.count < 0 or self.tokens < 1:
            raise BadInput("contexts need a count of at least 0, and at least 1 token each.")


def prefixes(
    anatomy: Anatomy,
    tokenizer: PreTrainedTokenizerBase,
    config: ContextConfig = ContextConfig(),
    seed: int = 0,
    bos: str = "auto",
) -> list[str]:
    """ "", then each context with the end of its sentence and a space."""
    texts = list(config.fixed)
    if not texts and config.count:
        ids = sampled(anatomy, tokenizer, config.count, config.tokens, seed, bos)
        texts = [
            str(tokenizer.decode(row, skip_special_tokens=True)).strip() for row in ids.tolist()
        ]
    return ["", *(f"{text.rstrip(' .,;:')}. " for text in texts if text.strip(" .,;:"))]


@torch.no_grad()
def sampled(
    anatomy: Anatomy,
    tokenizer: PreTrainedTokenizerBase,
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
            logits[:, [i for i in special if i < logits.shape[1]]] = -torch.inf
            new = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            ids = torch.cat([ids, new], 1)
        texts.append(ids)
    return torch.cat(texts)
