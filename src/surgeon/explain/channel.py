"""What a patch does to the residual stream: the channel it writes, and where attention goes."""

# How this works.
#
# A row of `mlp.down`, `attn.out` or `embed` writes one channel of the residual stream. For the rows
# that the patches change most, |channel| is recorded before the first layer and after each layer,
# at every position, in every state of the model (states.py).
#
# A massive channel at the first position is what attention heads use as a sink: they look there
# when they have nothing to look at. So beside the channel stands the share of attention that goes
# to position 0. It is read off the weights that the eager implementation of attention returns;
# `sdpa` and the like return none, or (Falcon) weights computed anew without the mask, which are
# refused.
#
# The peak is taken where the patched site has just written. Later layers may write the channel too,
# and a peak over all layers would hide what the patch takes away.

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from ..anatomy import Anatomy, Site
from ..corpus import Corpus
from ..errors import BadInput
from ..measure.likelihood import batches
from ..patch import Patch
from ..tap import Tap
from .geometry import Line
from .states import require_stack, stacked, states

WRITES_RESIDUAL = ("mlp.down", "attn.out", "embed")

Attention = Float[Tensor, "batch head query key"]


@dataclass(frozen=True)
class ChannelConfig:
    """Settings of the trace. Raises: BadInput for one below 1."""

    channels: int = field(
        default=4, metadata={"help": "patched channels traced, largest change first"}
    )
    positions: int = field(
        default=32, metadata={"help": "first positions of the windows that are listed"}
    )
    attention_windows: int = field(
        default=8, metadata={"help": "windows on which attention is looked at"}
    )

    def __post_init__(self) -> None:
        if min(self.channels, self.positions, self.attention_windows) < 1:
            raise BadInput("channels, positions and attention windows of the trace count from 1.")


@dataclass(frozen=True)
class ChannelState:
    """|residual channel| in one state.

    Lists over layers: index 0 is what enters the first layer, index l what leaves layer l - 1.
    rest: mean over windows and positions after the first. first: mean at the first position.
    largest: over everything.

    Where the patched site has just written (`Channel.written_at`):
    positions: mean over windows at the first positions. peak: the largest over positions of each
    window, mean over windows. ratio: peak over the base's peak.
    """

    rest: list[float]
    first: list[float]
    largest: list[float]
    positions: list[float]
    peak: float
    ratio: float


@dataclass(frozen=True)
class Channel:
    """One residual channel in every state. `written_at` indexes the lists over layers."""

    channel: int
    written_by: Site
    written_at: int
    states: dict[str, ChannelState]

    def to_json(self) -> dict[str, Any]:
        return {
            **vars(self),
            "written_by": str(self.written_by),
            "states": {name: vars(state) for name, state in self.states.items()},
        }


@dataclass(frozen=True)
class Sink:
    """Share of attention that goes to position 0, by state, per layer.

    It is a mean over heads, windows and the queries after position 0. uniform: what it would be if
    each query looked everywhere alike.
    """

    states: dict[str, list[float]]
    uniform: float
    windows: int

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass(frozen=True)
class ChannelTrace:
    """Channels by size of their change, and the attention sink.

    Each is None where it cannot be had, and `no_channels` or `no_sink` says why.
    """

    channels: list[Channel] | None
    no_channels: str | None
    sink: Sink | None
    no_sink: str | None

    def to_json(self) -> dict[str, Any]:
        return {
            "channels": None if self.channels is None else [c.to_json() for c in self.channels],
            "no_channels": self.no_channels,
            "attention_sink": None if self.sink is None else self.sink.to_json(),
            "no_attention_sink": self.no_sink,
        }


def channel_trace(
    anatomy: Anatomy,
    patches: Sequence[Patch],
    corpus: Corpus,
    lines: Sequence[Line],
    config: ChannelConfig = ChannelConfig(),
) -> ChannelTrace:
    """Trace the residual channels that patched rows write, and the attention sink, in every state.

    lines: what the patches change, largest change first, see `geometry`. The model is left as it
    was.
    Raises: as `Patch.apply_` if the patches do not stack.
    """
    require_stack(anatomy, patches)
    named = states(patches)
    writers: dict[int, Site] = {}
    for line in lines:
        row, site = line.region.row, line.region.site
        if row is not None and site.role in WRITES_RESIDUAL:
            writers.setdefault(row, site)  # the largest change of a channel comes first
    writers = dict(list(writers.items())[: config.channels])
    channels, why_none = None, None
    if writers:
        channels = _channels(anatomy, named, corpus.windows, writers, config.positions)
    else:
        roles = ", ".join(WRITES_RESIDUAL)
        why_none = f"the patches change no whole row of {roles}, which write the residual stream"
    sink = attention_sink(anatomy, named, corpus.windows[: config.attention_windows])
    if isinstance(sink, Sink):
        return ChannelTrace(channels, why_none, sink, None)
    return ChannelTrace(channels, why_none, None, sink)


