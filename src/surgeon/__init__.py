"""Weight surgery for transformer language models: find what a model cannot live without, prove it,
take it out, put it back.
"""

from . import _quiet as _quiet  # before all else: what it quietens happens once
from .anatomy import Anatomy, Entry, Layout, Loaded, Region, Site, WeightView, load_model, prove
from .corpus import Corpus, load_corpus, read_text
from .errors import BadInput, Refused, SurgeonError
from .find import FindConfig, FindResult, Verification, VerifyConfig, detect, find, verify
from .measure import divergence, generate, mean_nll
from .patch import Patch, ablate, apply_to_checkpoint, injured, load, save, undo_on_checkpoint
from .quantize import (
    QuantizeConfig,
    quantize_,
)  # also lets transformers load what `--export sidecar` wrote
from .tap import Tap, capture, resume

__all__ = [
    "Anatomy",
    "BadInput",
    "Corpus",
    "Entry",
    "FindConfig",
    "FindResult",
    "Layout",
    "Loaded",
    "Patch",
    "QuantizeConfig",
    "Refused",
    "Region",
    "Site",
    "SurgeonError",
    "Tap",
    "Verification",
    "VerifyConfig",
    "WeightView",
    "ablate",
    "apply_to_checkpoint",
    "capture",
    "detect",
    "divergence",
    "find",
    "generate",
    "injured",
    "load",
    "load_corpus",
    "load_model",
    "mean_nll",
    "prove",
    "quantize_",
    "read_text",
    "resume",
    "save",
    "undo_on_checkpoint",
    "verify",
]
