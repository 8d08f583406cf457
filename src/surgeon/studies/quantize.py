"""`quantize`: few bits with the critical weights held out, and what each half of that is worth."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import isfinite
from typing import Any

from torch import Tensor

from ..anatomy import Site, StreamedAnatomy
from ..errors import BadInput, SurgeonError
from ..measure import Reference, mean_nll, require_causal, task_accuracy
from ..quantize import (
    ActivationConfig,
    ActivationTable,
    Block,
    Grid,
    QuantizeConfig,
    RoundedWeights,
    Row,
    TensorTypes,
    activation_table,
    input_mean_squares,
    pareto,
    quantized_sites,
    sweep,
    table,
    tensor_types,
)
from ..quantize.grid import BLOCKS, LEAST_BITS, MOST_BITS
from ..result import Result, derived, record, result
from ..settings import nested, setting
from .holdout import FIND, HeldOut, check_critical, held_out
from .lab import Lab, TextSettings
from .naming import several
from .quantized_folder import ExportSettings, Written, source_of, written

SWEPT_BITS = (8, 4, 3)
SWEPT_BLOCKS = ("tensor", "channel", "group:128", "group:32", "flat:262144", "square:512")
DEFAULT_BLOCK = "group:128"
CALIBRATION_WINDOWS = 8
ACTIVATION_BITS = {"INT8": 8, "INT4": 4}
NO_OP = 1e-3  # nats: less than that is called next to nothing


@dataclass(frozen=True)
class ActivationSettings:
    """Whether activations are rounded, too."""

    activations: str | None = setting(
        None,
        "also the table of weights and activations rounded together, per tensor and per token:"
        " naive, the super activation held out, its control, and SmoothQuant",
        choices=tuple(ACTIVATION_BITS),
        group="Activations",
    )
    hold: int = setting(
        1,
        "entries held out of a tensor per sequence, the largest of their channels; 0: all",
        low=0,
        group="Activations",
    )
    alpha: float = setting(
        0.5,
        "how much of the spread SmoothQuant moves into the weights",
        low=0,
        high=1,
        group="Activations",
    )


@dataclass(frozen=True)
class Settings:
    """Round MODEL's projections to few bits, and hold the weights it cannot live without out of it.

    The table shows each half of that, clip-only and restore-only, beside the whole. What is fitted
    to text (a weighted search, SmoothQuant) is fitted to its first windows, and nothing is judged
    on those. Of a streamed model a checkpoint is written without a table.
    """

    bits: int | tuple[int, ...] = setting(
        (), "bits of a weight", low=LEAST_BITS, high=MOST_BITS, metavar="N", many=True
    )
    block: str | tuple[str, ...] = setting(
        (), f"{BLOCKS}; not given: {DEFAULT_BLOCK}", metavar="BLOCK", many=True
    )
    critical: Any = setting(
        FIND,
        "entry or row to hold out; `find` looks for them, `none` holds nothing out",
        metavar="ENTRY",
        many=True,
    )
    sweep: bool = setting(
        False, "the table of bits x block x method, and its Pareto front; nothing is written"
    )
    quantize: QuantizeConfig = nested(QuantizeConfig, without=("bits", "block"))
    export: ExportSettings = nested(ExportSettings)
    activations: ActivationSettings = nested(ActivationSettings)
    text: TextSettings = nested(partial(TextSettings, windows=40))
    tasks: tuple[str, ...] = setting(
        (),
        "accuracy on this lm-eval task too: a name it knows or a YAML file",
        spelled="task",
        group="Tasks",
    )
    limit: int | None = setting(None, "examples of each task; not given: all", low=1, group="Tasks")
    seed: int = setting(
        0, "seed of the controls, where critical weights are looked for", low=0, high=2**32 - 1
    )

    def __post_init__(self) -> None:
        check_critical(self.critical)
        grids = self.grids
        if self.sweep and (self.export.output is not None or self.activations.activations):
            raise BadInput(
                "‹sweep› only compares weights, and writes no checkpoint; leave ‹output› and"
                " ‹activations› out, then quantize as you chose."
            )
        if not self.sweep and (not several(self.bits) or len(grids) > 1):
            raise BadInput(
                f"quantize needs one ‹bits›, {LEAST_BITS} to {MOST_BITS}, and at most one ‹block›;"
                " several go with ‹sweep›."
            )

    @property
    def grids(self) -> list[Grid]:
        """Every grid that is judged; of a table the only one. Raises: BadInput for a block."""
        bits = several(self.bits) or SWEPT_BITS
        blocks = several(self.block) or (SWEPT_BLOCKS if self.sweep else [DEFAULT_BLOCK])
        base = self.quantize.grid
        return [replace(base, bits=n, block=Block.parse(b)) for n in bits for b in blocks]

    @property
    def fits(self) -> bool:
        """Whether something is fitted to text."""
        return self.quantize.weighted or self.activations.activations is not None

    @property
    def config(self) -> QuantizeConfig:
        """What is written, and what the table is of."""
        return replace(self.quantize, grid=self.grids[0])


@record
class Base:
    """The intact model on the windows that are judged on."""

    nll: float
    accuracy: dict[str, float]


@result("quantize")
class QuantizeResult(Result):
    """What quantization costs, in nats per token, by method; and what was written.

    calibrated_on, judged_on: how many windows; none is both. base, weights: None where the model
    was streamed, so that nothing was judged; weights: also of a sweep, which has no single choice.
    """

    calibrated_on: int
    judged_on: int
    critical: HeldOut
    base: Base | None = None
    table: list[Row] = field(default_factory=list)
    weights: RoundedWeights | None = None
    activations: ActivationTable | None = None
    export: Written | None = None
    gguf: TensorTypes | None = None

    @derived
    def pareto(self) -> list[Row]:
        """The rows that no other beats in both size and NLL."""
        return pareto(self.table)

    @derived
    def notes(self) -> list[str]:
        """What the table alone would let one overlook."""
        return list(_notes(self))

    def rows(self) -> list[dict[str, Any]]:
        """One row for each method, bits and block; damage: NLL less that of the intact model."""
        return [self._row(row) for row in self.table]

    def _row(self, row: Row) -> dict[str, Any]:
        damage = None if row.nll is None or self.base is None else row.nll - self.base.nll
        return {
            "method": row.method,
            "bits": row.bits,
            "block": row.block,
            "bits_per_weight": row.bits_per_weight,
            "nll": row.nll,
            "kl": row.kl,
            "top1_agreement": row.top1_agreement,
            "damage_nats": damage,
            **row.accuracy,
        }


def run(lab: Lab, settings: Settings) -> QuantizeResult:
    source = source_of(lab, settings.export)
    streamed = isinstance(lab.anatomy, StreamedAnatomy)
    if streamed:
        _check_streamed(settings)
    critical, named = held_out(lab, settings.critical, settings.text, settings.seed)
    settings = replace(
        settings,
        bits=tuple(several(settings.bits)),
        block=tuple(several(settings.block)),
        critical=named,
    )
    gguf = settings.export.gguf
    kept = None if gguf is None else tensor_types(lab.anatomy, critical.entries, gguf)
    if streamed:
        folder = written(lab, settings.export, source, settings.config, critical.entries, {})
        provenance = lab.provenance(settings)  # after the writing, which has hashed what it read
        return QuantizeResult(0, 0, critical, export=folder, gguf=kept, provenance=provenance)

    require_causal(lab.model)
    corpus = lab.corpus(settings.text)
    provenance = lab.provenance(settings, corpus.record())
    calibration, windows = corpus.windows[:0], corpus.windows
    if settings.fits:
        calibration, windows = split(windows, corpus.name)
    reference = Reference(lab.model, windows)
    examine = _examination(lab, settings)
    base = _base(lab, windows, examine)
    squares = _mean_squares(lab, settings, calibration)
    report = QuantizeResult(
        len(calibration), len(windows), critical, base, gguf=kept, provenance=provenance
    )
    method = settings.config
    if settings.sweep:
        rows = sweep(
            lab.anatomy,
            reference,
            method,
            settings.grids,
            critical.entries,
            squares,
            examine,
            lab.tell,
        )
        return replace(report, table=rows)
    ways = table(
        lab.anatomy, reference, method, critical.entries, squares, examine, progress=lab.tell
    )
    return replace(
        report,
        table=[way.row for way in ways],
        weights=next(way.weights for way in ways if way.row.method == method.method),
        activations=_activations(lab, settings, calibration, reference, critical),
        export=written(lab, settings.export, source, method, critical.entries, squares),
    )


def split(windows: Tensor, name: str = "the text") -> tuple[Tensor, Tensor]:
    """The windows to calibrate on, and the others, to judge on; no window is both.

    Raises: BadInput if there is but one.
    """
    if len(windows) < 2:
        raise BadInput(
            f"{name} gives one window; two are needed, to calibrate on and to judge on."
            " Give more text."
        )
    cut = min(CALIBRATION_WINDOWS, len(windows) // 2)
    return windows[:cut], windows[cut:]


# -- the parts of a run ---------------------------------------------------------------------------


def _check_streamed(settings: Settings) -> None:
    """Raises: BadInput for what takes a model in memory."""
    needs = (settings.sweep, settings.quantize.weighted, settings.activations.activations)
    if settings.export.output is None or any(needs) or settings.tasks:
        raise BadInput(
            "‹stream› does not load the model, so it only writes: give ‹output›, and leave ‹sweep›,"
            " ‹weighted›, ‹activations› and ‹tasks› out."
        )


def _examination(lab: Lab, settings: Settings) -> Callable[[], Mapping[str, float]] | None:
    if not settings.tasks:
        return None
    return partial(task_accuracy, lab.model, lab.tokenizer, settings.tasks, settings.limit)


def _base(lab: Lab, windows: Tensor, examine: Callable[[], Mapping[str, float]] | None) -> Base:
    """Raises: SurgeonError if the predictions of the intact model are not finite."""
    nll = mean_nll(lab.model, windows)
    if not isfinite(nll):
        raise SurgeonError(
            f"the NLL of the intact model is {nll} on this text: its predictions are not finite;"
            " try ‹dtype› float32."
        )
    return Base(nll, {} if examine is None else dict(examine()))


def _mean_squares(lab: Lab, settings: Settings, calibration: Tensor) -> dict[Site, Tensor]:
    if not settings.quantize.weighted:
        return {}
    sites = quantized_sites(lab.anatomy, settings.config)
    return input_mean_squares(lab.anatomy, calibration, sites, lab.tell)


def _activations(
    lab: Lab, settings: Settings, calibration: Tensor, reference: Reference, critical: HeldOut
) -> ActivationTable | None:
    """The table of activations.

    The weights' clipping is searched by their own error: where inputs are smoothed their E[x^2] is
    another.
    """
    asked = settings.activations
    if asked.activations is None:
        return None
    return activation_table(
        lab.anatomy,
        calibration,
        reference,
        ActivationConfig(ACTIVATION_BITS[asked.activations], hold=asked.hold),
        critical.entries,
        replace(settings.config, weighted=False),
        asked.alpha,
        progress=lab.tell,
    )


def _notes(report: QuantizeResult) -> Sequence[str]:
    if report.weights is None or not report.table:
        return []
    notes = []
    nll = {row.method: row.nll for row in report.table}
    rounded, restored = nll.get("rtn"), nll.get("restore")
    if not report.critical.entries:
        notes.append("No entry is held out, so restore is the same as rtn, and holdout as clip.")
    elif rounded is not None and restored is not None and abs(restored - rounded) < NO_OP:
        notes.append(
            "Putting back without clipping changes next to nothing: the entries lie on their grid"
            " already, or have their block for themselves."
        )
    finite = [(value, method) for method, value in nll.items() if value is not None]
    if finite:
        notes.append(f"The least NLL on this text is that of {min(finite)[1]}.")
    block = report.table[0].block
    whole = sum(one.blocks == 1 for one in report.weights.matrices.values())
    if whole and block != "tensor":
        notes.append(
            f"{whole} matrices are no larger than one block of {block}, so they have one scale."
        )
    return notes
