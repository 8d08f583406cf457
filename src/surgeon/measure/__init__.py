"""What a change did to a model: likelihood, divergence, behaviour, each with its uncertainty."""

from .behaviour import STOP_WORDS, Behaviour, generate, loop_rate, stop_word_ids, stop_word_share
from .bootstrap import interval
from .continuation import continuations, next_tokens
from .decoder import Decoder
from .divergence import Divergence, Reference, divergence
from .likelihood import ResumedNLL, mean_nll, require_causal, window_nll
from .scorecard import Examination, Scorecard, ScoreConfig, examine, with_neighbours
from .tasks import task_accuracy

__all__ = [
    "STOP_WORDS",
    "Behaviour",
    "Decoder",
    "Divergence",
    "Examination",
    "Reference",
    "ResumedNLL",
    "ScoreConfig",
    "Scorecard",
    "continuations",
    "divergence",
    "examine",
    "generate",
    "interval",
    "loop_rate",
    "mean_nll",
    "next_tokens",
    "require_causal",
    "stop_word_ids",
    "stop_word_share",
    "task_accuracy",
    "window_nll",
    "with_neighbours",
]
