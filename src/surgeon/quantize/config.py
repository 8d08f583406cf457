"""Settings of weight quantization."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf
from typing import Any

from ..errors import BadInput
from .grid import Grid

Progress = Callable[[str, int, int], None]  # what is done, how many of it, of how many
METHODS = ("rtn", "clip", "restore", "holdout")
CLIPS = ("z", "percentile", "mse", "none")
PER = ("tensor", "block")
ROLES = ("attn.q", "attn.k", "attn.v", "attn.out", "mlp.gate", "mlp.up", "mlp.down")


@dataclass(frozen=True)
class QuantizeConfig:
    """What is rounded, how it is clipped before, and whether the critical entries are put back
    after.
    """

    grid: Grid = field(default_factory=Grid)
    method: str = field(
        default="holdout",
        metadata={
            "help": (
                "rtn; clip; restore (put the critical entries back, without clipping); holdout"
                " (clip, and put them back)"
            )
        },
    )
    clip: str = field(
        default="z",
        metadata={
            "help": "how limits are set: z-score, percentile, mse (least squared error), none"
        },
    )
    clip_value: float | None = field(
        default=None,
        metadata={
            "help": (
                "z, or percent kept, or share of the range (mse); not given: searched for each"
                " matrix"
            )
        },
    )
    clip_per: str = field(
        default="tensor",
        metadata={"help": "whether z and percentiles are taken over the tensor or over each block"},
    )
    weighted: bool = field(
        default=False,
        metadata={"help": "weigh the error of a column by the mean square of its input"},
    )
    roles: tuple[str, ...] = field(
        default=ROLES,
        metadata={"help": "roles of the matrices that are quantized, experts included"},
    )

    def __post_init__(self) -> None:
        for name, value, known in (
            ("method", self.method, METHODS),
            ("clip", self.clip, CLIPS),
            ("clip_per", self.clip_per, PER),
        ):
            if value not in known:
                raise BadInput(f"{name} {value} is not known; use {', '.join(known)}.")
        most = {"z": inf, "percentile": 100.0, "mse": 1.0, "none": 0.0}[self.clip]
        if self.clip_value is not None and not 0 < self.clip_value <= most:
            raise BadInput(
                f"a clip value of {self.clip_value:g} cannot be used with {self.clip}; give a z"
                " above 0, a percentage up to 100 for percentile, a share of the range up to 1 for"
                " mse, none for none."
            )

    @property
    def clips(self) -> bool:
        return self.method in ("clip", "holdout") and self.clip != "none"

    @property
    def restores(self) -> bool:
        return self.method in ("restore", "holdout")

    def to_json(self) -> dict[str, Any]:
        return {
            "bits": self.grid.bits,
            "symmetric": self.grid.symmetric,
            "block": str(self.grid.block),
            "pad": self.grid.pad,
            "method": self.method,
            "clip": self.clip,
            "clip_value": self.clip_value,
            "clip_per": self.clip_per,
            "weighted": self.weighted,
            "roles": list(self.roles),
        }
