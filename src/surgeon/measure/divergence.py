"""How far a changed model's predictions are from the intact model's."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Int64
from torch import Tensor, nn

from .likelihood import batches, logits_of


@dataclass(frozen=True)
class Divergence:
    """Means over all predicted positions: KL(base || changed) in nats, and how often the most likely token agrees."""

    kl: float
    top1_agreement: float


@torch.no_grad()
def divergence(model: nn.Module, windows: Int64[Tensor, "n window"], change: Callable[[], AbstractContextManager[object]]) -> Divergence:
    """Compare the model with itself inside `change()`, batch by batch, so that only one batch of logits is kept."""
    kl = agree = count = 0.0
    for ids in batches(windows):
        base = F.log_softmax(logits_of(model, ids)[:, :-1].float(), -1)
        with change():
            changed = F.log_softmax(logits_of(model, ids)[:, :-1].float(), -1)
        kl += float((base.exp() * (base - changed)).sum(-1).double().sum())
        agree += float((base.argmax(-1) == changed.argmax(-1)).sum())
        count += base.shape[0] * base.shape[1]
    return Divergence(kl / count, agree / count)
