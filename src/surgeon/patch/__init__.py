"""Patches: small exact changes to a few weights, that can be stacked, undone, saved and written
into checkpoints.
"""

from ..anatomy.names import checkpoint_address
from .checkpoint import apply_to_checkpoint, undo_on_checkpoint
from .compose import compose
from .deltas import Delta, EntriesDelta, LineDelta, LowRankDelta
from .file import load, save
from .interventions import MODES, ablate, injured, known_mode, record_channel, restored_channel
from .lora import export_lora, to_lora
from .patch import BaseTensor, Patch, applied_patches
from .stacked import stacked

__all__ = [
    "MODES",
    "BaseTensor",
    "Delta",
    "EntriesDelta",
    "LineDelta",
    "LowRankDelta",
    "Patch",
    "ablate",
    "applied_patches",
    "apply_to_checkpoint",
    "checkpoint_address",
    "compose",
    "export_lora",
    "injured",
    "known_mode",
    "load",
    "record_channel",
    "restored_channel",
    "save",
    "stacked",
    "to_lora",
    "undo_on_checkpoint",
]
