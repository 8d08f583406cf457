"""The tables: what a model loses at some bits, blocks and methods, of weights and of activations.

All is judged in one way: the NLL on some text, and KL and top-1 agreement with the intact model
there. `table` and `sweep` compare ways to round weights. `activation_table` compares ways to round
activations, all with the same rounded weights; its first windows are for the scales of SmoothQuant,
and the others are judged on. The model is as before after each of them, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any

from jaxtyping import Int64
from torch import Tensor

from ..anatomy import Anatomy, Entry, Site
from ..errors import BadInput
from ..measure import Reference
from .activations import PER, ActivationConfig, Place, quantized_activations
from .config import METHODS, Progress, QuantizeConfig
from .grid import Block, Grid
from .quantize import Quantization, QuantizeResult, prepare
from .smooth import Smoothing, smoothing

Examine = Callable[[], Mapping[str, float]]
CALIBRATION_WINDOWS = 8
SMOOTHED = ("norms", "everywhere")
NAIVE = ActivationConfig()
INT8 = QuantizeConfig(Grid(8, True, Block("channel")), "rtn")


# -- weights -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One way to quantize.

    nll, kl: nats per token, None where they are not finite. accuracy: of each task, by name.
    """

    method: str
    bits: int
    block: str
    bits_per_weight: float
    nll: float | None
    kl: float | None
    top1_agreement: float
    accuracy: Mapping[str, float]
    result: QuantizeResult | None = None

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "result"} | {
            "accuracy": dict(self.accuracy)
        }


def table(
    anatomy: Anatomy,
    windows: Tensor,
    config: QuantizeConfig,
    critical: Sequence[Entry] = (),
    mean_squares: Mapping[Site, Tensor] | None = None,
    examine: Examine | None = None,
    methods: Sequence[str] = METHODS,
) -> list[Row]:
    """The same bits and blocks with each method. Shapes: windows (n, window). examine: called on
    the model as it stands, accuracy by task.

    Raises: as `quantize_`.
    """
    judge = _Judge(anatomy, windows, examine)
    return [judge(replace(config, method=m), critical, mean_squares) for m in methods]


def sweep(
    anatomy: Anatomy,
    windows: Tensor,
    config: QuantizeConfig,
    bits: Sequence[int],
    blocks: Sequence[Block],
    critical: Sequence[Entry] = (),
    mean_squares: Mapping[Site, Tensor] | None = None,
    examine: Examine | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """Bits x block x method. Raises: as `quantize_`."""
    judge = _Judge(anatomy, windows, examine)
    grids = [
        Grid(n, config.grid.symmetric, block, config.grid.pad) for n in bits for block in blocks
    ]
    rows: list[Row] = []
    for done, grid in enumerate(grids):
        for method in METHODS:
            rows.append(judge(replace(config, grid=grid, method=method), critical, mean_squares))
        if progress is not None:
            progress("sweep", done + 1, len(grids))
    return rows


def pareto(rows: Iterable[Row]) -> list[Row]:
    """Those rows that no other beats: none has as few bits per weight and a lower NLL.

    From few bits to many.
    """
    front: list[Row] = []
    for row in sorted(
        (r for r in rows if r.nll is not None), key=lambda r: (r.bits_per_weight, r.nll or 0.0)
    ):
        if not front or (row.nll or 0.0) < (front[-1].nll or 0.0):
            front.append(row)
    return front


class _Judge:
    """Judges ways to quantize one model on one text, and on tasks. Shapes: windows (n, window)."""

    def __init__(self, anatomy: Anatomy, windows: Tensor, examine: Examine | None) -> None:
        self.anatomy, self.examine = anatomy, examine
        self.reference = Reference(anatomy.model, windows)

    def __call__(
        self,
        config: QuantizeConfig,
        critical: Sequence[Entry],
        mean_squares: Mapping[Site, Tensor] | None,
    ) -> Row:
        ready = prepare(self.anatomy, config, critical, mean_squares)
        measured = self.reference.compare(ready.applied)
        accuracy: Mapping[str, float] = {}
        if self.examine is not None:
            with ready.applied():
                accuracy = self.examine()
        return Row(
            config.method,
            config.grid.bits,
            str(config.grid.block),
            ready.result.bits_per_weight,
            _finite(measured.nll),
            _finite(measured.kl),
            measured.top1_agreement,
            accuracy,
            ready.result,
        )


# -- activations -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Treatment:
    """One way to round activations.

    smooth: which inputs SmoothQuant evens out before: those that "norms" make, as published, those
    "everywhere", or None.
    """

    config: ActivationConfig
    smooth: str | None = None

    def __post_init__(self) -> None:
        if self.smooth not in (None, *SMOOTHED):
            raise BadInput(f"smooth {self.smooth} is not known; use {' or '.join(SMOOTHED)}.")


@dataclass(frozen=True)
class ActivationRow:
    """What one treatment costs. held: share of the rounded entries that were kept out. nll, kl:
    nats per token, None where they are not finite.
    """

    treatment: Treatment
    held: float
    nll: float | None
    kl: float | None
    top1_agreement: float

    def to_json(self) -> dict[str, Any]:
        config = self.treatment.config
        clips = config.method == "clip"
        return {
            "per": config.per,
            "method": config.method,
            "clip": config.clip if clips else None,
            "clip_value": config.clip_value if clips else None,
            "smooth": self.treatment.smooth,
            "bits": config.bits,
            "held": self.held,
            "nll": self.nll,
            "kl": self.kl,
            "top1_agreement": self.top1_agreement,
        }


@dataclass(frozen=True)
class ActivationResult:
    """The table. intact: NLL of the untouched model; weights: that of its rounded weights alone,
    None if they stay. smooth: how many norms took a division in, and how many inputs are divided as
    the model runs, for each kind of smoothing.
    """

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
            "smooth": {kind: dict(counts) for kind, counts in self.smooth.items()},
            "rows": [row.to_json() for row in self.rows],
        }


