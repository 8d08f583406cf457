"""Damage on a streamed model: each block is read once, for all variants of the model together."""

# How this works.
#
# A model larger than memory is read block by block, and reading is what takes time. So all variants
# go through a block while it is there: for each of them its hidden states are kept, and the block
# is called on them one after another, with the variant's entries at zero.
#
# A variant is the intact model up to the first layer that it changes. So one intact run goes along,
# and each variant takes its states over where it leaves it. The intact run ends where no variant
# needs it any more, once its own NLL is known. A variant whose super activation is restored also
# needs what the intact model wrote to the channel; that is kept on the way.
#
# The states that enter the lowest changed layer are kept between passes: a search changes the same
# layers again and again, and need not read what lies below them twice.

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from jaxtyping import Float64
from torch import Tensor

from ..anatomy import Anatomy, Site, StreamedAnatomy
from ..measure.intact import Sample
from ..measure.likelihood import batches, require_causal, window_nll
from ..tap import (
    LayerCall,
    LayerInput,
    Tap,
    Watcher,
    by_position,
    layer_calls,
    resume,
    returns_tuple,
)
from .causal import written_channels
from .damage import Count, Damage, DamageInMemory, DamageOfEvidence, Evidence, Variant

STATE_BYTES = 1 << 30  # of hidden states carried at a time; more variants go in several passes

States = list[Tensor]  # one (batch, pos, d_model) for each batch of windows
Channel = tuple[Site, int]
# what the intact model writes to a channel: (batch, pos) for each batch of windows
Peaks = dict[Channel, list[Tensor]]


def damage_on(
    anatomy: Anatomy, judged_on: Tensor | Evidence, lowest_layer: int, exhaustive: bool = False
) -> Damage:
    """The means to measure damage of changes at or above one layer, on windows (n, window) of text
    or on other evidence; for a streamed model in few passes over it.

    exhaustive: whether nothing is to be measured on a sample, where that would cost less.

    Raises: BadInput for windows and a model that does not predict the next token.
    """
    if not isinstance(judged_on, Tensor):
        within = min(lowest_layer, len(anatomy.layers) - 1)
        return DamageOfEvidence(anatomy, judged_on.nll(within))
    require_causal(anatomy.model)
    if isinstance(anatomy, StreamedAnatomy):
        return DamageStreamed(anatomy, judged_on, lowest_layer)
    return DamageInMemory(anatomy, judged_on, exhaustive)


