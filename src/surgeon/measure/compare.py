"""How far a changed model's predictions are from the intact model's."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Int64
from torch import Tensor, nn

from .likelihood import batches, logits_of, token_nll

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
        self._kept: list[_Predicted] = []

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
            losses.append(changed.nll)
            base_losses.append(base.nll)
            kl += float((base.log_p.exp() * (base.log_p - changed.log_p)).sum(-1).double().sum())
            agree += float((base.log_p.argmax(-1) == changed.log_p.argmax(-1)).sum())
            count += base.nll.numel()
        nll, base_nll = (float(torch.cat(each).mean(1).mean()) for each in (losses, base_losses))
        return Comparison(nll, kl / count, agree / count, base_nll)

    def _predictions(self, ids: Int64[Tensor, "batch pos"]) -> _Predicted:
        logits = logits_of(self.model, ids)
        return _Predicted(F.log_softmax(logits[:, :-1].float(), -1), token_nll(logits, ids))

    def _base(self, number: int, ids: Int64[Tensor, "batch pos"]) -> _Predicted:
        if number < len(self._kept):
            return self._kept[number]
        base = self._predictions(ids)
        if (
            number == len(self._kept)
            and sum(k.log_p.numel() for k in self._kept) + base.log_p.numel() <= self.keep
        ):
            self._kept.append(base)
        return base


@dataclass(frozen=True)
class _Predicted:
    """Of one batch. log_p: log-probabilities of the next token, (batch, pos - 1, d_vocab); nll: of
    the tokens that came, (batch, pos - 1).
    """

    log_p: Tensor
    nll: Tensor
