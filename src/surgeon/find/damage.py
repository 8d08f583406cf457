"""Damage: what the model loses on fixed windows, or other evidence, with sets of entries zeroed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from ..anatomy import Anatomy, Region, Site, StreamedAnatomy, WeightView
from ..measure.intact import IntactRun
from ..measure.sequential import looks_at
from .causal import restored_nll

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

    looks: after how many windows a comparison may be looked at, the last being all: where some of
    the windows cost less than all, it can be stopped when it is decided.
    """

    @property
    @abstractmethod
    def base(self) -> Float64[Tensor, " n"]:
        """NLL of the intact model, of each window."""

    @property
    def looks(self) -> list[int]:
        return [len(self.base)]

    @abstractmethod
    def of(
        self,
        variants: Sequence[Variant],
        count: Count | None = None,
        chosen: Int64[Tensor, " k"] | None = None,
    ) -> list[Float64[Tensor, " k"]]:
        """Damage of each variant, of each of the chosen windows; of all where none are chosen."""

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
        chosen: Int64[Tensor, " k"] | None = None,
    ) -> list[Float64[Tensor, " k"]]:
        everywhere = slice(None) if chosen is None else chosen
        damages = []
        for number, variant in enumerate(variants, 1):
            with zeroed(self.anatomy, variant.zeroed):
                damages.append((self._nll() - self._base)[everywhere])
            if count:
                count(number, len(variants))
        return damages


class DamageInMemory(Damage):
    """One variant after another, each from the first layer that it changes."""

    def __init__(self, anatomy: Anatomy, windows: Int64[Tensor, "n window"]) -> None:
        self.anatomy, self.windows = anatomy, windows
        self._run = IntactRun(anatomy.model, anatomy.layers, windows)

    @property
    def base(self) -> Float64[Tensor, " n"]:
        return self._run.nll

    @property
    def looks(self) -> list[int]:
        return looks_at(len(self.windows))

    def of(
        self,
        variants: Sequence[Variant],
        count: Count | None = None,
        chosen: Int64[Tensor, " k"] | None = None,
    ) -> list[Float64[Tensor, " k"]]:
        chosen = torch.arange(len(self.windows)) if chosen is None else chosen
        damages = []
        for number, variant in enumerate(variants, 1):
            damages.append(self._one(variant, chosen) - self.base[chosen])
            if count:
                count(number, len(variants))
        return damages

    def _one(self, variant: Variant, chosen: Int64[Tensor, " k"]) -> Float64[Tensor, " k"]:
        if variant.restored:
            return restored_nll(self.anatomy, variant.zeroed, self.windows[chosen])
        lowest = self.anatomy.first_changed(region.site for region in variant.zeroed)
        with zeroed(self.anatomy, variant.zeroed):
            return self._run.changed(lowest, chosen)


@contextmanager
def zeroed(anatomy: Anatomy, regions: Sequence[Region]) -> Iterator[None]:
    """Within the block all of `regions` are zero, also in a streamed model.

    No patch is made, since nothing is to be kept: the entries are read, zeroed and written back,
    bit for bit. A tied weight is zero in both of its places.
    """
    if isinstance(anatomy, StreamedAnatomy):
        with anatomy.zeroed(regions):
            yield
        return
    places: dict[Site, tuple[list[int], list[int]]] = {}
    for region in regions:
        rows, cols = region.rows_cols(anatomy.view(region.site).shape)
        mine = places.setdefault(anatomy.resolve(region.site), ([], []))
        mine[0].extend(rows)
        mine[1].extend(cols)
    kept: list[tuple[WeightView, Tensor, Tensor, Tensor]] = []
    try:
        for site, (rows, cols) in places.items():
            view, at = anatomy.view(site), (torch.tensor(rows), torch.tensor(cols))
            kept.append((view, *at, view.get(*at)))
            view.set_(*at, torch.full((len(rows),), anatomy.stored_zero(site)))
        yield
    finally:
        for view, row, col, values in kept:
            view.set_(row, col, values)
