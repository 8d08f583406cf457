"""Settings of weight quantization."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from ..errors import BadInput
from ..settings import check_values, nested, setting
from .grid import Grid

METHODS = ("rtn", "clip", "restore", "holdout")
CLIPS = ("z", "percentile", "mse", "none")
PER = ("tensor", "block")
ROLES = ("attn.q", "attn.k", "attn.v", "attn.out", "mlp.gate", "mlp.up", "mlp.down")
# the largest clip value that makes sense
_MOST = {"z": inf, "percentile": 100.0, "mse": 1.0, "none": 0.0}


@dataclass(frozen=True)
class QuantizeConfig:
    """What is rounded, how it is clipped before, and whether the critical entries are put back
    after.
    """

    grid: Grid = nested(Grid)
    method: str = setting(
        "holdout",
        "rtn: round to nearest; clip: clip, then round; restore: round, then put the critical"
        " entries back; holdout: clip, round and put back",
        choices=METHODS,
    )
    clip: str = setting(
        "z",
        "how the limits are set: by z-score, by percentile, by least squared error, not at all",
        choices=CLIPS,
        group="Clipping",
    )
    clip_value: float | None = setting(
        None,
        "z, percent kept, or share of the range (mse); not given: searched for each matrix",
        group="Clipping",
        metavar="X",
    )
    clip_per: str = setting(
        "tensor", "what z and percentiles are statistics of", choices=PER, group="Clipping"
    )
    weighted: bool = setting(
        False,
        "search by the error of outputs: the error of a column counts by the mean square of its"
        " input on the calibration windows",
        group="Calibration",
    )
    roles: tuple[str, ...] = setting(
        ROLES,
        "role of the matrices that are rounded, experts included; not given: all projections",
        group="Grid",
        spelled="role",
        metavar="ROLE",
    )

    def __post_init__(self) -> None:
        check_values(self)
        if self.clip_value is not None and not 0 < self.clip_value <= _MOST[self.clip]:
            raise BadInput(
                f"‹clip_value› {self.clip_value:g} cannot be used with {self.clip}; give a z above"
                " 0, a percentage up to 100 for percentile, a share of the range up to 1 for mse,"
                " nothing for none."
            )

    @property
    def clips(self) -> bool:
        return self.method in ("clip", "holdout") and self.clip != "none"

    @property
    def restores(self) -> bool:
        return self.method in ("restore", "holdout")
