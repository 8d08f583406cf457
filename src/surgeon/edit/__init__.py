"""Rewrite facts: subject and keys, covariance, value, the editors, and what an edit will do before
it is done.
"""

from .cache import CovarianceCache, default_folder
from .contexts import ContextConfig, prefixes, sampled
from .covariance import CholeskyFactor, KeyMoments, factor, key_moments
from .edit import METHODS, SEVERAL_LAYERS, Edit, EditConfig, default_value, edit, layers_by_depth
from .finetune import FineTuneConfig
from .keys import PromptBatch, dense_down, keys_at
from .preflight import LayerForecast, forecast
from .prepare import Preparation, PrepareConfig
from .radar import Radar, output_change, radar, ranked
from .rome import UnusableKey
from .session import Session, SessionConfig, session
from .value import Request, ValueConfig, Values, optimise

__all__ = [
    "METHODS",
    "SEVERAL_LAYERS",
    "CholeskyFactor",
    "ContextConfig",
    "CovarianceCache",
    "Edit",
    "EditConfig",
    "FineTuneConfig",
    "KeyMoments",
    "LayerForecast",
    "Preparation",
    "PrepareConfig",
    "PromptBatch",
    "Radar",
    "Request",
    "Session",
    "SessionConfig",
    "UnusableKey",
    "ValueConfig",
    "Values",
    "default_folder",
    "default_value",
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
]
