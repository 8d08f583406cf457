"""Everything there is to say about a stack of patches: geometry, top-k curve, channel, influence,
behaviour.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import transformers

from ..anatomy import Anatomy
from ..corpus import Corpus
from ..errors import BadInput
from ..patch import Patch
from ..progress import Tell, silent
from ..result import Result, attached, result
from ..settings import nested, setting
from .behaviour import SideBySide, side_by_side
from .channel import ChannelConfig, ChannelTrace, channel_trace
from .geometry import Curve, Geometry, GeometryConfig, geometry, topk_curve
from .influence import Columns, Influence, influence
from .story import InfluenceConfig


@dataclass(frozen=True)
class ExplainConfig:
    """Settings of the parts."""

    new_tokens: int = setting(40, "tokens of each generation", low=1)
    seed: int = setting(
        0, "seed of the permutations and of the random choices", low=0, high=2**32 - 1
    )
    geometry: GeometryConfig = nested(GeometryConfig)
    channel: ChannelConfig = nested(ChannelConfig)
    influence: InfluenceConfig = nested(InfluenceConfig)


@result("explain")
class Explanation(Result):
    """How patches work, the injury first.

    topk_curve: None without a repair, or where the injury does no damage; `no_topk_curve` says why.
    tokens: the table of all predicted tokens, by column.
    """

    patches: list[str]
    geometry: Geometry
    topk_curve: Curve | None
    no_topk_curve: str | None
    channel: ChannelTrace
    influence: Influence
    behaviour: SideBySide
    tokens: Columns | None = attached("tokens.parquet")

    def rows(self) -> list[dict[str, Any]]:
        """One row a token. Raises: BadInput if their table is not here."""
        if self.tokens is None:
            raise BadInput("the tokens of this explanation are not here, but in tokens.parquet.")
        names = list(self.tokens)
        each = zip(*self.tokens.values(), strict=True)
        return [dict(zip(names, values, strict=True)) for values in each]


def explain(
    anatomy: Anatomy,
    tokenizer: transformers.PreTrainedTokenizerBase,
    text: str,
    corpus: Corpus,
    patches: Sequence[Patch],
    groups: Mapping[str, Sequence[str]] | None = None,
    prompts: Sequence[str] = (),
    trained: Sequence[tuple[int, Patch]] = (),
    bos: str = "auto",
    config: ExplainConfig = ExplainConfig(),
    progress: Tell = silent,
) -> Explanation:
    """Explain `patches`, the injury first, the repair after it, on `corpus`, which was cut from
    `text`. The model is left as it was.

    groups: words to be tested, by name. trained: patches made with k entries, for the top-k curve.
    bos: the policy for prompts.
    Raises: BadInput; as `Patch.apply_` if the patches do not stack.
    """
    shape = geometry(anatomy, patches, config.geometry)
    # what may be refused for its input comes before what takes long
    seed = config.seed
    ranking, tokens = influence(
        anatomy, tokenizer, text, corpus, patches, groups, config.influence, seed, progress
    )
    curve, why = None, None
    try:
        curve = topk_curve(anatomy, patches, corpus, trained, config.geometry, seed, progress)
    except BadInput as error:
        why = str(error)
    trace = channel_trace(anatomy, patches, corpus, shape.lines, config.channel)
    written = side_by_side(anatomy, tokenizer, patches, prompts, config.new_tokens, bos)
    names = [str(patch) for patch in patches]
    return Explanation(names, shape, curve, why, trace, ranking, written, tokens)
