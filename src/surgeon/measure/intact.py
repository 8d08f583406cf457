"""One run of the intact model over fixed windows, from which runs of changed models go on."""

# How this works.
#
# A change of weights in layer L leaves everything below L as it is. So the intact model runs once
# over all windows; the states that enter its layers are kept, and its NLL. A changed model then
# begins at the highest kept layer that lies at or below its first change, and it may run on some of
# the windows only.
#
# The states of every layer are kept where there is room for them, else those of every second,
# third, ... layer; a change in between begins a little lower than it could.

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import torch
from jaxtyping import Float64, Int64
from torch import Tensor, nn

from ..tap import LayerInput, Tap, resume, returns_tuple
from .likelihood import batches, logits_of, nll_sums

STATE_BYTES = 2**30  # of hidden states that are kept


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
        self._as_tuple = returns_tuple(model, layers, input_ids=self.windows[:1, :2])
        self._states: dict[int, Tensor] = {}  # by the layer that they enter
        self.nll = self._run(room)

    def _run(self, room: int) -> Float64[Tensor, " n"]:
        leaving: list[list[Tensor]] = [[] for _ in self.layers]
        sums = []
        depth = len(self.layers)
        step = 0  # layers from one that is kept to the next; known once a state has been seen
        for ids in batches(self.windows):
            with Tap() as tap:
                for index, layer in enumerate(self.layers):
                    if step == 0 or (index + 1) % step == 0:
                        tap.on_output(layer, leaving[index].append)
                sums.append(nll_sums(logits_of(self.model, ids), ids))
            if step == 0:
                size = leaving[0][0].nbytes * len(self.windows) // len(ids)
                step = ceil(depth / max(1, room // size))
        self._states = {
            index + 1: torch.cat(leaving[index])
            for index in range(depth)
            if (index + 1) % step == 0
        }
        return torch.cat(sums) / (self.windows.shape[1] - 1)

    @torch.no_grad()
    def changed(
        self, lowest: int, chosen: Int64[Tensor, " k"] | None = None
    ) -> Float64[Tensor, " k"]:
        """NLL of the model as it is now, on the chosen windows; all of them where none are chosen.

        lowest: the first layer that may differ from the intact model; the number of layers where
        only what follows them may.
        """
        chosen = torch.arange(len(self.windows)) if chosen is None else chosen
        start = max((layer for layer in self._states if layer <= lowest), default=0)
        sums = []
        for part in batches(chosen[:, None].expand(-1, self.windows.shape[1])):
            picked = part[:, 0].to(self.windows.device)
            ids = self.windows[picked]
            if start == 0:
                sums.append(nll_sums(logits_of(self.model, ids), ids))
                continue
            entry = LayerInput(start, self._states[start][picked], self._as_tuple)
            with resume(self.layers, entry):
                sums.append(nll_sums(logits_of(self.model, ids), ids))
        return torch.cat(sums) / (self.windows.shape[1] - 1)
