"""Many changed models side by side: each leaves the intact one where it is changed, and from there
on they go through the layers together.

A few tokens at a time make poor use of a processor: reading the weights takes longer than using
them. So variants of the model are put into one batch. A layer that is changed in one of them runs
on its part of the batch alone, with its weights at zero; all others of the batch go through it
together. What the layers are called with (masks, positions) comes from the model itself, see
`tap.layer_calls`, which holds for the architectures in the table.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from jaxtyping import Float64
from torch import Tensor

from ..anatomy import Anatomy, Region
from ..measure.intact import IntactRun, Sample
from ..measure.likelihood import TOKENS_PER_BATCH, logits_of, token_nll
from ..tap import LayerCall, LayerInput, layer_calls, resume
from .zeroed import zeroed


class Wave:
    """Variants of one model on a sample of the windows of an intact run."""

    @torch.no_grad()
    def __init__(self, anatomy: Anatomy, run: IntactRun, sample: Sample) -> None:
        self.anatomy, self.run, self.sample = anatomy, run, sample
        self.layers = anatomy.layers
        self.ids = run.ids_of(sample)
        self._calls: dict[int, list[LayerCall]] = {}  # by the number of variants in a batch
        self._embedded, _ = self._call(self.ids)

    @torch.no_grad()
    def losses(self, variants: Sequence[Sequence[Region]]) -> list[Float64[Tensor, "k predicted"]]:
        """NLL of each predicted token, with the regions of each variant at zero."""
        firsts = [self.anatomy.first_changed(r.site for r in regions) for regions in variants]
        order = sorted(range(len(variants)), key=lambda i: firsts[i])
        many = max(1, TOKENS_PER_BATCH // self.ids.numel())
        losses: dict[int, Tensor] = {}
        for at in range(0, len(order), many):
            group = order[at : at + many]
            together = self._together([variants[i] for i in group], [firsts[i] for i in group])
            losses |= dict(zip(group, together, strict=True))
        return [losses[i] for i in range(len(variants))]

    def _together(
        self, variants: Sequence[Sequence[Region]], firsts: Sequence[int]
    ) -> list[Float64[Tensor, "k predicted"]]:
        changes = [_by_layer(regions) for regions in variants]
        states: dict[int, Tensor] = {}
        for number, change in enumerate(changes):
            if firsts[number] == 0 and None in change:
                with zeroed(self.anatomy, change[None]):
                    states[number], _ = self._call(self.ids)
        for index in range(min(firsts), len(self.layers)):
            self._through(index, changes, firsts, states)
        for number, first in enumerate(firsts):
            if first == len(self.layers):
                states[number] = self.run.entering(first, self.sample)
        alike = [number for number, change in enumerate(changes) if None not in change]
        losses = dict(zip(alike, self._losses([states[n] for n in alike]), strict=True))
        for number, change in enumerate(changes):
            if None in change:
                with zeroed(self.anatomy, change[None]):
                    (losses[number],) = self._losses([states[number]])
        return [losses[number] for number in range(len(variants))]

    def _through(
        self,
        index: int,
        changes: Sequence[dict[int | None, list[Region]]],
        firsts: Sequence[int],
        states: dict[int, Tensor],
    ) -> None:
        """One layer, for all variants that have left the intact model."""
        layer = self.layers[index]
        alike = [n for n in states if index not in changes[n]]
        if alike:
            batch = torch.cat([states[n] for n in alike])
            after = self._layer_call(len(alike), index)(layer, batch)
            states |= dict(zip(alike, torch.split(after, len(self.ids)), strict=True))
        for number, change in enumerate(changes):
            if index in change:
                before = states.get(number)
                if before is None:
                    assert firsts[number] == index
                    before = self._embedded if index == 0 else self.run.entering(index, self.sample)
                with zeroed(self.anatomy, change[index]):
                    states[number] = self._layer_call(1, index)(layer, before)

    def _losses(self, states: Sequence[Tensor]) -> list[Float64[Tensor, "k predicted"]]:
        if not states:
            return []
        ids = self.ids.repeat(len(states), 1)
        entry = LayerInput(len(self.layers), torch.cat([*states]), self.run.as_tuple)
        with resume(self.layers, entry):
            losses = token_nll(logits_of(self.anatomy.model, ids), ids)
        return list(torch.split(losses, len(self.ids)))

    def _layer_call(self, many: int, index: int) -> LayerCall:
        if many not in self._calls:
            _, self._calls[many] = self._call(self.ids.repeat(many, 1))
        return self._calls[many][index]

    def _call(self, ids: Tensor) -> tuple[Tensor, list[LayerCall]]:
        return layer_calls(self.anatomy.model, self.layers, self.run.as_tuple, input_ids=ids)


def _by_layer(regions: Sequence[Region]) -> dict[int | None, list[Region]]:
    """Under None what lies outside the layers."""
    layers: dict[int | None, list[Region]] = defaultdict(list)
    for region in regions:
        layers[region.site.layer].append(region)
    return dict(layers)
