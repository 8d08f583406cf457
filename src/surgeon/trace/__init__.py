"""Causal tracing: which states carry a fact."""

from .average import PLACES, AverageTrace, suggest_prior, trace_facts
from .config import KINDS, METRICS, TraceConfig
from .corruption import Spread
from .trace import Trace, trace

__all__ = [
    "KINDS",
    "METRICS",
    "PLACES",
    "AverageTrace",
    "Spread",
    "Trace",
    "TraceConfig",
    "suggest_prior",
    "trace",
    "trace_facts",
]
