"""Damage: what the model loses on fixed windows, or other evidence, with sets of entries zeroed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from ..anatomy import Anatomy, Region
from ..measure.intact import IntactRun, Sample
from ..measure.likelihood import TOKENS_PER_BATCH
from ..measure.sequential import stages_of
from .causal import restored_nll
from .wave import Wave
from .zeroed import zeroed

FEW_TOKENS = 32  # at the beginning of each window of a sample
Count = Callable[[int, int], None]  # is told the steps done, of how many
NLL = Callable[[], Float64[Tensor, " n"]]  # of each window or cell, of the model as it is now


@runtime_checkable
class Evidence(Protocol):
    """What a model in memory is judged on where that is no text: cells with hidden values, say."""

    @property
    def predicted(self) -> int:
        """How many values are predicted."""

    def nll(self, lowest_layer: int) -> NLL:
        """The likelihood; called only while the model is intact below `lowest_layer`."""


@dataclass(frozen=True)
class Variant:
    """The model with `zeroed` at zero together; `restored`: with the super activation put back, see
    causal.py.
    """

    zeroed: Sequence[Region]
    restored: bool = False


class Damage(ABC):
    """Damage of variants of the model on fixed windows (or cells), in nats per token (or value).

    stages: what a comparison may be looked at on, one after another, the last being everything:
    where a sample costs less than all, it can be stopped when it is decided.
    """

    @property
    @abstractmethod
    def base(self) -> Float64[Tensor, " n"]:
        """NLL of the intact model, of each window."""

    @property
    def stages(self) -> list[Sample]:
        return [Sample(torch.arange(len(self.base)))]

    def base_on(self, sample: Sample) -> Float64[Tensor, " k"]:
        """NLL of the intact model on a sample."""
        return self.base[sample.windows]

    def few(self, tokens: int) -> Sample:
        """A sample of about so many tokens; everything, where no sample costs less."""
        return self.stages[-1]

    @abstractmethod
    def of(
        self,
        variants: Sequence[Variant],
        count: Count | None = None,
        sample: Sample | None = None,
    ) -> list[Float64[Tensor, " k"]]:
        """Damage of each variant by window, on a sample; on everything where none is given."""

    def with_beginning(
        self, regions: Sequence[Region]
    ) -> tuple[Float64[Tensor, " n"], Float64[Tensor, " n"]]:
        """Damage with all of `regions` zeroed together, of each window and of the beginning that
        the stages before the last read of it.
        """
        whole = self(regions)
        return whole, whole

    def __call__(self, regions: Sequence[Region]) -> Float64[Tensor, " n"]:
        """Damage of each window with all of `regions` zeroed together."""
        return self.of([Variant(regions)])[0]


class DamageOfEvidence(Damage):
    """One variant after another, on evidence that is no text."""

    def __init__(self, anatomy: Anatomy, nll: NLL) -> None:
        self.anatomy, self._nll, self._base = anatomy, nll, nll()

    @property
    def base(self) -> Float64[Tensor, " n"]:
        return self._base

    def of(
        self,
        variants: Sequence[Variant],
        count: Count | None = None,
        sample: Sample | None = None,
    ) -> list[Float64[Tensor, " k"]]:
        windows = slice(None) if sample is None else sample.windows
        damages = []
        for number, variant in enumerate(variants, 1):
            with zeroed(self.anatomy, variant.zeroed):
                damages.append((self._nll() - self._base)[windows])
            if count:
                count(number, len(variants))
        return damages


class DamageInMemory(Damage):
    """One variant after another, each from the first layer that it changes.

    exhaustive: whether everything is measured on all windows, and nothing on a sample.
    """

    def __init__(
        self, anatomy: Anatomy, windows: Int64[Tensor, "n window"], exhaustive: bool = False
    ) -> None:
        self.anatomy, self.windows, self.exhaustive = anatomy, windows, exhaustive
        self._run = IntactRun(anatomy.model, anatomy.layers, windows)

    @property
    def base(self) -> Float64[Tensor, " n"]:
        return self._run.nll

    @property
    def stages(self) -> list[Sample]:
        stages = stages_of(*self.windows.shape)
        return stages[-1:] if self.exhaustive else stages

    def base_on(self, sample: Sample) -> Float64[Tensor, " k"]:
        return self._run.nll_on(sample)

    def few(self, tokens: int) -> Sample:
        n, width = self.windows.shape
        if self.exhaustive:
            return self.stages[-1]
        many = min(n, max(1, tokens // FEW_TOKENS))
        each = ceil(tokens / many)
        return Sample(torch.arange(many), each if each < width else None)

    def of(
        self,
        variants: Sequence[Variant],
        count: Count | None = None,
        sample: Sample | None = None,
    ) -> list[Float64[Tensor, " k"]]:
        sample = sample or self.stages[-1]
        base = self.base_on(sample)
        if self._goes_together(variants, sample):
            wave = Wave(self.anatomy, self._run, sample)
            losses = wave.losses([variant.zeroed for variant in variants])
            if count:
                count(len(variants), len(variants))
            return [one.mean(1) - base for one in losses]
        damages = []
        for number, variant in enumerate(variants, 1):
            damages.append(self._one(variant, sample) - base)
            if count:
                count(number, len(variants))
        return damages

    def _goes_together(self, variants: Sequence[Variant], sample: Sample) -> bool:
        """Whether the variants can be put into batches, and that saves something."""
        tokens = len(sample.windows) * (sample.tokens or self.windows.shape[1])
        return (
            len(variants) > 1
            and 2 * tokens <= TOKENS_PER_BATCH
            and self.anatomy.source == "table"
            and self._run.keeps_all
            and not any(variant.restored for variant in variants)
        )

    def with_beginning(
        self, regions: Sequence[Region]
    ) -> tuple[Float64[Tensor, " n"], Float64[Tensor, " n"]]:
        losses = self._losses(regions, self.stages[-1])
        whole = losses.mean(1) - self.base
        tokens = self.stages[0].tokens
        if tokens is None:
            return whole, whole
        beginning = losses[:, : tokens - 1].mean(1)
        return whole, beginning - self.base_on(Sample(self.stages[-1].windows, tokens))

    def _one(self, variant: Variant, sample: Sample) -> Float64[Tensor, " k"]:
        if variant.restored:
            windows = self.windows[sample.windows, : sample.tokens]
            return restored_nll(self.anatomy, variant.zeroed, windows)
        return self._losses(variant.zeroed, sample).mean(1)

    def _losses(self, regions: Sequence[Region], sample: Sample) -> Float64[Tensor, "k predicted"]:
        lowest = self.anatomy.first_changed(region.site for region in regions)
        with zeroed(self.anatomy, regions):
            return self._run.losses(lowest, sample)
