"""The editors by name, and the settings of an edit."""

from __future__ import annotations

from dataclasses import dataclass

from ..settings import nested, setting
from .finetune import FineTuneConfig
from .value import ValueConfig

METHODS = ("rome", "rome-mean", "rome-bare", "rome-legacy", "emmet", "memit", "alphaedit", "ft")
SEVERAL_LAYERS = ("memit", "alphaedit")
TOGETHER = ("emmet", "memit", "alphaedit")


@dataclass(frozen=True)
class EditConfig:
    """Settings of an edit."""

    method: str = setting("rome", "the editor", choices=METHODS)
    layers: tuple[int, ...] = setting(
        (),
        "layer to change, several for memit and alphaedit; not given: a sixth of the depth, for"
        " memit and alphaedit those up to it",
        spelled="layer",
        metavar="N",
    )
    value: ValueConfig = nested(ValueConfig, prefix="value")
    rounds: int = setting(
        2,
        "of rome: times the value is optimised, each with the edit in place, until the bare prompt"
        " has the probability at which a value stops",
        low=1,
        group="Value",
    )
    fine_tune: FineTuneConfig = nested(FineTuneConfig, prefix="ft")
    weight: float = setting(
        400.0,
        "of memit: how many usual keys the covariance stands for",
        above=0,
        group="Covariance",
    )
    energy: float = setting(
        0.1,
        "of alphaedit: share of the keys' energy in the directions that may change",
        above=0,
        below=1,
        group="Covariance",
    )

    @property
    def settled_value(self) -> ValueConfig:
        """The settings of the value, with what was left open as the method needs it."""
        return self.value.settled(self.method in TOGETHER)


DEFAULTS = EditConfig()


def layers_by_depth(n: int, method: str) -> tuple[int, ...]:
    """Of n layers, the one at a sixth of the depth, where published edits of GPT-J and Llama sit;
    for MEMIT and AlphaEdit a sixth of all layers around it, two at least. Never the last: nothing
    reads there what the subject's token holds.

    >>> layers_by_depth(28, "rome"), layers_by_depth(28, "memit")
    ((5,), (3, 4, 5, 6, 7))
    """
    editable = max(1, n - 1)
    middle = min(editable - 1, round(n / 6))
    if method not in SEVERAL_LAYERS:
        return (middle,)
    many = min(editable, max(2, middle))
    first = max(0, min(editable - many, middle - many // 2))
    return tuple(range(first, first + many))