def treatments(config: ActivationConfig) -> list[Treatment]:
    """Per tensor and per token: naive, held out, the hold-out's control, and SmoothQuant without
    and with the hold-out.
    """
    ways = [
        ("naive", None),
        ("holdout", None),
        ("control", None),
        ("naive", "norms"),
        ("holdout", "norms"),
    ]
    return [
        Treatment(replace(config, per=per, method=method), smooth)
        for per in PER
        for method, smooth in ways
    ]


def activation_table(
    anatomy: Anatomy,
    windows: Int64[Tensor, "n window"],
    config: ActivationConfig = NAIVE,
    critical: Sequence[Entry] = (),
    weights: QuantizeConfig | None = INT8,
    alpha: float = 0.5,
    ways: Sequence[Treatment] | None = None,
    progress: Progress | None = None,
) -> ActivationResult:
    """Ways of rounding activations beside one another, all with the same rounded weights.

    config: bits, what is rounded, and how much is held out. weights: None leaves them as they are.
    alpha: of SmoothQuant. ways: default, the `treatments` of `config`.
    Raises: BadInput for a single window; as `places`, `prepare` and `smoothing`.
    """
    fit, judged = split(windows)
    ways = treatments(config) if ways is None else ways
    plain = None if weights is None else prepare(anatomy, weights, critical)
    kinds = [kind for kind in SMOOTHED if any(way.smooth == kind for way in ways)]
    smooth = {
        kind: smoothing(anatomy, fit, alpha, kind == "everywhere", config.roles) for kind in kinds
    }
    rounded = {kind: _prepared(anatomy, smooth[kind], weights, critical) for kind in kinds}
    reference = Reference(anatomy.model, judged)
    rows = []
    for done, way in enumerate(ways):
        if way.smooth is None:
            change = _Change(anatomy, way.config, critical, None, plain)
        else:
            change = _Change(anatomy, way.config, critical, smooth[way.smooth], rounded[way.smooth])
        measured = reference.compare(change)
        nll, kl = _finite(measured.nll), _finite(measured.kl)
        rows.append(ActivationRow(way, change.share, nll, kl, measured.top1_agreement))
        if progress is not None:
            progress("activations", done + 1, len(ways))
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
            kind: {"folded_norms": len(s.folded), "divided_inputs": len(s.divisors)}
            for kind, s in smooth.items()
        },
        tuple(rows),
    )


def split(windows: Int64[Tensor, "n window"]) -> tuple[Tensor, Tensor]:
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


class _Change:
    """Called, a context in which the model's weights are smoothed and rounded, and its activations
    rounded. share: of the rounded entries that were held out so far.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        config: ActivationConfig,
        critical: Sequence[Entry],
        smooth: Smoothing | None,
        weights: Quantization | None,
    ) -> None:
        self.anatomy, self.config, self.critical = anatomy, config, critical
        # in this order: an input is divided before it is rounded, and rounded weights take the
        # place of the smoothed ones
        self.before: list[Callable[[], AbstractContextManager[None]]] = []
        self.before += [] if smooth is None else [smooth.applied]
        self.before += [] if weights is None else [weights.applied]
        self.held = self.total = 0

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with ExitStack() as stack:
            for change in self.before:
                stack.enter_context(change())
            rounding = quantized_activations(
                self.anatomy, self.config, self.critical, watch=self._count
            )
            stack.enter_context(rounding)
            yield

    def _count(self, place: Place, before: Tensor, after: Tensor, held: Tensor) -> None:
        self.held += int(held.sum())
        self.total += held.numel()

    @property
    def share(self) -> float:
        return self.held / self.total if self.total else 0.0


def _finite(value: float) -> float | None:
    return value if isfinite(value) else None
