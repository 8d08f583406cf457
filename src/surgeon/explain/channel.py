"""What a patch does to the residual stream: the patched channel over layers and positions, and
where attention goes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
    rows = [
        (line.region.row, line.region.site)
        for line in lines
        if line.region.site.role in WRITES_RESIDUAL
    ]
    writers = {
        row: site for row, site in reversed(rows) if row is not None
    }  # the largest change names the writer
    chosen = list(dict.fromkeys(row for row, _ in rows if row is not None))[: config.channels]
    channels = (
        _channels(anatomy, named, corpus.windows, chosen, writers, config.positions)
        if chosen
        else None
    )
    why = (
        None
        if chosen
        else (
            f"the patches change no whole row of {', '.join(WRITES_RESIDUAL)}, which write the"
            " residual stream"
        )
    )
    sink = attention_sink(anatomy, named, corpus.windows[: config.attention_windows])
    if isinstance(sink, Sink):
        return ChannelTrace(channels, why, sink, None)
    return ChannelTrace(channels, why, None, sink)


@torch.no_grad()
def _channels(
    anatomy: Anatomy,
    named: Mapping[str, Sequence[Patch]],
    windows: Int64[Tensor, "n window"],
    chosen: Sequence[int],
    writers: Mapping[int, Site],
    positions: int,
) -> list[Channel]:
    seen = {}
    for state, patches in named.items():
        with stacked(anatomy, patches):
            seen[state] = torch.cat(
                [_residual(anatomy, ids, chosen) for ids in batches(windows)], 1
            ).double()
    found = []
    for i, channel in enumerate(chosen):
        layer = writers[channel].layer
        at = 0 if layer is None else layer + 1
        peak = {state: float(values[at, ..., i].amax(1).mean()) for state, values in seen.items()}
        found.append(
            Channel(
                channel,
                writers[channel],
                at,
                {
                    state: ChannelState(
                        rest=values[:, :, 1:, i].mean((1, 2)).tolist(),
                        first=values[:, :, 0, i].mean(1).tolist(),
                        largest=values[..., i].amax((1, 2)).tolist(),
                        positions=values[at, :, :positions, i].mean(0).tolist(),
                        peak=peak[state],
                        ratio=peak[state] / peak["base"] if peak["base"] else 0.0,
                    )
                    for state, values in seen.items()
                },
            )
        )
    return found


def _residual(
    anatomy: Anatomy, ids: Int64[Tensor, "batch pos"], channels: Sequence[int]
) -> Float[Tensor, "layers batch pos channel"]:
    """|residual| of some channels before the first layer and after each."""
    seen: list[Tensor] = []

    def keep(h: Tensor) -> None:
        seen.append(h[..., list(channels)].float().abs().cpu())

    with Tap() as tap:
        tap.on_input(anatomy.layers[0], keep)
        for layer in anatomy.layers:
            tap.on_output(layer, keep)
        tap.run(
            anatomy.model,
            input_ids=ids.to(next(anatomy.model.parameters()).device),
            use_cache=False,
        )
    return torch.stack(seen)


@torch.no_grad()
def attention_sink(
    anatomy: Anatomy, named: Mapping[str, Sequence[Patch]], windows: Int64[Tensor, "n window"]
) -> Sink | str:
    """The attention sink in each state, or why this model does not show its attention.

    The attention code is put back.
    """
    device = next(anatomy.model.parameters()).device
    found: dict[str, list[float]] = {}
    try:
        with _eager(anatomy.model):
            for state, patches in named.items():
                with stacked(anatomy, patches):
                    output = anatomy.model(
                        input_ids=windows.to(device), use_cache=False, output_attentions=True
                    )
                attentions = getattr(output, "attentions", None)
                if not attentions or not all(
                    isinstance(a, Tensor) and a.dim() == 4 for a in attentions
                ):
                    return "this model returns no attention weights, also when it is asked for them"
                # falcon under sdpa returns weights that it computed anew and without the mask
                if any(bool(a.triu(1).any()) for a in attentions):
                    return (
                        "the attention weights that this model returns look ahead, so they are not"
                        " those it works with"
                    )
                found[state] = [float(_to_first(a)) for a in attentions]
    except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
        return (
            "this model cannot be run so that it shows its attention:"
            f" {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        )
    queries = torch.arange(2, windows.shape[1] + 1, dtype=torch.float64)
    return Sink(found, float((1 / queries).mean()), len(windows))


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
