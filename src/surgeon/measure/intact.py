"""One run of the intact model over fixed windows, from which runs of changed models go on."""

# How this works.
#
# A change of weights in layer L leaves everything below L as it is. So the intact model runs once
# over all windows; the states that enter its layers are kept, and its loss at every token. A
# changed model then begins at the highest kept layer that lies at or below its first change.
#
# It need not run on everything. A causal model knows nothing of what follows a token, so the first
# tokens of a window are as they are in the whole window; a `Sample` is the first tokens of some of
# the windows. Many short beginnings say more than few whole windows of the same cost.
#
# The states of every layer are kept where there is room for them, else those of every second,
# third, ... layer; a change in between begins a little lower than it could.

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from math import ceil

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor, nn

from ..tap import LayerInput, Tap, resume, returns_tuple
from .likelihood import batches, logits_of, token_nll

STATE_BYTES = 2**30  # of hidden states that are kept


@dataclass(frozen=True)
class Sample:
    """The first `tokens` tokens of these windows; whole windows where no number is given."""

    windows: Int64[Tensor, " k"]
    tokens: int | None = None


class IntactRun:
    """The intact model on windows (n, window): `nll` (n,), in nats per token, float64.

    room: bytes of hidden states that are kept at most.
    Raises: BadInput for a model that does not predict the next token.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[nn.Module],
        windows: Int64[Tensor, "n window"],
        room: int = STATE_BYTES,
    ) -> None:
        self.model, self.layers = model, layers
        self.windows = windows.to(next(model.parameters()).device)
        self.as_tuple = returns_tuple(model, layers, input_ids=self.windows[:1, :2])
        self._states: dict[int, Tensor] = {}  # by the layer that they enter
        self._losses = self._run(room)

    @property
    def nll(self) -> Float64[Tensor, " n"]:
        return self._losses.mean(1)

    def nll_on(self, sample: Sample) -> Float64[Tensor, " k"]:
        """Of the intact model on a sample."""
        return self._losses[sample.windows, : self._width(sample) - 1].mean(1)

    @property
    def keeps_all(self) -> bool:
        """Whether the states that enter every layer but the first are kept."""
        return len(self._states) == len(self.layers)

    def entering(self, layer: int, sample: Sample) -> Float[Tensor, "k pos d_model"]:
        """The intact states that enter a layer above the first, or that leave the last; kept."""
        picked = sample.windows.to(self.windows.device)
        return self._states[layer][picked, : self._width(sample)]

    def ids_of(self, sample: Sample) -> Int64[Tensor, "k pos"]:
        return self.windows[sample.windows.to(self.windows.device), : self._width(sample)]

    def _width(self, sample: Sample) -> int:
        return sample.tokens or self.windows.shape[1]

    def _run(self, room: int) -> Float64[Tensor, "n predicted"]:
        leaving: list[list[Tensor]] = [[] for _ in self.layers]
        losses = []
        depth = len(self.layers)
        step = 0  # layers from one that is kept to the next; known once a state has been seen
        for ids in batches(self.windows):
            with Tap() as tap:
                for index, layer in enumerate(self.layers):
                    if step == 0 or (index + 1) % step == 0:
                        tap.on_output(layer, leaving[index].append)
                losses.append(token_nll(logits_of(self.model, ids), ids))
            if step == 0:
                size = leaving[0][0].nbytes * len(self.windows) // len(ids)
                step = ceil(depth / max(1, room // size))
        self._states = {
            index + 1: torch.cat(leaving[index])
            for index in range(depth)
            if (index + 1) % step == 0
        }
        return torch.cat(losses)

    def changed(self, lowest: int, sample: Sample | None = None) -> Float64[Tensor, " k"]:
        """NLL of the model as it is now, on a sample; on all windows where none is given.

        lowest: the first layer that may differ from the intact model; the number of layers where
        only what follows them may.
        """
        return self.losses(lowest, sample).mean(1)

    @torch.no_grad()
    def losses(self, lowest: int, sample: Sample | None = None) -> Float64[Tensor, "k predicted"]:
        """The same for each predicted token."""
        sample = sample or Sample(torch.arange(len(self.windows)))
        start = max((layer for layer in self._states if layer <= lowest), default=0)
        width = self._width(sample)
        losses = []
        for part in batches(sample.windows[:, None].expand(-1, width)):
            picked = part[:, 0].to(self.windows.device)
            ids = self.windows[picked, :width]
            entry = None
            if start > 0:
                entry = LayerInput(start, self._states[start][picked, :width], self.as_tuple)
            with nullcontext() if entry is None else resume(self.layers, entry):
                losses.append(token_nll(logits_of(self.model, ids), ids))
        return torch.cat(losses)
