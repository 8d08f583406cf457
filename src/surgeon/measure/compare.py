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

KEPT = 2**28  # numbers of the intact predictions that are kept between changes: 1 GiB


@dataclass(frozen=True)
class Comparison:
    """Means over all predicted positions: NLL of the changed model and of the intact one and
    KL(base || changed), in nats; how often the likeliest token agrees.

    Each NLL is that of `mean_nll`, bit for bit.
    """

    nll: float
    kl: float
    top1_agreement: float
    base_nll: float


class Reference:
    """The intact model's predictions on a text, against which changes of it are held, one after the
    other. Shapes: windows (n, window).

    They are kept for the next change as long as there is room for `keep` numbers; the rest is
    computed again.
    """

    def __init__(
        self, model: nn.Module, windows: Int64[Tensor, "n window"], keep: int = KEPT
    ) -> None:
        self.model, self.windows, self.keep = model, windows, keep
        self._kept: list[Tensor] = []

    @torch.no_grad()
    def compare(self, change: Callable[[], AbstractContextManager[object]]) -> Comparison:
        """The model inside `change()`, batch by batch."""
        losses: list[Tensor] = []
        base_losses: list[Tensor] = []
        kl = agree = count = 0.0
        for number, ids in enumerate(batches(self.windows)):
            base = self._base(number, ids)
            with change():
                changed = self._predictions(ids)
            losses.append(_loss(changed, ids))
            base_losses.append(_loss(base, ids))
            kl += float((base.exp() * (base - changed)).sum(-1).double().sum())
            agree += float((base.argmax(-1) == changed.argmax(-1)).sum())
            count += base.shape[0] * base.shape[1]
        return Comparison(self._mean(losses), kl / count, agree / count, self._mean(base_losses))

    def _mean(self, losses: list[Tensor]) -> float:
        return float((torch.cat(losses) / (self.windows.shape[1] - 1)).mean())

    def _predictions(self, ids: Int64[Tensor, "batch pos"]) -> Tensor:
        """Log-probabilities of the next token, (batch, pos - 1, d_vocab)."""
        return F.log_softmax(logits_of(self.model, ids)[:, :-1].float(), -1)

    def _base(self, number: int, ids: Int64[Tensor, "batch pos"]) -> Tensor:
        if number < len(self._kept):
            return self._kept[number]
        base = self._predictions(ids)
        if (
            number == len(self._kept)
            and sum(k.numel() for k in self._kept) + base.numel() <= self.keep
        ):
            self._kept.append(base)
        return base


def _loss(predictions: Tensor, ids: Int64[Tensor, "batch pos"]) -> Tensor:
    """The summed NLL of each window."""
    said = predictions.gather(-1, ids[:, 1:, None].to(predictions.device))[..., 0]
    return -said.double().sum(1).cpu()
