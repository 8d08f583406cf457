"""How likely a model finds given words after a prompt, and what it would say instead."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
import transformers
from jaxtyping import Float, Int64
from torch import Tensor, nn

from ..corpus import prompt_ids
from ..errors import BadInput
from ..subject import target_ids
from .likelihood import TOKENS_PER_BATCH

Pair = tuple[str, str]
Ids = list[int]


def continuations(
    model: nn.Module,
    tokenizer: transformers.PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    bos: str = "auto",
) -> list[tuple[Float[Tensor, " tokens"], bool]]:
    """For each (prompt, continuation), the log-probability of each token of the continuation.

    With it comes whether the model would have said each of them itself, as the argmax. Each token
    is predicted from the prompt and the tokens before it as they were given (teacher forcing).
    Raises: BadInput for an empty continuation.

    >>> import surgeon
    >>> patient = surgeon.load_model("patient")
    >>> pairs = [("The capital of France is", "Paris")]
    >>> ((log_p, said),) = continuations(patient.model, patient.tokenizer, pairs)
    >>> bool(log_p.sum().exp() > 0.5), said
    (True, True)
    """
    prompts = [prompt_ids(tokenizer, prompt, bos)[0].tolist() for prompt, _ in pairs]
    targets = [target_ids(tokenizer, prompt, words) for prompt, words in pairs]
    # the last token predicts nothing that is asked for
    rows = [prompt + target[:-1] for prompt, target in zip(prompts, targets, strict=True)]
    results: list[tuple[Tensor, bool]] = []
    for prompt, target, log_p in zip(
        prompts, targets, _log_probabilities(model, rows), strict=True
    ):
        ids = torch.tensor(target)
        predicted = log_p[len(prompt) - 1 :]  # position i predicts token i + 1
        of_target = predicted.gather(1, ids[:, None])[:, 0]
        results.append((of_target, bool((predicted.argmax(1) == ids).all())))
    return results


def next_tokens(
    model: nn.Module,
    tokenizer: transformers.PreTrainedTokenizerBase,
    prompts: Sequence[str],
    bos: str = "auto",
) -> list[tuple[str, float]]:
    """For each prompt, the most likely next token and its probability."""
    rows = [prompt_ids(tokenizer, prompt, bos)[0].tolist() for prompt in prompts]
    results = []
    for log_p in _log_probabilities(model, rows):
        best, token = log_p[-1].max(0)
        results.append((str(tokenizer.decode([int(token)])), float(best.exp())))
    return results


@torch.no_grad()
def _log_probabilities(
    model: nn.Module, rows: Sequence[Ids]
) -> Iterator[Float[Tensor, "pos d_vocab"]]:
    """The log-probabilities after each position of each row, in float32 on the CPU.

    Batches are padded on the right without a mask: the model is causal, so what stands there
    changes nothing before it.
    """
    device = next(model.parameters()).device
    for batch in _batches(rows):
        width = max(map(len, batch))
        padded = [row + [row[-1]] * (width - len(row)) for row in batch]
        ids: Int64[Tensor, "batch pos"] = torch.tensor(padded, device=device)
        logits = getattr(model(input_ids=ids, use_cache=False), "logits", None)
        if not isinstance(logits, Tensor):
            raise BadInput(
                f"{type(model).__name__} gives no next-token logits; this measure needs a causal"
                " language model."
            )
        log_p = F.log_softmax(logits.float(), -1).cpu()
        for i, row in enumerate(batch):
            yield log_p[i, : len(row)]


def _batches(rows: Sequence[Ids]) -> Iterator[list[Ids]]:
    """The rows in their order, as many at once as stay within the budget of tokens when padded."""
    batch: list[Ids] = []
    width = 0
    for row in rows:
        width = max(width, len(row))
        if batch and (len(batch) + 1) * width > TOKENS_PER_BATCH:
            yield batch
            batch, width = [], len(row)
        batch.append(row)
    if batch:
        yield batch
