"""Text to train and to be examined on: windows, and what the intact model predicts on them.

How this works. Training passes over the same windows again and again, and two things about them
never change: what the intact model predicts, and what enters the lowest layer that is trained. Both
are computed once a window and kept. The predictions are kept as probabilities of all tokens; where
the cache has no room for that, as those of the likeliest tokens and of all others together, which
bounds the divergence from below.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from ..anatomy import Anatomy
from ..errors import BadInput
from ..measure.likelihood import logits_of
from ..tap import LayerInput, capture, resume
from .config import DistilConfig

TOKENS_AT_ONCE = 1024  # more take longer on a CPU, and hold more logits
# where the cache does not hold all tokens: sorting out more costs more than running the intact
# model
LIKELIEST = 128


@dataclass(frozen=True)
class _Prediction:
    """What the intact model predicts on one window.

    Shapes: p (pos, d_vocab), or (pos, k + 1) of the k tokens `kept` and all others.
    """

    p: Tensor
    kept: Tensor | None
    entropy: Tensor

    def divergence(self, logits: Float[Tensor, "pos d_vocab"]) -> Tensor:
        """Mean KL to the softmax of `logits`, as cross-entropy less entropy: in less than half the
        time of the plain formula.
        """
        comparable = logits if self.kept is None else coarse(logits, self.kept.long())
        return F.cross_entropy(comparable, self.p) - self.entropy


class Lesson:
    """Windows, what the intact model predicts on them, and what enters the lowest target layer,
    each computed once.

    Built in the intact model. used: the windows that are asked for. start: the lowest target layer.
    """

    @torch.no_grad()
    def __init__(
        self,
        anatomy: Anatomy,
        windows: Int64[Tensor, "n window"],
        used: Sequence[int],
        start: int,
        config: DistilConfig,
    ) -> None:
        self.anatomy, self.windows, self.start = anatomy, windows, start
        self.room, length = config.cache_mb * 2**20, windows.shape[1]
        self.keeps_entries = start > 0 and len(used) * length * anatomy.d_model * 4 <= self.room
        self.entries: dict[int, LayerInput] = {}
        self.predictions: dict[int, _Prediction] = {}
        if config.loss == "ce":
            return
        positions = len(used) * (length - 1)
        for some in torch.split(torch.tensor(used), max(1, TOKENS_AT_ONCE // length)):
            logits = logits_of(anatomy.model, windows[some])
            for index, each in zip(some.tolist(), logits, strict=True):
                self.predictions[index] = self._prediction(each[:-1], positions)

    def _prediction(self, logits: Float[Tensor, "pos d_vocab"], positions: int) -> _Prediction:
        """What is kept of one window, where so many positions share the room.

        Raises: BadInput if not one token of each has room.
        """
        log_p = F.log_softmax(logits.float(), -1)
        vocabulary = log_p.shape[-1]
        if positions * vocabulary * 4 <= self.room:
            p = log_p.exp()
            return _Prediction(p, None, F.cross_entropy(log_p, p))
        # a probability and the id of its token, four bytes each
        k = min(self.room // (positions * 8), vocabulary - 1, LIKELIEST)
        if k < 1:
            raise BadInput(
                f"a cache of {self.room // 2**20} MiB does not hold one prediction for each of"
                f" {positions} tokens; raise ‹cache_mb›."
            )
        kept = log_p.topk(k).indices
        log_p = coarse(log_p, kept)
        p = log_p.exp()
        return _Prediction(p, kept.int(), F.cross_entropy(log_p, p))

    def logits(self, drawn: Sequence[int]) -> Float[Tensor, "batch pos d_vocab"]:
        """Of the model as it stands; it must not differ below the lowest target layer from one call
        to the next.
        """
        model, layers, ids = self.anatomy.model, self.anatomy.layers, self.windows[list(drawn)]
        if not self.keeps_entries:
            return logits_of(model, ids)
        entries = [self._entry(index) for index in drawn]
        states = torch.cat([entry.states for entry in entries])
        with resume(layers, LayerInput(self.start, states, entries[0].as_tuple)):
            return logits_of(model, ids)

    def _entry(self, index: int) -> LayerInput:
        """What enters the lowest target layer on one window."""
        if index not in self.entries:
            model = self.anatomy.model
            ids = self.windows[index : index + 1].to(next(model.parameters()).device)
            with torch.no_grad():
                self.entries[index] = capture(model, self.anatomy.layers, self.start, input_ids=ids)
        return self.entries[index]

    def nll(self, logits: Float[Tensor, "batch pos d_vocab"], drawn: Sequence[int]) -> Tensor:
        # window by window, here and in `loss`: all at once, the logits would be copied without
        # their last position
        ids = self.windows[list(drawn), 1:].to(logits.device)
        pairs = zip(logits, ids, strict=True)
        losses = [F.cross_entropy(one[:-1].float(), targets) for one, targets in pairs]
        return torch.stack(losses).mean()

    def loss(self, logits: Float[Tensor, "batch pos d_vocab"], drawn: Sequence[int]) -> Tensor:
        """Mean over predicted tokens of KL(intact || repaired), or of the NLL; where only the
        likeliest tokens are kept, of the KL between the distributions over them and "any other",
        which is less than the whole."""
        if not self.predictions:
            return self.nll(logits, drawn)
        losses = [
            self.predictions[index].divergence(one[:-1].float())
            for index, one in zip(drawn, logits, strict=True)
        ]
        return torch.stack(losses).mean()

    @torch.no_grad()
    def examine(self) -> tuple[float, float]:
        """Loss and NLL over all windows."""
        sums = torch.zeros(2, dtype=torch.float64)
        at_once = max(1, TOKENS_AT_ONCE // self.windows.shape[1])
        for drawn in torch.split(torch.arange(len(self.windows)), at_once):
            some = drawn.tolist()
            logits = self.logits(some)
            means = torch.stack([self.loss(logits, some), self.nll(logits, some)])
            sums += len(some) * means.double().cpu()
        loss, nll = (sums / len(self.windows)).tolist()
        return loss, nll


def coarse(
    logits: Float[Tensor, "pos d_vocab"], kept: Int64[Tensor, "pos k"]
) -> Float[Tensor, "pos k1"]:
    """Logits (or log-probabilities) of the kept tokens and of all others as one."""
    rest = logits.scatter(-1, kept, float("-inf")).logsumexp(-1, keepdim=True)
    return torch.cat([logits.gather(-1, kept), rest], -1)
