"""What a patch does to the residual stream: the patched channel over layers and positions, and
where attention goes.

How this works. A row of a matrix that writes to the residual stream writes one of its channels; so
the rows that the patches change name the channels to look at. In each state, intact, broken and
patched, the model runs once over the text, and |channel| is kept before the first layer and after
each. What the patch writes is read off right after its own layer, window by window at the position
where the channel is largest: layers above may write the channel too, and a peak over all layers
would hide what the patch takes away. The first position of a window is listed apart, since a super
activation sits there. Attention is looked at in the same states, since massive activations and
attention sinks come together (Sun et al. 2024, arXiv:2402.17762).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from ..anatomy import Anatomy, Site
from ..corpus import Corpus
from ..measure.likelihood import batches
from ..patch import Patch, stacked
from ..result import record
from ..settings import setting
from ..tap import Tap
from .geometry import Line
from .states import require_stack, states

WRITES_RESIDUAL = ("mlp.down", "attn.out", "embed")


@dataclass(frozen=True)
class ChannelConfig:
    """Settings of the trace."""

    channels: int = setting(
        4, "patched channels traced, largest change first", low=1, group="Channel"
    )
    positions: int = setting(
        32, "first positions of the windows that are listed", low=1, group="Channel"
    )
    attention_windows: int = setting(
        8, "windows on which attention is looked at", low=1, group="Channel"
    )


@record
class ChannelState:
    """|residual channel| in one state. Lists over layers: index 0 is what enters the first layer,
    index l what leaves layer l - 1.

    rest: mean over windows and positions after the first. first: mean at the first position.
    largest: over everything. positions: mean over windows at the first positions, where the patched
    site has just written (`Channel.written_at`). peak: the largest over positions of each window
    there, mean over windows. ratio: peak over the base's peak. Later layers may write the channel
    too, so a peak over all layers would hide what the patch takes away.
    """

    rest: list[float]
    first: list[float]
    largest: list[float]
    positions: list[float]
    peak: float
    ratio: float


@record
class Channel:
    """One residual channel in every state. `written_at` indexes the lists over layers."""

    channel: int
    written_by: Site
    written_at: int
    states: dict[str, ChannelState]


@record
class Sink:
    """Share of attention that goes to position 0, per layer: mean over heads, windows and the
    queries after position 0.

    uniform: what it would be if each query looked everywhere alike.
    """

    states: dict[str, list[float]]
    uniform: float
    windows: int


@record
class ChannelTrace:
    """Channels by size of their change; each part is None where it cannot be had, and the reason
    says why.
    """

    channels: list[Channel] | None
    no_channels: str | None
    attention_sink: Sink | None
    no_attention_sink: str | None


def channel_trace(
    anatomy: Anatomy,
    patches: Sequence[Patch],
    corpus: Corpus,
    lines: Sequence[Line],
    config: ChannelConfig = ChannelConfig(),
) -> ChannelTrace:
    """Trace the residual channels that the rows among `lines` write (see `geometry`), and the
    attention sink, in every state.

    The model is left as it was. Raises: as `Patch.apply_` if the patches do not stack.
    """
    require_stack(anatomy, patches)
    named = states(patches)
    writers: dict[int, Site] = {}
    for region in (line.region for line in lines):
        if region.row is not None and region.site.role in WRITES_RESIDUAL:
            writers.setdefault(region.row, region.site)  # the largest change, which comes first
    writers = dict(islice(writers.items(), config.channels))
    roles = ", ".join(WRITES_RESIDUAL)
    why: str | None = f"the patches change no whole row of {roles}, which write the residual stream"
    channels: list[Channel] | None = None
    if writers:
        channels, why = _channels(anatomy, named, corpus.windows, writers, config.positions), None
    sink = attention_sink(anatomy, named, corpus.windows[: config.attention_windows])
    if isinstance(sink, Sink):
        return ChannelTrace(channels, why, sink, None)
    return ChannelTrace(channels, why, None, sink)


@torch.no_grad()
def _channels(
    anatomy: Anatomy,
    named: Mapping[str, Sequence[Patch]],
    windows: Int64[Tensor, "n window"],
    writers: Mapping[int, Site],
    positions: int,
) -> list[Channel]:
    """Each channel of `writers` in every state."""
    sizes = {}  # by state: (layers, n, window, channel)
    for state, patches in named.items():
        with stacked(anatomy, patches):
            parts = [_residual(anatomy, ids, list(writers)) for ids in batches(windows)]
        sizes[state] = torch.cat(parts, 1).double()
    channels = []
    for i, (channel, site) in enumerate(writers.items()):
        # index 0 is what enters the first layer, where the embedding has just written
        at = 0 if site.layer is None else site.layer + 1
        of_channel = {state: size[..., i] for state, size in sizes.items()}
        base_peak = _peak(of_channel["base"], at)
        states_of = {
            state: _channel_state(size, at, positions, base_peak)
            for state, size in of_channel.items()
        }
        channels.append(Channel(channel, site, at, states_of))
    return channels


def _channel_state(
    size: Float64[Tensor, "layers n window"], at: int, positions: int, base_peak: float
) -> ChannelState:
    peak = _peak(size, at)
    return ChannelState(
        rest=size[:, :, 1:].mean((1, 2)).tolist(),
        first=size[:, :, 0].mean(1).tolist(),
        largest=size.amax((1, 2)).tolist(),
        positions=size[at, :, :positions].mean(0).tolist(),
        peak=peak,
        ratio=peak / base_peak if base_peak else 0.0,
    )


def _peak(size: Float64[Tensor, "layers n window"], at: int) -> float:
    """The largest over positions of each window where the site has just written, mean over
    windows.
    """
    return float(size[at].amax(1).mean())


def _residual(
    anatomy: Anatomy, ids: Int64[Tensor, "batch pos"], channels: Sequence[int]
) -> Float[Tensor, "layers batch pos channel"]:
    """|residual| of some channels before the first layer and after each."""
    sizes: list[Tensor] = []

    def keep(h: Tensor) -> None:
        sizes.append(h[..., list(channels)].float().abs().cpu())

    with Tap() as tap:
        tap.on_input(anatomy.layers[0], keep)
        for layer in anatomy.layers:
            tap.on_output(layer, keep)
        tap.run(
            anatomy.model,
            input_ids=ids.to(next(anatomy.model.parameters()).device),
            use_cache=False,
        )
    return torch.stack(sizes)


@torch.no_grad()
def attention_sink(
    anatomy: Anatomy, named: Mapping[str, Sequence[Patch]], windows: Int64[Tensor, "n window"]
) -> Sink | str:
    """The attention sink in each state, or why this model does not show its attention.

    The attention code is put back.
    """
    shares: dict[str, list[float]] = {}
    for state, patches in named.items():
        with stacked(anatomy, patches):
            attentions = _attentions(anatomy.model, windows)
        if isinstance(attentions, str):
            return attentions
        shares[state] = [float(_to_first(one)) for one in attentions]
    queries = torch.arange(2, windows.shape[1] + 1, dtype=torch.float64)
    return Sink(shares, float((1 / queries).mean()), len(windows))


def _attentions(
    model: Any, windows: Int64[Tensor, "n window"]
) -> Sequence[Float[Tensor, "n head window window"]] | str:
    """The attention weights of each layer; or why this model does not show them."""
    ids = windows.to(next(model.parameters()).device)
    try:
        with _eager(model):
            output = model(input_ids=ids, use_cache=False, output_attentions=True)
    # a model that has no such switch, one whose attention has no such code, and one whose forward
    # does not take the argument, each in its own way; nothing else runs within the block
    except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        return f"this model cannot be run so that it shows its attention: {why}"
    attentions = getattr(output, "attentions", None)
    if not attentions or not all(isinstance(a, Tensor) and a.dim() == 4 for a in attentions):
        return "this model returns no attention weights, also when it is asked for them"
    # falcon under sdpa returns weights that it computed anew and without the mask
    if any(bool(one.triu(1).any()) for one in attentions):
        return (
            "the attention weights that this model returns look ahead, so they are not those it"
            " works with"
        )
    weights: Sequence[Tensor] = attentions
    return weights


def _to_first(attention: Float[Tensor, "batch head pos pos"]) -> Float64[Tensor, ""]:
    return attention[:, :, 1:, 0].double().mean()


@contextmanager
def _eager(model: Any) -> Iterator[None]:
    """The attention code that returns its weights, within the block."""
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation("eager")
        yield
    finally:
        model.set_attn_implementation(before)
