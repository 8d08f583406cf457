"""All there is to say about a stack of patches: geometry, curve, channel, influence, behaviour."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..anatomy import Anatomy
from ..corpus import Corpus
from ..errors import BadInput
from ..patch import Patch
from .behaviour import SideBySide, side_by_side
from .channel import ChannelConfig, ChannelTrace, channel_trace
from .geometry import Curve, Geometry, GeometryConfig, geometry, topk_curve
from .influence import Influence, influence
from .states import Progress
from .story import InfluenceConfig


@dataclass(frozen=True)
class ExplainConfig:
    """Settings of the parts."""

    geometry: GeometryConfig = field(default_factory=GeometryConfig)
    channel: ChannelConfig = field(default_factory=ChannelConfig)
    influence: InfluenceConfig = field(default_factory=InfluenceConfig)
    new_tokens: int = field(default=40, metadata={"help": "tokens per generation"})


@dataclass(frozen=True)
class Explanation:
    """All parts of an explanation.

    `curve` is None without a repair, or where the injury does no damage; `no_curve` says why.
    """

    geometry: Geometry
    curve: Curve | None
    no_curve: str | None
    channel: ChannelTrace
    influence: Influence
    behaviour: SideBySide

    def to_json(self) -> dict[str, Any]:
        return {
            "geometry": self.geometry.to_json(),
            "topk_curve": None if self.curve is None else self.curve.to_json(),
            "no_topk_curve": self.no_curve,
            "channel": self.channel.to_json(),
            "influence": self.influence.to_json(),
            "behaviour": self.behaviour.to_json(),
        }


def explain(
    anatomy: Anatomy,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    corpus: Corpus,
    patches: Sequence[Patch],
    groups: Mapping[str, Sequence[str]] | None = None,
    prompts: Sequence[str] = (),
    trained: Sequence[tuple[int, Patch]] = (),
    bos: str = "auto",
    config: ExplainConfig = ExplainConfig(),
    progress: Progress | None = None,
) -> Explanation:
    """Explain `patches`, the injury first, the repair after it. The model is left as it was.

    corpus: what damage and influence are measured on; it was cut from `text`. groups: words to be
    tested, by name. prompts: to be continued, besides the reference prompts. trained: patches made
    with k entries, for the top-k curve. bos: the policy for prompts.
    Raises: BadInput; as `Patch.apply_` if the patches do not stack.
    """
    shape = geometry(anatomy, patches, config.geometry)
    # what may be refused for its input comes before what takes long
    ranking = influence(
        anatomy, tokenizer, text, corpus, patches, groups, config.influence, progress
    )
    curve, why = None, None
    try:
        curve = topk_curve(anatomy, patches, corpus, trained, config.geometry, progress)
    except BadInput as error:
        why = str(error)
    trace = channel_trace(anatomy, patches, corpus, shape.lines, config.channel)
    written = side_by_side(anatomy, tokenizer, patches, prompts, config.new_tokens, bos)
    return Explanation(shape, curve, why, trace, ranking, written)
