"""What a change did to a model: likelihood, divergence, behaviour, each with its uncertainty."""

from .behaviour import STOP_WORDS, Behaviour, generate, loop_rate, stop_word_ids, stop_word_share
from .bootstrap import interval
from .divergence import Divergence, divergence
from .likelihood import ResumedNLL, mean_nll, require_causal, window_nll
from .tasks import task_accuracy

__all__ = [
    "STOP_WORDS",
    "Behaviour",
    "Divergence",
    "ResumedNLL",
    "divergence",
    "generate",
    "interval",
    "loop_rate",
    "mean_nll",
    "require_causal",
    "stop_word_ids",
    "stop_word_share",
    "task_accuracy",
    "window_nll",
]
