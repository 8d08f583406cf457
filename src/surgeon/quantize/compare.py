"""The tables: what a model loses at some bits, blocks and methods, of weights and of activations.

All is judged in one way: the NLL on some text, and KL and top-1 agreement with the intact model
there. `table` and `sweep` compare ways to round weights. `activation_table` compares ways to round
activations, all with the same rounded weights. What is fitted to text, which is the mean squares of
a weighted search and the scales of SmoothQuant, is fitted to other windows than those that are
judged on; the caller gives both, the latter as a `Reference`, which keeps what the intact model
predicts there. The model is as before after each of them, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from math import isfinite

from jaxtyping import Int64
from torch import Tensor

from ..anatomy import Anatomy, Entry, Site
from ..errors import BadInput
from ..measure import Reference
from ..progress import Tell, silent
from ..result import record
from .activations import PER, ActivationConfig, Place, quantized_activations
from .config import METHODS, QuantizeConfig
from .grid import Block, Grid
from .quantize import Quantization, RoundedWeights, prepare
from .smooth import Smoothing, smoothing

Examine = Callable[[], Mapping[str, float]]
SMOOTHED = ("norms", "everywhere")
NAIVE = ActivationConfig()
INT8 = QuantizeConfig(Grid(8, True, Block("channel")), "rtn")


# -- weights -----------------------------------------------------------------------------------


@record
class Row:
    """What one way to quantize costs.

    nll, kl: nats per token, None where they are not finite. accuracy: of each task, by name.
    """

    method: str
    bits: int
    block: str
    bits_per_weight: float
    nll: float | None
    kl: float | None
    top1_agreement: float
    accuracy: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Judged:
    """One way to quantize: what it costs, and what it did to each matrix."""

    row: Row
    weights: RoundedWeights


def table(
    anatomy: Anatomy,
    reference: Reference,
    config: QuantizeConfig,
    critical: Sequence[Entry] = (),
    mean_squares: Mapping[Site, Tensor] | None = None,
    examine: Examine | None = None,
    methods: Sequence[str] = METHODS,
    progress: Tell = silent,
) -> list[Judged]:
    """The same bits and blocks with each method, held against one reference.

    examine: called on the model as it stands, accuracy by task. Raises: as `quantize_`.
    """
    configs = [replace(config, method=method) for method in methods]
    return list(_judge(anatomy, reference, configs, critical, mean_squares, examine, progress))


def sweep(
    anatomy: Anatomy,
    reference: Reference,
    config: QuantizeConfig,
    grids: Sequence[Grid],
    critical: Sequence[Entry] = (),
    mean_squares: Mapping[Site, Tensor] | None = None,
    examine: Examine | None = None,
    progress: Tell = silent,
) -> list[Row]:
    """Each of the grids with each method. Raises: as `quantize_`."""
    configs = [replace(config, grid=grid, method=m) for grid in grids for m in METHODS]
    judged = _judge(anatomy, reference, configs, critical, mean_squares, examine, progress)
    return [one.row for one in judged]


def pareto(rows: Iterable[Row]) -> list[Row]:
    """Those rows that no other beats: none has as few bits per weight and a lower NLL.

    From few bits to many.
    """
    # from few bits to many a row is on the front if it is better than all before it
    known = [(row.bits_per_weight, row.nll, row) for row in rows if row.nll is not None]
    front: list[Row] = []
    least = float("inf")
    for _, nll, row in sorted(known, key=lambda one: one[:2]):
        if nll < least:
            front.append(row)
            least = nll
    return front


def _judge(
    anatomy: Anatomy,
    reference: Reference,
    configs: Sequence[QuantizeConfig],
    critical: Sequence[Entry],
    mean_squares: Mapping[Site, Tensor] | None,
    examine: Examine | None,
    progress: Tell,
) -> Iterator[Judged]:
    """Each of the ways to quantize, held against one reference."""
    # one at a time, so that no more than one rounded copy of the model is in memory
    for done, config in enumerate(configs):
        ready = prepare(anatomy, config, critical, mean_squares)
        measured = reference.compare(ready.applied)
        accuracy: Mapping[str, float] = {}
        if examine is not None:
            with ready.applied():
                accuracy = examine()
        row = Row(
            config.method,
            config.grid.bits,
            str(config.grid.block),
            ready.result.bits_per_weight,
            _finite(measured.nll),
            _finite(measured.kl),
            measured.top1_agreement,
            dict(accuracy),
        )
        progress("methods", done + 1, len(configs))
        yield Judged(row, ready.result)


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


@record
class ActivationRow:
    """What one treatment costs.

    clip, clip_value: where it clips. smooth: as in `Treatment`. held: share of the rounded entries
    that were kept out. nll, kl: nats per token, None where they are not finite.
    """

    per: str
    method: str
    bits: int
    clip: str | None
    clip_value: float | None
    smooth: str | None
    held: float
    nll: float | None
    kl: float | None
    top1_agreement: float


@record
class ActivationNLL:
    """NLL without rounded activations: of the untouched model, and of its rounded weights alone.

    The latter is None if the weights stay as they are, or if it is not finite.
    """

    intact: float
    weights_only: float | None


@record
class SmoothedCount:
    """How many norms took a division in, and how many inputs are divided as the model runs."""

    folded_norms: int
    divided_inputs: int


@record
class ActivationTable:
    """Ways of rounding activations beside one another, all with the same rounded weights.

    fitted_on, judged_on: windows. smooth: for each kind of smoothing that was used.
    """

    config: ActivationConfig
    weights: QuantizeConfig | None
    alpha: float
    critical: list[Entry]
    fitted_on: int
    judged_on: int
    nll: ActivationNLL
    smooth: dict[str, SmoothedCount]
    rows: list[ActivationRow]


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
    fit: Int64[Tensor, "n window"],
    reference: Reference,
    config: ActivationConfig = NAIVE,
    critical: Sequence[Entry] = (),
    weights: QuantizeConfig | None = INT8,
    alpha: float = 0.5,
    ways: Sequence[Treatment] | None = None,
    progress: Tell = silent,
) -> ActivationTable:
    """Ways of rounding activations beside one another, all with the same rounded weights.

    fit: the windows that SmoothQuant takes its scales from. config: bits, what is rounded, and how
    much is held out. weights: None leaves them as they are. alpha: of SmoothQuant. ways: default,
    the `treatments` of `config`.
    Raises: as `places`, `prepare` and `smoothing`.
    """
    ways = treatments(config) if ways is None else ways
    # rounded once for all ways that have the same weights, since only the activations differ
    plain = None if weights is None else prepare(anatomy, weights, critical)
    kinds = [kind for kind in SMOOTHED if any(way.smooth == kind for way in ways)]
    smooth = {
        kind: smoothing(anatomy, fit, alpha, kind == "everywhere", config.roles) for kind in kinds
    }
    rounded = {kind: _prepared(anatomy, smooth[kind], weights, critical) for kind in kinds}
    rows = []
    for done, way in enumerate(ways):
        if way.smooth is None:
            change = _Change(anatomy, way.config, critical, None, plain)
        else:
            change = _Change(anatomy, way.config, critical, smooth[way.smooth], rounded[way.smooth])
        measured = reference.compare(change)
        clips = way.config.method == "clip"
        row = ActivationRow(
            way.config.per,
            way.config.method,
            way.config.bits,
            way.config.clip if clips else None,
            way.config.clip_value if clips else None,
            way.smooth,
            change.share,
            _finite(measured.nll),
            _finite(measured.kl),
            measured.top1_agreement,
        )
        rows.append(row)
        progress("activations", done + 1, len(ways))
    alone = None if plain is None else _finite(reference.compare(plain.applied).nll)
    return ActivationTable(
        config,
        weights,
        alpha,
        list(critical),
        len(fit),
        len(reference.windows),
        ActivationNLL(reference.compare(nullcontext).nll, alone),
        {k: SmoothedCount(len(one.folded), len(one.divisors)) for k, one in smooth.items()},
        rows,
    )


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
