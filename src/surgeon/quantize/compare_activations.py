"""The table of activation quantization: the same weights and bits with each method, judged end to
end on text that none was fitted to.

The first windows are for fitting: the limits of clipping (one value for all tensors, that of least
KL to the intact model there) and the scales of SmoothQuant. All rows are judged on the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from math import inf, isfinite
from typing import Any

import torch
from torch import Tensor

from ..anatomy import Anatomy, Entry
from ..corpus import Corpus
from ..errors import BadInput
from ..measure import Reference, mean_nll
from .activations import (
    PER,
    READERS,
    ActivationConfig,
    Place,
    held_entries,
    places,
    quantized_activations,
)
from .config import QuantizeConfig
from .export import Progress
from .grid import Block, Grid
from .quantize import Quantization, prepare
from .smooth import Smoothing, smoothing

CALIBRATION_WINDOWS = 8
ROWS = (
    "naive",
    "clip z",
    "clip percentile",
    "holdout",
    "control",
    "largest",
    "smooth",
    "smooth+holdout",
    "smooth everywhere",
    "smooth everywhere+holdout",
)
VALUES = {
    "z": (3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 64.0),
    "percentile": (98.0, 99.0, 99.5, 99.8, 99.9, 99.95, 99.99),
}
NAIVE = ActivationConfig()
INT8 = QuantizeConfig(Grid(8, True, Block("channel")), "rtn")


@dataclass(frozen=True)
class ActivationRow:
    """One way to round activations. clip_value: as chosen. held: share of the rounded entries that
    were kept out. nll, kl: nats per token, None where they are not finite."""

    method: str
    per: str
    bits: int
    clip_value: float | None
    held: float
    nll: float | None
    kl: float | None
    top1_agreement: float

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass(frozen=True)
class TensorRow:
    """What one tensor suffers, alone. peak: its largest magnitude over its median one, the median
    over sequences. naive_error, held_error: squared error over the squares of the entries that a
    hold-out would round. naive_nats, held_nats: rise of the NLL."""

    label: str
    tensor: str
    channels: int
    peak: float
    naive_error: float
    held_error: float
    naive_nats: float
    held_nats: float

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass(frozen=True)
class ActivationResult:
    """The table. intact: NLL of the untouched model; weights: that of its rounded weights alone,
    None if they stay. smooth: how many norms took a division in, and how many inputs are divided as
    the model runs, for smooth and smooth everywhere."""

    config: ActivationConfig
    weights_config: QuantizeConfig | None
    alpha: float
    critical: tuple[Entry, ...]
    fitted_on: int
    judged_on: int
    intact: float
    weights: float | None
    smooth: Mapping[str, Mapping[str, int]]
    rows: tuple[ActivationRow, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            **self.config.to_json(),
            "weights": None if self.weights_config is None else self.weights_config.to_json(),
            "alpha": self.alpha,
            "critical": [str(e) for e in self.critical],
            "fitted_on": self.fitted_on,
            "judged_on": self.judged_on,
            "nll": {"intact": self.intact, "weights_only": self.weights},
            "smooth": {stem: dict(counts) for stem, counts in self.smooth.items()},
            "rows": [row.to_json() for row in self.rows],
        }


def activation_table(
    anatomy: Anatomy,
    corpus: Corpus,
    config: ActivationConfig = NAIVE,
    critical: Sequence[Entry] = (),
    weights: QuantizeConfig | None = INT8,
    alpha: float = 0.5,
    pers: Sequence[str] = PER,
    methods: Sequence[str] = ROWS,
    progress: Progress | None = None,
) -> ActivationResult:
    """Every method of rounding activations beside the others, with rounded weights, per tensor and
    per token.

    config: bits, what is rounded, and how much is held out; its method and clipping are those of
    the rows, `methods`. weights: None leaves them as they are. largest is left out where whole
    channels are held out. The model is as before afterwards, bit for bit; all rows together take up
    to five times its memory.
    Raises: BadInput for a text of one window, or an unknown row; as `places`, `prepare` and
    `smoothing`.
    """
    if unknown := [label for label in methods if label not in ROWS]:
        raise BadInput(f"{', '.join(unknown)}: no such row; use {', '.join(ROWS)}.")
    fit, judged = split(corpus.windows)
    plain = None if weights is None else prepare(anatomy, weights, critical)
    chosen = [label for label in methods if label != "largest" or config.hold]
    stems = sorted({label.partition("+")[0] for label in chosen if label.startswith("smooth")})
    smooth = {
        stem: smoothing(anatomy, fit, alpha, stem.endswith("everywhere"), config.roles)
        for stem in stems
    }
    of_smooth = {stem: _prepared(anatomy, one, weights, critical) for stem, one in smooth.items()}
    kinds: list[tuple[str, ActivationConfig]] = []
    changes: list[_Change] = []
    for per in pers:
        for label in chosen:
            stem, _, holdout = label.partition("+")
            moved, rounded = smooth.get(stem), of_smooth.get(stem, plain)
            method = holdout or ("naive" if moved or stem.startswith("clip") else stem)
            own = replace(config, per=per, method=method, clip_value=None)
            if stem.startswith("clip "):
                own = _fitted(
                    anatomy,
                    fit,
                    replace(own, method="clip", clip=stem.removeprefix("clip "), clip_value=1.0),
                    rounded,
                )
            kinds.append((label, own))
            changes.append(_Change(anatomy, own, critical, moved, rounded))
            if progress is not None:
                progress("fit", len(kinds), len(pers) * len(chosen))
    reference = Reference(anatomy.model, judged)
    found = []
    for done, change in enumerate(changes):
        found.append(reference.compare(change))
        if progress is not None:
            progress("activations", done + 1, len(changes))
    rows = [
        ActivationRow(
            label,
            own.per,
            own.bits,
            own.clip_value,
            change.share,
            _finite(far.nll),
            _finite(far.kl),
            far.top1_agreement,
        )
        for (label, own), change, far in zip(kinds, changes, found, strict=True)
    ]
    return ActivationResult(
        config,
        weights,
        alpha,
        tuple(critical),
        len(fit),
        len(judged),
        reference.compare(nullcontext).nll,
        None if plain is None else _finite(reference.compare(plain.applied).nll),
        {
            stem: {"folded_norms": len(s.folded), "divided_inputs": len(s.divisors)}
            for stem, s in smooth.items()
        },
        tuple(rows),
    )


def tensor_table(
    anatomy: Anatomy,
    corpus: Corpus,
    config: ActivationConfig = NAIVE,
    critical: Sequence[Entry] = (),
) -> list[TensorRow]:
    """Each tensor that `config` rounds, rounded alone with float weights, with and without the
    hold-out.

    What q, k and v read is one tensor, and so is what gate and up read.
    Raises: as `activation_table`.
    """
    _, judged = split(corpus.windows)
    intact = mean_nll(anatomy.model, judged)
    kept_out = replace(config, method="holdout", clip_value=None)
    together: dict[tuple[str, str], list[Place]] = {}
    for place in places(anatomy, kept_out, critical):
        stem = place.label.rpartition(".")[0]
        readers = place.tensor == "inputs" and place.label.partition(".")[2] in READERS
        together.setdefault((f"{stem} in" if readers else place.label, place.tensor), []).append(
            place
        )
    rows = []
    for (label, tensor), group in together.items():
        watched: dict[str, _Watch] = {}
        nats = []
        for method in ("naive", "holdout"):
            watched[method] = _Watch(group[0], config.hold)
            with quantized_activations(
                anatomy,
                replace(kept_out, method=method),
                critical,
                group.__contains__,
                watched[method],
            ):
                nats.append(mean_nll(anatomy.model, judged) - intact)
        errors = (watched[method].error for method in ("naive", "holdout"))
        rows.append(
            TensorRow(label, tensor, len(group[0].channels), watched["naive"].peak, *errors, *nats)
        )
    return rows


class _Watch:
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


def split(windows: Tensor) -> tuple[Tensor, Tensor]:
    """The windows (n, window) to fit on, and those to judge on.

    Raises: BadInput for a single one.
    """
    if len(windows) < 2:
        raise BadInput(
            "activations need at least two windows of text, some to fit on and some to judge; give"
            " more text."
        )
    cut = min(CALIBRATION_WINDOWS, len(windows) // 2)
    return windows[:cut], windows[cut:]


def _prepared(
    anatomy: Anatomy, smooth: Smoothing, weights: QuantizeConfig | None, critical: Sequence[Entry]
) -> Quantization | None:
    """The smoothed weights, rounded."""
    if weights is None:
        return None
    with smooth.applied():
        return prepare(anatomy, weights, critical)


def _fitted(
    anatomy: Anatomy, windows: Tensor, config: ActivationConfig, weights: Quantization | None
) -> ActivationConfig:
    """With the clipping value of least KL to the intact model on these windows."""
    candidates = [replace(config, clip_value=value) for value in VALUES[config.clip]]
    reference = Reference(anatomy.model, windows)
    far = [reference.compare(_Change(anatomy, c, (), None, weights)).kl for c in candidates]
    return min(
        zip(candidates, far, strict=True), key=lambda pair: pair[1] if isfinite(pair[1]) else inf
    )[0]


class _Change:
    """Called, a context in which the model's weights are smoothed and rounded, and its activations
    rounded. share: of the rounded entries that were held out so far."""

    def __init__(
        self,
        anatomy: Anatomy,
        config: ActivationConfig,
        critical: Sequence[Entry],
        smooth: Smoothing | None,
        weights: Quantization | None,
    ) -> None:
        self.anatomy, self.config, self.critical, self.smooth, self.weights = (
            anatomy,
            config,
            critical,
            smooth,
            weights,
        )
        self.held = self.total = 0

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with ExitStack() as stack:
            # in this order: an input is divided before it is rounded, and rounded weights take the
            # place of the smoothed ones
            if self.smooth is not None:
                stack.enter_context(self.smooth.applied())
            if self.weights is not None:
                stack.enter_context(self.weights.applied())
            stack.enter_context(
                quantized_activations(self.anatomy, self.config, self.critical, seen=self._count)
            )
            yield

    def _count(self, place: Place, before: Tensor, after: Tensor, held: Tensor) -> None:
        self.held += int(held.sum())
        self.total += held.numel()

    @property
    def share(self) -> float:
        return self.held / self.total if self.total else 0.0


def _finite(value: float) -> float | None:
    return value if isfinite(value) else None
