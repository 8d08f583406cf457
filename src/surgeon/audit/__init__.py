"""Audit: what a compression, merge, pruning, adapter or fine-tune did to the critical entries."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .activation import SuperActivation, channels, peaks
from .adapter import Adapter
from .audit import Audit, AuditConfig, EntryAudit, MatrixAudit, SetAudit, Watched, audit
from .gguf_file import GgufFile
from .grade import AMBER, OK, RED, VERDICTS, Curve
from .open import open_pair
from .weights import Checkpoint, Plugin, Weights

if TYPE_CHECKING:
    from .callback import CriticalWeights

__all__ = [
    "AMBER",
    "OK",
    "RED",
    "VERDICTS",
    "Adapter",
    "Audit",
    "AuditConfig",
    "Checkpoint",
    "CriticalWeights",
    "Curve",
    "EntryAudit",
    "GgufFile",
    "MatrixAudit",
    "Plugin",
    "SetAudit",
    "SuperActivation",
    "Watched",
    "Weights",
    "audit",
    "channels",
    "open_pair",
    "peaks",
]


def __getattr__(name: str) -> Any:
    # the trainer's module takes seconds to import, and only those who train need it
    if name == "CriticalWeights":
        from .callback import CriticalWeights

        return CriticalWeights
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
