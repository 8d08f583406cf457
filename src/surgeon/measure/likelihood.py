"""Negative log-likelihood of a corpus, in nats per predicted token."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from math import exp

import torch
from jaxtyping import Float64, Int64
from torch import Tensor, nn

from ..errors import BadInput
from ..tap import LayerInput, capture, resume

# small enough for the caches of a CPU: the same numbers as with 4096, in two thirds of the time
TOKENS_PER_BATCH = 1024
CHUNK = 32  # positions whose likelihood is taken at once
LARGEST_EXPONENT = 700.0  # above it exp() has no float


def batches(windows: Int64[Tensor, "n window"]) -> list[Int64[Tensor, "batch window"]]:
    """The windows in batches of at most TOKENS_PER_BATCH tokens, in order."""
    return list(torch.split(windows, max(1, TOKENS_PER_BATCH // windows.shape[1])))


def logits_of(model: nn.Module, ids: Int64[Tensor, "batch pos"]) -> Tensor:
    """Next-token logits (batch, pos, d_vocab).

    Raises: BadInput for a model that does not predict the next token.
    """
    output = model(input_ids=ids.to(next(model.parameters()).device), use_cache=False)
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() != 3:
        raise BadInput(
            f"{type(model).__name__} gives no next-token logits; this measure needs a causal"
            " language model."
        )
    return logits


def require_causal(model: nn.Module) -> None:
    """Raises: BadInput for a masked or other model whose logits are not of the next token."""
    name = type(model).__name__
    if (
        not hasattr(model, "generate")
        or "Masked" in name
        or getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    ):
        raise BadInput(
            f"{name} is not a causal language model, so it has no next-token likelihood; only"
            " `sites` and patches work on it."
        )


def token_nll(logits: Tensor, ids: Tensor) -> Float64[Tensor, "batch predicted"]:
    """NLL of each predicted token, that is of all but the first of each window."""
    targets = ids[:, 1:].to(logits.device)
    windows = []
    for one, wanted in zip(logits, targets, strict=True):
        # a few positions at a time: what logsumexp makes on the way then fits into caches
        parts = zip(one[:-1].split(CHUNK), wanted.split(CHUNK), strict=True)
        windows.append(torch.cat([_nll_of(part.float(), at) for part, at in parts]))
    return torch.stack(windows).double().cpu()


def _nll_of(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.logsumexp(-1) - logits.gather(-1, targets[:, None])[:, 0]


@torch.no_grad()
def window_nll(model: nn.Module, windows: Int64[Tensor, "n window"]) -> Float64[Tensor, " n"]:
    """Mean NLL of each window, in nats per token. Float32 logits, float64 sums."""
    return torch.cat([token_nll(logits_of(model, ids), ids) for ids in batches(windows)]).mean(1)


def mean_nll(model: nn.Module, windows: Int64[Tensor, "n window"]) -> float:
    """Mean NLL over all predicted tokens, in nats."""
    return float(window_nll(model, windows).mean())


def perplexity(nll: float) -> float:
    """exp(NLL), or the largest there is room for.

    >>> perplexity(0.0)
    1.0
    """
    return exp(min(nll, LARGEST_EXPONENT))


class ResumedNLL:
    """`window_nll` for changes at or above one layer: what lies below is computed once.

    Calling it gives the same numbers as `window_nll`, bit for bit, as long as only layers >=
    `start` changed since.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[nn.Module],
        start: int,
        windows: Int64[Tensor, "n window"],
    ) -> None:
        self.model, self.layers, self.windows = model, layers, windows
        device = next(model.parameters()).device
        self.entries: list[LayerInput | None] = [
            capture(model, layers, start, input_ids=ids.to(device)) if start > 0 else None
            for ids in batches(windows)
        ]

    @torch.no_grad()
    def __call__(self) -> Float64[Tensor, " n"]:
        losses = []
        for ids, entry in zip(batches(self.windows), self.entries, strict=True):
            with nullcontext() if entry is None else resume(self.layers, entry):
                losses.append(token_nll(logits_of(self.model, ids), ids))
        return torch.cat(losses).mean(1)
