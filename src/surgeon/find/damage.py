"""Damage: what the model loses on fixed windows, or other evidence, with sets of entries zeroed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Float64
from torch import Tensor

from ..anatomy import Anatomy, Region, StreamedAnatomy
from ..patch import ablate
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
    """Damage of variants of the model on fixed windows (or cells), in nats per token (or value)."""

    @property
    @abstractmethod
    def base(self) -> Float64[Tensor, " n"]:
        """NLL of the intact model, of each window."""

    @abstractmethod
    def of(
        self, variants: Sequence[Variant], count: Count | None = None
    ) -> list[Float64[Tensor, " n"]]:
        """Damage of each variant, of each window."""

    def __call__(self, regions: Sequence[Region]) -> Float64[Tensor, " n"]:
        """Damage of each window with all of `regions` zeroed together."""
        return self.of([Variant(regions)])[0]


class DamageInMemory(Damage):
    """One variant after another.

    windows: what `nll` scores where that is text; only variants that are `restored` need them.
    """

    def __init__(self, anatomy: Anatomy, nll: NLL, windows: Tensor | None = None) -> None:
        self.anatomy, self.windows, self._nll = anatomy, windows, nll
        self._base = nll()

    @property
    def base(self) -> Float64[Tensor, " n"]:
        return self._base

    def of(
        self, variants: Sequence[Variant], count: Count | None = None
    ) -> list[Float64[Tensor, " n"]]:
        damages = []
        for number, variant in enumerate(variants, 1):
            damages.append(self._one(variant) - self._base)
            if count:
                count(number, len(variants))
        return damages

    def _one(self, variant: Variant) -> Float64[Tensor, " n"]:
        if variant.restored:
            assert self.windows is not None
            return restored_nll(self.anatomy, variant.zeroed, self.windows)
        with zeroed(self.anatomy, variant.zeroed):
            return self._nll()


def zeroed(anatomy: Anatomy, regions: Sequence[Region]) -> AbstractContextManager[None]:
    """Within the block all of `regions` are zero, also in a streamed model; nothing changes where
    there are none.
    """
    if isinstance(anatomy, StreamedAnatomy):
        return anatomy.zeroed(regions)
    return ablate(anatomy, regions).applied(anatomy) if regions else nullcontext()
