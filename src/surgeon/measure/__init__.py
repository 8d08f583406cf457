"""What a change did to a model: likelihood, divergence, behaviour, each with its uncertainty."""

from .behaviour import (
    STOP_WORDS,
    Behaviour,
    Behaviours,
    BehaviourState,
    behaviour_state,
    generate,
    loop_rate,
    stop_word_ids,
    stop_word_share,
)
from .bootstrap import interval
from .compare import Comparison, Reference
from .continuation import continuations, next_tokens
from .decoder import Decoder
from .likelihood import ResumedNLL, mean_nll, perplexity, require_causal, window_nll
from .recovery import ThreeStates
from .scorecard import (
    BeforeAfter,
    Control,
    Examination,
    FreeText,
    Scorecard,
    ScoreConfig,
    ScoredFact,
    Share,
    compared_controls,
    examine,
    scorecard,
    with_neighbours,
)
from .tasks import task_accuracy
from .verdict import GRADES, Controls, VitalConfig, is_close, is_vital, p_value, severity

__all__ = [
    "GRADES",
    "STOP_WORDS",
    "BeforeAfter",
    "Behaviour",
    "BehaviourState",
    "Behaviours",
    "Comparison",
    "Control",
    "Controls",
    "Decoder",
    "Examination",
    "FreeText",
    "Reference",
    "ResumedNLL",
    "ScoreConfig",
    "Scorecard",
    "ScoredFact",
    "Share",
    "ThreeStates",
    "VitalConfig",
    "behaviour_state",
    "compared_controls",
    "continuations",
    "examine",
    "generate",
    "interval",
    "is_close",
    "is_vital",
    "loop_rate",
    "mean_nll",
    "next_tokens",
    "p_value",
    "perplexity",
    "require_causal",
    "scorecard",
    "severity",
    "stop_word_ids",
    "stop_word_share",
    "task_accuracy",
    "window_nll",
    "with_neighbours",
]
