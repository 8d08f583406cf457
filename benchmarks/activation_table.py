"""What the tables of activation quantization are made of: every treatment of outliers, and each
tensor by itself.

The limits of clipping are fitted on the first windows, one value for all tensors, that of least KL
to the intact model there; SmoothQuant takes its scales from the same windows. All else is judged on
the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf

import torch
from torch import Tensor

from surgeon.anatomy import Anatomy, Entry
from surgeon.measure import Reference, mean_nll
from surgeon.quantize import (
    ActivationConfig,
    ActivationRow,
    QuantizeConfig,
    Treatment,
    activation_table,
)
from surgeon.quantize.activations import PER, Place, held_entries, places, quantized_activations
from surgeon.quantize.compare import INT8
from surgeon.studies.quantize import split

VALUES = {
    "z": (3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 64.0),
    "percentile": (98.0, 99.0, 99.5, 99.8, 99.9, 99.95, 99.99),
}


@dataclass(frozen=True)
class Method:
    """A treatment of outliers. clip: how its limits are set; smooth: as in `Treatment`."""

    name: str
    method: str
    clip: str | None = None
    smooth: str | None = None


METHODS = (
    Method("naive", "naive"),
    Method("clip z", "clip", clip="z"),
    Method("clip percentile", "clip", clip="percentile"),
    Method("holdout", "holdout"),
    Method("control", "control"),
    Method("largest", "largest"),
    Method("smooth", "naive", smooth="norms"),
    Method("smooth, holdout", "holdout", smooth="norms"),
    Method("smooth everywhere", "naive", smooth="everywhere"),
    Method("smooth everywhere, holdout", "holdout", smooth="everywhere"),
)


def treatments(
    anatomy: Anatomy,
    windows: Tensor,
    config: ActivationConfig,
    methods: Sequence[Method] = METHODS,
    weights: QuantizeConfig | None = INT8,
    pers: Sequence[str] = PER,
) -> list[Treatment]:
    """The methods per tensor and per token, with fitted limits of clipping."""
    ways = []
    for per in pers:
        for method in methods:
            own = replace(config, per=per, method="naive", clip_value=None)
            if method.clip is not None:
                own = fitted(anatomy, windows, replace(own, clip=method.clip), weights)
            elif method.method != "naive":
                own = replace(own, method=method.method)
            ways.append(Treatment(own, method.smooth))
    return ways


def fitted(
    anatomy: Anatomy, windows: Tensor, config: ActivationConfig, weights: QuantizeConfig | None
) -> ActivationConfig:
    """With the clipping value of least KL to the intact model, on the windows to fit on."""
    fit, _ = split(windows)
    values = VALUES[config.clip]
    ways = [Treatment(replace(config, method="clip", clip_value=value)) for value in values]
    reference = Reference(anatomy.model, fit)
    rows = activation_table(anatomy, fit, reference, config, weights=weights, ways=ways).rows
    _, best = min(zip(rows, ways, strict=True), key=lambda pair: _kl(pair[0]))
    return best.config


def _kl(row: ActivationRow) -> float:
    return inf if row.kl is None else row.kl


@dataclass(frozen=True)
class TensorRow:
    """What one tensor suffers, alone. after_norm: all that reads the residual stream there. peak:
    its largest magnitude over its median one, the median over sequences. naive_error, held_error:
    squared error over the squares of the entries that a hold-out would round. naive_nats,
    held_nats: rise of the NLL."""

    place: Place
    peak: float
    naive_error: float
    held_error: float
    naive_nats: float
    held_nats: float

    @property
    def label(self) -> str:
        if self.place.after_norm and self.place.site is not None:
            return f"into L{self.place.layer}.{self.place.site.role.partition('.')[0]}"
        return {"inputs": "into ", "down": "out of ", "residual": ""}[
            self.place.tensor
        ] + self.place.label


def tensor_table(
    anatomy: Anatomy,
    windows: Tensor,
    config: ActivationConfig,
    critical: Sequence[Entry] = (),
) -> list[TensorRow]:
    """Each tensor that `config` rounds, rounded alone with float weights, with and without the
    hold-out.

    What q, k and v read is one tensor, and so is what gate and up read.
    """
    _, judged = split(windows)
    intact = mean_nll(anatomy.model, judged)
    kept_out = replace(config, method="holdout", clip_value=None)
    together: dict[object, list[Place]] = {}
    for place in places(anatomy, kept_out, critical):
        block = place.site.role.partition(".")[0] if place.after_norm and place.site else place
        together.setdefault((place.layer, block), []).append(place)
    rows = []
    for group in together.values():
        watched = {method: Watch(group[0], config.hold) for method in ("naive", "holdout")}
        nats = []
        for method, watch in watched.items():
            with quantized_activations(
                anatomy, replace(kept_out, method=method), critical, group.__contains__, watch
            ):
                nats.append(mean_nll(anatomy.model, judged) - intact)
        errors = [watch.error for watch in watched.values()]
        rows.append(TensorRow(group[0], watched["naive"].peak, *errors, *nats))
    return rows


class Watch:
    """Sums over what one place rounded: the error of the entries that a hold-out would round, and
    how far the largest stands out.
    """

    def __init__(self, place: Place, hold: int) -> None:
        self.place, self.hold = place, hold
        self.off = self.size = 0.0
        self.peaks: list[Tensor] = []

    def __call__(self, place: Place, before: Tensor, after: Tensor, held: Tensor) -> None:
        if place != self.place:
            return
        ordinary = ~held_entries(before, place.channels, self.hold)
        self.off += float(((after - before) * ordinary).double().square().sum())
        self.size += float((before * ordinary).double().square().sum())
        sizes = before.abs().float().flatten(1)
        self.peaks.append(sizes.amax(1) / sizes.median(1).values)

    @property
    def error(self) -> float:
        return self.off / self.size if self.size > 0 else 0.0

    @property
    def peak(self) -> float:
        return float(torch.cat(self.peaks).median())
