"""Damage: what the model loses on fixed windows with sets of entries zeroed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from jaxtyping import Float64
from torch import Tensor

from ..anatomy import Anatomy, Region, StreamedAnatomy
from ..measure.likelihood import ResumedNLL, require_causal
from ..patch import ablate
from .causal import restored_nll

Tell = Callable[[int, int], None]  # steps done, of how many


@dataclass(frozen=True)
class Variant:
    """The model with `zeroed` at zero together; `restored`: with the super activation put back, see
    causal.py.
    """

    zeroed: Sequence[Region]
    restored: bool = False


class Damage(ABC):
    """Damage of variants of the model on fixed windows, in nats per token; what lies below the
    lowest layer is computed once.
    """

    def __init__(self, anatomy: Anatomy, windows: Tensor, lowest_layer: int) -> None:
        require_causal(anatomy.model)
        self.anatomy, self.windows, self.lowest_layer = anatomy, windows, lowest_layer

    @property
    @abstractmethod
    def base(self) -> Float64[Tensor, " n"]:
        """NLL of the intact model, of each window."""

    @abstractmethod
    def of(
        self, variants: Sequence[Variant], tell: Tell | None = None
    ) -> list[Float64[Tensor, " n"]]:
        """Damage of each variant, of each window."""

    def __call__(self, regions: Sequence[Region]) -> Float64[Tensor, " n"]:
        """Damage of each window with all of `regions` zeroed together."""
        return self.of([Variant(regions)])[0]


class DamageInMemory(Damage):
    """One variant after another."""

    def __init__(self, anatomy: Anatomy, windows: Tensor, lowest_layer: int) -> None:
        super().__init__(anatomy, windows, lowest_layer)
        self._nll = ResumedNLL(anatomy.model, anatomy.layers, lowest_layer, windows)
        self._base = self._nll()

    @property
    def base(self) -> Float64[Tensor, " n"]:
        return self._base

    def of(
        self, variants: Sequence[Variant], tell: Tell | None = None
    ) -> list[Float64[Tensor, " n"]]:
        found = []
        for number, variant in enumerate(variants, 1):
            found.append(self._one(variant) - self._base)
            if tell:
                tell(number, len(variants))
        return found

    def _one(self, variant: Variant) -> Float64[Tensor, " n"]:
        if variant.restored:
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
