"""Causal tracing: which states carry a fact."""

from .average import PLACES, AverageTrace, suggest_prior, trace_facts
from .trace import KINDS, METRICS, Trace, TraceConfig, trace

__all__ = ["KINDS", "METRICS", "PLACES", "AverageTrace", "Trace", "TraceConfig", "suggest_prior", "trace", "trace_facts"]
