"""Detection: one forward pass that names the channels a critical set may write, and the entries
that write them.

A critical set shows as a residual channel that rises far above the others and stays there over most
of the remaining depth. Its onset layer is the writer; the write y[t, j] = sum_k x[t, k] W[j, k]
splits into one contribution per entry. Entries are ranked by contribution, never by |w| or |x|:
rescaling a neuron changes both and the function not at all.
Source: Yu et al. 2024, arXiv:2411.07191, section 3; Sun et al. 2024, arXiv:2402.17762.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from ..anatomy import Anatomy, Entry, Site
from ..errors import BadInput, SurgeonError
from ..result import Result, derived, record, result
from ..settings import setting
from ..tap import Tap
from .experts import ExpertProfile

# of each MLP's output the largest channels, whose contributions are kept; a super activation is
# among them, and all channels would be a matrix for each layer
WATCHED_CHANNELS = 8
PEAK_TOKENS = 8  # tokens at which a channel is largest; one alone could be an accident of the text


def layer_range(text: str) -> tuple[int, int]:
    """`A:B`, the layers A to B-1. Raises: BadInput for another form."""
    match = re.fullmatch(r"\s*(\d+):(\d+)\s*", text)
    if match is None:
        raise BadInput(
            f"‹layers› {text} is no range of layers; write the first and the end like 0:4, which"
            " means layers 0 to 3."
        )
    return int(match[1]), int(match[2])


@dataclass(frozen=True)
class DetectConfig:
    """Settings of the detection pass."""

    layers: tuple[int, int] | None = setting(
        None,
        "look for writers in layers A to B-1 only; detection then reads no layer above, and"
        " persistence is judged up to B",
        metavar="A:B",
        parse=layer_range,
    )
    min_height: float = setting(
        4.0,
        "least height of a channel: its peak, or its RMS, over the median channel's",
        group="Detection",
    )
    relative_height: float = setting(
        0.05, "least height as a share of the highest channel's", group="Detection"
    )
    persistence: float = setting(
        0.6,
        "share of the remaining layers in which the channel must stay high",
        low=0,
        high=1,
        group="Detection",
    )

    def span(self, depth: int) -> tuple[int, int]:
        """First layer and end of the search in a model of `depth` layers.

        Raises: BadInput if no such layers exist.
        """
        low, high = self.layers or (0, depth)
        if not 0 <= low < high <= depth:
            raise BadInput(
                f"‹layers› {low}:{high} is no range of this model's {depth} layers; the widest is"
                f" 0:{depth}."
            )
        return low, high


@record
class Contribution:
    """One entry and its share of what its channel receives from this layer.

    mean_share, peak_share: over all tokens, and at the peak tokens. magnitude: |w x| at the peaks,
    in units of the residual stream.
    """

    entry: Entry
    mean_share: float
    peak_share: float
    magnitude: float

    @derived
    def share(self) -> float:
        """The larger of the two shares."""
        larger_mean = abs(self.mean_share) >= abs(self.peak_share)
        return self.mean_share if larger_mean else self.peak_share


@record
class Candidate:
    """A channel that rose at `layer` and stayed.

    height: the highest of `heights`, which are by layer. agreement: in what share of the windows it
    is high. contributions: the entries that write it, strongest first.
    """

    channel: int
    layer: int
    height: float
    heights: list[float]
    persistence: float
    agreement: float
    contributions: tuple[Contribution, ...]


@record
class Rejection:
    """Something that stood out, why it is no critical set, and the numbers that decided it.

    entry: the channel or entry. height: of its channel, over the median channel's. entries: how
    many write it.
    """

    entry: str
    reason: str
    height: float | None = None
    persistence: float | None = None
    entries: int | None = None
    joint_nats: float | None = None
    control_max_nats: float | None = None
    control_median_nats: float | None = None


@record
class Heights:
    """What detection saw of the channels: the tallest of each layer, and the bar for candidates."""

    bar: float
    heights: list[float]


@result("detect")
class Detection(Result):
    """What one detection pass saw; no damage is measured, so nothing is called vital."""

    candidates: list[Candidate]
    rejected: list[Rejection]
    detection: Heights
    experts: list[ExpertProfile] = field(default_factory=list)

    @derived
    def verdict(self) -> None:
        """None: only damage decides."""
        return

    def rows(self) -> list[dict[str, object]]:
        return [
            {
                "channel": one.channel,
                "layer": one.layer,
                "height": one.height,
                "persistence": one.persistence,
                "agreement": one.agreement,
                "entry": one.contributions[0].entry,
                "share": one.contributions[0].share,
            }
            for one in self.candidates
        ]


@torch.no_grad()
def detect(
    anatomy: Anatomy,
    windows: Int64[Tensor, "n window"],
    config: DetectConfig = DetectConfig(),
    bar: float | None = None,
) -> Detection:
    """One pass over `windows`; the candidates by height.

    Pass `bar` to hold a later round to the bar of the first.
    """
    first, end = config.span(len(anatomy.layers))
    watches = _run(anatomy, windows, end)
    height = torch.stack([watch.height for watch in watches])  # (layer, d_model)
    if not bool(torch.isfinite(height).all()):
        raise SurgeonError(
            "the model's residual stream is not finite on this text (inf or NaN), so nothing can be"
            " found; try ‹dtype› float32."
        )
    if bar is None:
        bar = max(config.min_height, config.relative_height * float(height.max()))
    judge = partial(_judge, anatomy, watches, height, bar, config, first)
    high_channels = (height.amax(0) >= bar).nonzero().flatten().tolist()
    judged = [judge(channel) for channel in high_channels]
    candidates = [one for one in judged if isinstance(one, Candidate)]
    rejected = [one for one in judged if isinstance(one, Rejection)]
    candidates.sort(key=lambda one: -one.height)
    return Detection(candidates, rejected, Heights(bar, height.amax(1).tolist()))


def _judge(
    anatomy: Anatomy,
    watches: list[_Watch],
    height: Tensor,
    bar: float,
    config: DetectConfig,
    first: int,
    channel: int,
) -> Candidate | Rejection:
    """Whether a critical set may write this channel. Shapes: height (layer, d_model)."""
    heights = height[:, channel]
    onset = int((heights >= bar).nonzero()[0])
    top = float(heights.max())
    where = f"L{onset} channel {channel}"
    if onset < first:
        return Rejection(
            where, "the channel rose below the layers that were to be searched", height=top
        )

    persistence = _persistence(heights, onset, bar, whole=len(heights) == len(anatomy.layers))
    if persistence < config.persistence:
        return Rejection(
            where,
            "the channel does not stay high over the remaining depth",
            height=top,
            persistence=persistence,
        )

    watch = watches[onset]
    if channel not in watch.channels:
        return Rejection(
            where,
            "the channel is high but the MLP of its onset layer does not write it (embedding or"
            " attention does)",
            height=top,
        )
    agreement = float((watch.window_height[:, channel] >= bar / 2).float().mean())
    contributions = tuple(watch.contributions(channel))
    return Candidate(channel, onset, top, heights.tolist(), persistence, agreement, contributions)


def _persistence(heights: Tensor, onset: int, bar: float, whole: bool) -> float:
    """Share of the layers from the onset on in which the channel stays above half the bar.

    whole: the heights reach the model's last layer, which often takes a super activation away
    again, so that it is not asked to keep it.
    """
    end = len(heights) - 1 if whole else len(heights)
    remaining = heights[onset : max(onset + 1, end)]
    return float((remaining >= bar / 2).float().mean())


def _run(anatomy: Anatomy, windows: Tensor, end: int) -> list[_Watch]:
    """One pass over the layers below `end`."""
    watches = [_Watch(anatomy, index) for index in range(end)]
    device = next(anatomy.model.parameters()).device
    with Tap() as tap:
        for watch in watches:
            tap.on_call(watch.writer, watch.see_call)
            tap.on_output(watch.writer, watch.see_write)
            tap.on_output(watch.block, watch.see_residual)
        tap.stop_after(watches[-1].block)
        tap.run(anatomy.model, input_ids=windows.to(device), use_cache=False)
    return watches


class _Watch:
    """Statistics of one layer, taken while the pass runs, so that no activation outlives its layer.

    height (d_model): of each channel of the residual stream after the layer, see `_height`;
    window_height (n, d_model): the same for each window. channels: the tallest of the MLP's output.
    aligned (channel, in): mean of sign(y) x; peaks (channel, in): x at the channel's peak tokens,
    signed the same way.
    """

    height: Tensor
    window_height: Tensor

    def __init__(self, anatomy: Anatomy, layer: int) -> None:
        self.anatomy, self.layer = anatomy, layer
        self.block = anatomy.layers[layer]
        self.sites = anatomy.downs(layer)
        self.writer: nn.Module = anatomy.module(self.sites[0])
        self.channels: dict[int, int] = {}
        self._args: tuple[Any, ...] = ()

    def see_call(self, args: tuple[Any, ...]) -> None:
        self._args = args

    def see_residual(self, h: Tensor) -> None:
        peak = h.abs().amax(1).float()
        square = torch.linalg.vector_norm(h, dim=1, dtype=torch.float32) ** 2
        self.window_height = _height(peak, square)
        self.height = _height(peak.amax(0), square.mean(0))

    def see_write(self, y: Tensor) -> None:
        y = y.flatten(0, -2)
        square = torch.linalg.vector_norm(y, dim=0, dtype=torch.float32) ** 2
        size = _height(y.abs().amax(0).float(), square)
        chosen = size.topk(min(WATCHED_CHANNELS, len(size))).indices
        self.channels = {int(c): i for i, c in enumerate(chosen.tolist())}
        written = y[:, chosen].float()
        self.mean_write = written.abs().mean(0)
        most = min(PEAK_TOKENS, len(written))
        self.peak_tokens = written.abs().topk(most, dim=0).indices  # (token, channel)
        self.peak_write = written.abs().gather(0, self.peak_tokens).mean(0)
        sign = written.sign()
        if self.sites[0].expert is None:
            x = self._args[0].flatten(0, -2)
            self.aligned = (sign.to(x.dtype).T @ x).float() / len(x)
            peak_sign = sign.gather(0, self.peak_tokens)
            self.peaks = torch.einsum("tc,tcn->cn", peak_sign, x[self.peak_tokens].float()) / len(
                self.peak_tokens
            )
            self._args = ()
        # the experts' inner activations are out of reach of hooks; keep what the peak tokens went
        # in with
        else:
            rows = self.peak_tokens.flatten()
            self._args = tuple(
                a[rows] if isinstance(a, Tensor) and a.dim() and a.shape[0] == len(y) else a
                for a in self._flat_args()
            )
            self.signs = sign.gather(0, self.peak_tokens).flatten()

    def _flat_args(self) -> tuple[Any, ...]:
        first, *rest = self._args
        return (first.flatten(0, -2), *rest)

    def contributions(self, channel: int) -> list[Contribution]:
        """Every entry of the channel's row, strongest share first."""
        index = self.channels[channel]
        if self.sites[0].expert is None:
            weight = self.anatomy.view(self.sites[0]).read()[channel].float()
            every = list(
                self._ranked(
                    self.sites[0],
                    channel,
                    weight * self.aligned[index],
                    weight * self.peaks[index],
                    index,
                )
            )
        else:
            peak = self._expert_contributions(channel, index)  # (expert, in)
            every = [
                c
                for site in self.sites
                for c in self._ranked(site, channel, peak[site.expert], peak[site.expert], index)
            ]
        return sorted(every, key=lambda c: -abs(c.share))

    def _ranked(
        self, site: Site, channel: int, mean: Tensor, peak: Tensor, index: int
    ) -> list[Contribution]:
        mean_share = (mean / self.mean_write[index].clamp_min(1e-30)).tolist()
        peak_share = (peak / self.peak_write[index].clamp_min(1e-30)).tolist()
        magnitude = torch.maximum(mean.abs(), peak.abs()).tolist()
        return [
            Contribution(Entry(site, channel, k), mean_share[k], peak_share[k], magnitude[k])
            for k in range(len(magnitude))
        ]

    def _expert_contributions(self, channel: int, index: int) -> Tensor:
        """Signed contributions at the channel's peak tokens, (expert, in), for fused experts.

        The write is linear in mlp.down, so entry times gradient is its exact contribution, whatever
        the experts compute.
        """
        with self.anatomy.holding(self.layer):
            product = self._products(channel, index)
        packing = self.anatomy.addresses[self.sites[0]].packing
        row: Tensor = product[:, :, channel] if packing.transposed else product[:, channel]
        return row

    def _products(self, channel: int, index: int) -> Tensor:
        """Entry times gradient of the channel's write at its peak tokens, in the shape of the fused
        parameter.
        """
        name = self.anatomy.addresses[self.sites[0]].parameter.rpartition(".")[2]
        down: Tensor = getattr(self.writer, name).detach().clone().requires_grad_()
        with torch.enable_grad():
            y: Tensor = torch.func.functional_call(self.writer, {name: down}, self._args)
            mine = (
                torch.arange(self.peak_tokens.shape[0], device=y.device) * self.peak_tokens.shape[1]
                + index
            )
            total = (y[mine, channel] * self.signs[mine].to(y)).mean()
            (slope,) = torch.autograd.grad(total, down)
        product: Tensor = (slope * down.detach()).float()
        return product


def _height(peak: Tensor, square: Tensor) -> Tensor:
    """Each channel's peak over the median channel's peak, or its RMS over the median RMS, whichever
    is more; channels last.

    A spike at one token shows in the peak, a channel that stays high at every token in the RMS, and
    either can be vital.
    """
    rms = square.sqrt()
    return torch.maximum(
        *(x / x.median(-1, keepdim=True).values.clamp_min(1e-30) for x in (peak, rms))
    )