class DamageStreamed(Damage):
    """Many variants in one pass over the blocks. A variant leaves the intact model's states at the
    first layer that it changes.

    The states that enter the lowest changed layer are kept, so that a later pass that changes none
    below begins there; the intact model runs to the end once.
    """

    @torch.no_grad()
    def __init__(self, anatomy: StreamedAnatomy, windows: Tensor, lowest_layer: int) -> None:
        self.anatomy, self.lowest_layer, self.layers = anatomy, lowest_layer, anatomy.layers
        self.ids = [ids.to(self.anatomy.device) for ids in batches(windows)]
        # two tokens of one window tell how the layers return their states
        self.as_tuple = returns_tuple(anatomy.model, self.layers, input_ids=self.ids[0][:1, :2])
        skeletons = [
            layer_calls(anatomy.model, self.layers, self.as_tuple, input_ids=ids)
            for ids in self.ids
        ]
        self.calls: list[list[LayerCall]] = [calls for _, calls in skeletons]
        self._entering: dict[int, States] = {0: [states for states, _ in skeletons]}
        self._base: Tensor | None = None

    @property
    def stages(self) -> list[Sample]:
        return [Sample(torch.arange(sum(map(len, self.ids))))]

    @property
    def base(self) -> Float64[Tensor, " n"]:
        if self._base is None:
            self._pass([], None)
        assert self._base is not None
        return self._base

    def of(
        self,
        variants: Sequence[Variant],
        count: Count | None = None,
        sample: Sample | None = None,
    ) -> list[Float64[Tensor, " k"]]:
        """count: called after every block, with the blocks done.

        All windows are run, whatever the sample: reading the blocks is what takes the time.
        """
        size = sum(s.nbytes for s in self._entering[0])
        many = max(1, STATE_BYTES // size)
        groups = [variants[i : i + many] for i in range(0, len(variants), many)]
        losses: list[Tensor] = []
        for number, group in enumerate(groups):

            def blocks(done: int, depth: int, number: int = number) -> None:
                if count:
                    count(number * depth + done, len(groups) * depth)

            losses += self._pass(group, blocks)
        windows = slice(None) if sample is None else sample.windows
        return [(nll - self.base)[windows] for nll in losses]

    @torch.no_grad()
    def _pass(self, variants: Sequence[Variant], count: Count | None) -> list[Tensor]:
        """NLL (n,) of each variant; of the intact model too, if that is not known yet."""
        runs = [_Run(variant, self.anatomy) for variant in variants]
        channels = sorted({channel for run in runs for channel in run.channels})
        last = len(self.layers) - 1
        lowest = min([last, *(run.first for run in runs)] if runs else [self.lowest_layer])
        begin = max(layer for layer in self._entering if layer <= lowest)
        for run in runs:
            if run.is_embedded:
                run.states = self._embedded(run)
        intact_until = last if self._base is None else _needed(runs, channels, last)

        intact: States = self._entering[begin]
        clean: Peaks = {}
        for index in range(begin, last + 1):
            if index == lowest:
                self._entering = {0: self._entering[0], index: intact}
            with self.anatomy.holding(index):
                entering = intact
                if index <= intact_until:
                    written_here = [channel for channel in channels if _layer(channel[0]) == index]
                    intact = self._intact(index, entering, written_here, clean)
                self._variants_through(index, runs, entering, clean)
            if count:
                count(index + 1, last + 1)
        with self.anatomy.holding(None):
            if self._base is None:
                self._base = self._nll(intact)
            return [self._nll_of(run, intact) for run in runs]

    def _embedded(self, run: _Run) -> States:
        """The states that enter the first layer of a variant whose embedding is changed."""
        with self.anatomy.zeroed(run.outside):
            return [
                layer_calls(self.anatomy.model, self.layers, self.as_tuple, input_ids=ids)[0]
                for ids in self.ids
            ]

    def _nll_of(self, run: _Run, intact: States) -> Tensor:
        with self.anatomy.zeroed(run.outside) if run.outside else nullcontext():
            return self._nll(intact if run.first == len(self.layers) else run.states)

    def _variants_through(
        self, index: int, runs: Sequence[_Run], entering: States, clean: Peaks
    ) -> None:
        """Every variant that has left the intact model, through one layer."""
        for run in runs:
            if run.first == index and not run.is_embedded:
                run.states = entering
            if run.first <= index:
                run.states = self._broken(index, run, clean)

    def _intact(
        self, index: int, states: States, channels: list[tuple[Site, int]], clean: Peaks
    ) -> States:
        """One layer of the intact model; what it writes to `channels` goes into `clean`."""
        after = []
        for calls, h in zip(self.calls, states, strict=True):
            with Tap() as tap:
                for channel in channels:
                    tap.on_output(
                        self.anatomy.module(channel[0]),
                        _kept(clean.setdefault(channel, []), channel[1], len(h)),
                    )
                after.append(calls[index](self.layers[index], h))
        return after

    def _broken(self, index: int, run: _Run, clean: Peaks) -> States:
        """One layer of a variant."""
        mine = [r for r in run.variant.zeroed if r.site.layer == index]
        restored = [(c, clean[c]) for c in run.channels if _layer(c[0]) == index]
        after = []
        with self.anatomy.zeroed(mine) if mine else nullcontext():
            for number, (calls, h) in enumerate(zip(self.calls, run.states, strict=True)):
                with Tap() as tap:
                    for (site, row), peaks in restored:
                        tap.on_output(self.anatomy.module(site), _restored(row, peaks[number]))
                    after.append(calls[index](self.layers[index], h))
        return after

    def _nll(self, states: States) -> Tensor:
        """NLL (n,) of each window, one after another: the logits of a batch can be larger than a
        block.
        """
        losses = []
        for ids, batch in zip(self.ids, states, strict=True):
            for window, h in zip(torch.split(ids, 1), torch.split(batch, 1), strict=True):
                with resume(self.layers, LayerInput(len(self.layers), h, self.as_tuple)):
                    losses.append(window_nll(self.anatomy.model, window))
        return torch.cat(losses)


class _Run:
    """A variant on its way through the blocks.

    outside: what it changes outside the layers. is_embedded: whether it differs from the intact
    model before the first of them.
    """

    states: States

    def __init__(self, variant: Variant, anatomy: Anatomy) -> None:
        self.variant = variant
        self.first = anatomy.first_changed(r.site for r in variant.zeroed)
        self.outside = [r for r in variant.zeroed if r.site.layer is None]
        self.is_embedded = any(anatomy.first_changed([r.site]) == 0 for r in self.outside)
        self.channels = written_channels(variant.zeroed) if variant.restored else []


def _needed(runs: Sequence[_Run], channels: Sequence[Channel], last: int) -> int:
    """The last layer that the intact model must run: a variant needs the states that enter its
    first layer, one that is restored also what is written to its channels.
    """
    before = [run.first - 1 for run in runs]
    written = [_layer(site) for site, _ in channels]
    return max([*before, *written], default=last)


def _layer(site: Site) -> int:
    assert site.layer is not None, "what lies outside the layers is not streamed"
    return site.layer


def _kept(into: list[Tensor], row: int, batch: int) -> Watcher:
    """Keep channel `row` of what a module writes, as (batch, pos)."""

    def watch(y: Tensor) -> None:
        into.append(by_position(y, batch)[..., row].clone())

    return watch


def _restored(row: int, clean: Tensor) -> Watcher:
    """Put channel `row` of what a module writes at its intact value (batch, pos) where that peaks
    in each window.
    """
    at = clean.abs().argmax(1, keepdim=True)

    def watch(y: Tensor) -> Tensor:
        y = y.clone()
        by_position(y, len(clean))[..., row].scatter_(1, at, clean.gather(1, at))
        return y

    return watch
