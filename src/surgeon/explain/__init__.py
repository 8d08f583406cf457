"""How a patch works: where it points, what it writes, which tokens it changes, tested against the
documents they stand in.
"""

from .behaviour import PROMPTS, Continuations, SideBySide, Written, distinct, side_by_side
from .channel import (
    Channel,
    ChannelConfig,
    ChannelState,
    ChannelTrace,
    Sink,
    attention_sink,
    channel_trace,
)
from .explain import ExplainConfig, Explanation, explain
from .geometry import (
    Curve,
    CurvePoint,
    EntryChange,
    Geometry,
    GeometryConfig,
    Line,
    geometry,
    participation,
    topk_curve,
)
from .influence import Influence, TokenRow, influence, token_kl
from .permutation import document_null, holm, p_value, stratified_test
from .story import InfluenceConfig, Stratum, WordGroup
from .tokens import Documents, Tokens, label_tokens, split_documents

__all__ = [
    "PROMPTS",
    "Channel",
    "ChannelConfig",
    "ChannelState",
    "ChannelTrace",
    "Continuations",
    "Curve",
    "CurvePoint",
    "Documents",
    "EntryChange",
    "ExplainConfig",
    "Explanation",
    "Geometry",
    "GeometryConfig",
    "Influence",
    "InfluenceConfig",
    "Line",
    "SideBySide",
    "Sink",
    "Stratum",
    "TokenRow",
    "Tokens",
    "WordGroup",
    "Written",
    "attention_sink",
    "channel_trace",
    "distinct",
    "document_null",
    "explain",
    "geometry",
    "holm",
    "influence",
    "label_tokens",
    "p_value",
    "participation",
    "side_by_side",
    "split_documents",
    "stratified_test",
    "token_kl",
    "topk_curve",
]
