"""Repair: heal a broken model with a patch of a few kilobytes, in closed form or by
distillation.
"""

from .distil import DistilConfig, Distilled, distil
from .graft import Graft, GraftConfig, graft
from .repair import METHODS, RepairConfig, RepairResult, recovered, repair
from .target import Change, Target, targets

__all__ = [
    "METHODS",
    "Change",
    "DistilConfig",
    "Distilled",
    "Graft",
    "GraftConfig",
    "RepairConfig",
    "RepairResult",
    "Target",
    "distil",
    "graft",
    "recovered",
    "repair",
    "targets",
]
