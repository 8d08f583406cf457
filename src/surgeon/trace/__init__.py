"""Causal tracing: which states carry a fact."""

from .average import PLACES, AverageTrace, suggest_prior, trace_facts
from .config import KINDS, METRICS, TRACED, TraceConfig
from .corruption import Spread
from .result import Corruption, LayerEffect, RestoredSite, TraceAverage, TraceResult
from .trace import Trace, trace

__all__ = [
    "KINDS",
    "METRICS",
    "PLACES",
    "TRACED",
    "AverageTrace",
    "Corruption",
    "LayerEffect",
    "RestoredSite",
    "Spread",
    "Trace",
    "TraceAverage",
    "TraceConfig",
    "TraceResult",
    "suggest_prior",
    "trace",
    "trace_facts",
]
