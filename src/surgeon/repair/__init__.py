"""Repair: heal a broken model with a patch of a few kilobytes, in closed form or by
distillation.
"""

from .config import METHODS, REFERENCE, DistilConfig, GraftConfig, RepairConfig
from .distil import Distilled, distil
from .graft import Graft, GraftChoice, graft
from .repair import ControlRepair, Divergence, HeldOut, RepairResult, WindowCounts, repair
from .run import Look
from .target import Change, Target, targets
from .windows import recut, split

__all__ = [
    "METHODS",
    "REFERENCE",
    "Change",
    "ControlRepair",
    "DistilConfig",
    "Distilled",
    "Divergence",
    "Graft",
    "GraftChoice",
    "GraftConfig",
    "HeldOut",
    "Look",
    "RepairConfig",
    "RepairResult",
    "Target",
    "WindowCounts",
    "distil",
    "graft",
    "recut",
    "repair",
    "split",
    "targets",
]
