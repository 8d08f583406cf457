"""How likely a model finds given words after a prompt, and what it would say instead."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..corpus import prompt_ids
from ..errors import BadInput
from ..subject import target_ids
from .likelihood import TOKENS_PER_BATCH

Pair = tuple[str, str]


def continuations(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], bos: str = "auto"
) -> list[tuple[Float[Tensor, " tokens"], bool]]:
    """For each (prompt, continuation): the log-probability of each of its tokens, and whether each
    of them is the argmax.

    Teacher-forced. Raises: BadInput for an empty continuation.
    """
    prompts = [prompt_ids(tokenizer, prompt, bos)[0].tolist() for prompt, _ in pairs]
    targets = [target_ids(tokenizer, prompt, words) for prompt, words in pairs]
    found: list[tuple[Tensor, bool]] = []
    for part, log_p in _log_probabilities(
        model, [p + t[:-1] for p, t in zip(prompts, targets, strict=True)]
    ):
        for row, i in enumerate(part):
            start = len(prompts[i]) - 1
            here = log_p[row, start : start + len(targets[i])]
            ids = torch.tensor(targets[i])
            found.append((here.gather(1, ids[:, None])[:, 0], bool((here.argmax(1) == ids).all())))
    return found


def next_tokens(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], bos: str = "auto"
) -> list[tuple[str, float]]:
    """For each prompt, the most likely next token and its probability."""
    rows = [prompt_ids(tokenizer, prompt, bos)[0].tolist() for prompt in prompts]
    found = []
    for part, log_p in _log_probabilities(model, rows):
        for row, i in enumerate(part):
            best = log_p[row, len(rows[i]) - 1].max(0)
            found.append((str(tokenizer.decode([int(best.indices)])), float(best.values.exp())))
    return found


@torch.no_grad()
def _log_probabilities(
    model: nn.Module, rows: Sequence[Sequence[int]]
) -> Iterator[tuple[range, Float[Tensor, "batch pos d_vocab"]]]:
    """Batches of rows in their order: which rows, and their log-probabilities in float32 on the
    CPU.

    Padded on the right without a mask: the model is causal, so what stands there changes nothing
    before it.
    """
    device = next(model.parameters()).device
    start = 0
    while start < len(rows):
        stop, width = start, 0
        while stop < len(rows) and (
            stop == start or (stop + 1 - start) * max(width, len(rows[stop])) <= TOKENS_PER_BATCH
        ):
            width = max(width, len(rows[stop]))
            stop += 1
        ids: Int64[Tensor, "batch pos"] = torch.tensor(
            [[*row, *[row[-1]] * (width - len(row))] for row in rows[start:stop]]
        )
        logits = getattr(model(input_ids=ids.to(device), use_cache=False), "logits", None)
        if not isinstance(logits, Tensor):
            raise BadInput(
                f"{type(model).__name__} gives no next-token logits; this measure needs a causal"
                " language model."
            )
        yield range(start, stop), F.log_softmax(logits.float(), -1).cpu()
        start = stop
