"""One measure of a model in its three states, and how much of a damage was undone."""

from __future__ import annotations

from ..result import record


@record
class ThreeStates:
    """A measure of the base model, of the one an injury broke, and of the one a repair patched."""

    base: float
    broken: float
    patched: float

    @property
    def damage(self) -> float:
        return self.broken - self.base

    @property
    def recovered(self) -> float | None:
        """The share of the damage undone, 1 - (patched - base) / (broken - base); None if none was
        done.

        >>> ThreeStates(base=2.0, broken=4.0, patched=2.5).recovered
        0.75
        """
        return 1 - (self.patched - self.base) / self.damage if self.damage > 0 else None