@torch.no_grad()
def _channels(
    anatomy: Anatomy,
    named: Mapping[str, Sequence[Patch]],
    windows: Int64[Tensor, "n window"],
    writers: Mapping[int, Site],
    positions: int,
) -> list[Channel]:
    chosen = list(writers)
    sizes: dict[str, Tensor] = {}  # (layers, n, window, channel) of each state
    for state, patches in named.items():
        with stacked(anatomy, patches):
            by_batch = [_residual(anatomy, ids, chosen) for ids in batches(windows)]
        sizes[state] = torch.cat(by_batch, 1).double()
    channels = []
    for i, (channel, site) in enumerate(writers.items()):
        at = 0 if site.layer is None else site.layer + 1
        described: dict[str, ChannelState] = {}
        for state, of_all in sizes.items():
            size = of_all[..., i]  # (layers, n, window)
            peak = float(size[at].amax(1).mean())
            base = described["base"].peak if described else peak
            described[state] = ChannelState(
                rest=size[:, :, 1:].mean((1, 2)).tolist(),
                first=size[:, :, 0].mean(1).tolist(),
                largest=size.amax((1, 2)).tolist(),
                positions=size[at, :, :positions].mean(0).tolist(),
                peak=peak,
                ratio=peak / base if base else 0.0,
            )
        channels.append(Channel(channel, site, at, described))
    return channels


def _residual(
    anatomy: Anatomy, ids: Int64[Tensor, "batch pos"], channels: Sequence[int]
) -> Float[Tensor, "layers batch pos channel"]:
    """|residual| of some channels before the first layer and after each."""
    sizes: list[Tensor] = []

    def keep(h: Tensor) -> None:
        sizes.append(h[..., list(channels)].float().abs().cpu())

    device = next(anatomy.model.parameters()).device
    with Tap() as tap:
        tap.on_input(anatomy.layers[0], keep)
        for layer in anatomy.layers:
            tap.on_output(layer, keep)
        tap.run(anatomy.model, input_ids=ids.to(device), use_cache=False)
    return torch.stack(sizes)


@torch.no_grad()
def attention_sink(
    anatomy: Anatomy, named: Mapping[str, Sequence[Patch]], windows: Int64[Tensor, "n window"]
) -> Sink | str:
    """The attention sink in each state, or why this model does not show its attention.

    The implementation of attention is put back.
    """
    device = next(anatomy.model.parameters()).device
    shares: dict[str, list[float]] = {}
    try:
        with _eager(anatomy.model):
            for state, patches in named.items():
                with stacked(anatomy, patches):
                    output = anatomy.model(
                        input_ids=windows.to(device), use_cache=False, output_attentions=True
                    )
                attentions = getattr(output, "attentions", None) or ()
                why_not = _unusable(attentions)
                if why_not:
                    return why_not
                shares[state] = [float(_to_first(attention)) for attention in attentions]
    except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
        lines = str(error).splitlines()
        reason = lines[0] if lines else type(error).__name__
        return f"this model cannot be run so that it shows its attention: {reason}"
    keys = torch.arange(2, windows.shape[1] + 1, dtype=torch.float64)  # each query can look at
    return Sink(shares, float((1 / keys).mean()), len(windows))


def _unusable(attentions: Sequence[Any]) -> str | None:
    """Why these are not the attention weights that the model works with, if they are not."""
    are_weights = [isinstance(a, Tensor) and a.dim() == 4 for a in attentions]
    if not attentions or not all(are_weights):
        return "this model returns no attention weights, also when it is asked for them"
    # falcon under sdpa returns weights that it computed anew and without the mask
    if any(bool(a.triu(1).any()) for a in attentions):
        return (
            "the attention weights that this model returns look ahead, so they are not those it"
            " works with"
        )
    return None


def _to_first(attention: Attention) -> Float64[Tensor, ""]:
    return attention[:, :, 1:, 0].double().mean()


@contextmanager
def _eager(model: Any) -> Iterator[None]:
    """The implementation of attention that returns its weights, within the block."""
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation("eager")
        yield
    finally:
        model.set_attn_implementation(before)
