"""Rewrite facts: subject and keys, covariance, value, the editors, and what an edit will do before
it is done.
"""

from .cache import CovarianceCache, default_folder
from .config import METHODS, SEVERAL_LAYERS, EditConfig, layers_by_depth
from .contexts import ContextConfig, prefixes, sampled
from .covariance import CholeskyFactor, KeyMoments, factor, key_moments
from .edit import Edit, edit
from .finetune import FineTuneConfig
from .keys import PromptBatch, dense_down, keys_at
from .preflight import (
    PUBLISHED_RATIOS,
    REFUSE,
    WARN,
    FactForecast,
    LayerForecast,
    Preflight,
    forecast,
    worst_of,
)
from .prepare import Preparation, PrepareConfig
from .radar import Radar, Touched, output_change, radar, ranked
from .rome import UnusableKey
from .session import Session, SessionConfig, Step, session
from .value import Request, ValueConfig, Values, optimise

__all__ = [
    "METHODS",
    "PUBLISHED_RATIOS",
    "REFUSE",
    "SEVERAL_LAYERS",
    "WARN",
    "CholeskyFactor",
    "ContextConfig",
    "CovarianceCache",
    "Edit",
    "EditConfig",
    "FactForecast",
    "FineTuneConfig",
    "KeyMoments",
    "LayerForecast",
    "Preflight",
    "Preparation",
    "PrepareConfig",
    "PromptBatch",
    "Radar",
    "Request",
    "Session",
    "SessionConfig",
    "Step",
    "Touched",
    "UnusableKey",
    "ValueConfig",
    "Values",
    "default_folder",
    "dense_down",
    "edit",
    "factor",
    "forecast",
    "key_moments",
    "keys_at",
    "layers_by_depth",
    "optimise",
    "output_change",
    "prefixes",
    "radar",
    "ranked",
    "sampled",
    "session",
    "worst_of",
]
