"""Detection: one forward pass that names the channels a critical set may write, and the entries
that write them.

A critical set shows as a residual channel that rises far above the others and stays there over most
of the remaining depth. Its onset layer is the writer; the write y[t, j] = sum_k x[t, k] W[j, k]
splits into one contribution per entry. Entries are ranked by contribution, never by |w| or |x|:
rescaling a neuron changes both and the function not at all.
Source: Yu et al. 2024, arXiv:2411.07191, section 3; Sun et al. 2024, arXiv:2402.17762.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from ..anatomy import Anatomy, Entry, Site
from ..errors import BadInput, SurgeonError
from ..tap import Tap

WATCHED_CHANNELS = 8  # largest channels of each MLP's output whose contributions are kept
PEAK_TOKENS = 8


@dataclass(frozen=True)
class DetectConfig:
    """Settings of the detection pass."""

    min_height: float = field(
        default=4.0,
        metadata={
            "help": "least height of a channel: its peak, or its RMS, over the median channel's"
        },
    )
    relative_height: float = field(
        default=0.05, metadata={"help": "least height as a share of the highest channel's"}
    )
    persistence: float = field(
        default=0.6,
        metadata={"help": "share of the remaining layers in which the channel must stay high"},
    )
    layers: tuple[int, int] | None = field(
        default=None,
        metadata={
            "help": (
                "A:B, look for writers in layers A to B-1; none above is run, and persistence is"
                " judged up to B"
            )
        },
    )

    def span(self, depth: int) -> tuple[int, int]:
        """First layer and end of the search in a model of `depth` layers.

        Raises: BadInput if no such layers exist.
        """
        low, high = self.layers or (0, depth)
        if not 0 <= low < high <= depth:
            raise BadInput(
                f"--layers {low}:{high} is no range of this model's {depth} layers; the widest is"
                f" 0:{depth}."
            )
        return low, high


@dataclass(frozen=True)
class Contribution:
    """One entry and its share of what its channel receives from this layer: mean over tokens, and
    at the peak tokens.
    """

    entry: Entry
    mean_share: float
    peak_share: float
    magnitude: float  # |w x| at the peaks, in units of the residual stream

    @property
    def share(self) -> float:
        return self.mean_share if abs(self.mean_share) >= abs(self.peak_share) else self.peak_share


@dataclass(frozen=True)
class Candidate:
    """A channel that rose at `layer` and stayed: its height, by layer and at most, in how many
    windows, and the entries that write it.
    """

    channel: int
    layer: int
    height: float
    heights: list[float]
    persistence: float
    agreement: float
    contributions: tuple[Contribution, ...]

    def to_json(self, most: int = 16) -> dict[str, Any]:
        """With the `most` strongest entries."""
        return {
            "channel": self.channel,
            "layer": self.layer,
            "height": self.height,
            "heights": self.heights,
            "persistence": self.persistence,
            "agreement": self.agreement,
            "entries": [
                {"entry": str(c.entry), "share": c.share} for c in self.contributions[:most]
            ],
        }


@dataclass(frozen=True)
class Rejection:
    """A channel that was high, and why it is no candidate."""

    where: str
    reason: str
    numbers: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        return {"entry": self.where, "reason": self.reason, **self.numbers}


@dataclass(frozen=True)
class Detection:
    """What one pass saw.

    `bar` is the height a channel needed; heights are per layer, the tallest channel's.
    """

    candidates: list[Candidate]
    rejected: list[Rejection]
    bar: float
    heights: list[float]

    def to_json(self) -> dict[str, Any]:
        return {
            "candidates": [c.to_json() for c in self.candidates],
            "rejected": [r.to_json() for r in self.rejected],
            "detection": {"bar": self.bar, "heights": self.heights},
        }


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
    low, high = config.span(len(anatomy.layers))
    watches = _run(anatomy, windows, high)
    height = torch.stack([w.height for w in watches])  # (layer, d_model)
    if not bool(torch.isfinite(height).all()):
        raise SurgeonError(
            "the model's residual stream is not finite on this text (inf or NaN), so nothing can be"
            " found; try --dtype float32."
        )
    if bar is None:
        bar = max(config.min_height, config.relative_height * float(height.max()))
    candidates, rejected = [], []
    for channel in (height.amax(0) >= bar).nonzero().flatten().tolist():
        over = height[:, channel] >= bar
        onset = int(over.nonzero()[0])
        where = f"L{onset} channel {channel}"
        # the last layer often takes a super activation away again, so it is not asked to keep it
        end = high - (high == len(anatomy.layers))
        stays = (height[onset : max(onset + 1, end), channel] >= bar / 2).float().mean().item()
        top = float(height[:, channel].max())
        if onset < low:
            rejected.append(
                Rejection(
                    where,
                    "the channel rose below the layers that were to be searched",
                    {"height": top},
                )
            )
            continue
        if stays < config.persistence:
            rejected.append(
                Rejection(
                    where,
                    "the channel does not stay high over the remaining depth",
                    {"height": top, "persistence": stays},
                )
            )
            continue
        watch = watches[onset]
        if channel not in watch.channels:
            reason = (
                "the channel is high but the MLP of its onset layer does not write it (embedding or"
                " attention does)"
            )
            rejected.append(Rejection(where, reason, {"height": top}))
            continue
        contributions = watch.contributions(channel)
        agreement = float((watch.window_height[:, channel] >= bar / 2).float().mean())
        candidates.append(
            Candidate(
                channel,
                onset,
                top,
                height[:, channel].tolist(),
                stays,
                agreement,
                tuple(contributions),
            )
        )
    candidates.sort(key=lambda c: -c.height)
    return Detection(candidates, rejected, bar, height.amax(1).tolist())


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
        peak, square = (
            h.abs().amax(1).float(),
            torch.linalg.vector_norm(h, dim=1, dtype=torch.float32) ** 2,
        )
        self.window_height = _height(peak, square)
        self.height = _height(peak.amax(0), square.mean(0))

    def see_write(self, y: Tensor) -> None:
        y = y.flatten(0, -2)
        size = _height(
            y.abs().amax(0).float(), torch.linalg.vector_norm(y, dim=0, dtype=torch.float32) ** 2
        )
        chosen = size.topk(min(WATCHED_CHANNELS, len(size))).indices
        self.channels = {int(c): i for i, c in enumerate(chosen.tolist())}
        written = y[:, chosen].float()
        self.mean_write = written.abs().mean(0)
        self.peak_tokens = (
            written.abs().topk(min(PEAK_TOKENS, len(written)), dim=0).indices
        )  # (token, channel)
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
            found = list(
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
            found = [
                c
                for site in self.sites
                for c in self._ranked(site, channel, peak[site.expert], peak[site.expert], index)
            ]
        return sorted(found, key=lambda c: -abs(c.share))

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
