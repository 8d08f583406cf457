"""`quantize`: few bits with the critical weights held out, and what each half of that is worth."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

from torch import Tensor

from ..anatomy import Entry, Site, StreamedAnatomy
from ..anatomy.load import locate
from ..errors import BadInput, SurgeonError
from ..files import check_new_folder, unfinished
from ..find import FindResult
from ..find.verify import entries_of
from ..measure import mean_nll, require_causal, task_accuracy
from ..quantize import (
    EXPORTS,
    ActivationConfig,
    ActivationTable,
    Block,
    ExportPlan,
    Grid,
    MatrixReport,
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
from ..quantize.formats import KEEP, TYPES
from ..quantize.grid import BLOCKS, LEAST_BITS, MOST_BITS
from ..result import Result, derived, record, result
from ..settings import nested, setting
from .lab import Lab, TextSettings
from .naming import regions_of, several, vital_sets

SWEPT_BITS = (8, 4, 3)
SWEPT_BLOCKS = ("tensor", "channel", "group:128", "group:32", "flat:262144", "square:512")
DEFAULT_BLOCK = "group:128"
CALIBRATION_WINDOWS = 8
FIND, NONE = "find", "none"
ACTIVATION_BITS = {"INT8": 8, "INT4": 4}
NO_OP = 1e-3  # nats: less than that is called next to nothing


@dataclass(frozen=True)
class ExportSettings:
    """What is written, and how."""

    output: str | None = setting(
        None,
        "new folder for the quantized checkpoint; without it only the table is made",
        short="-o",
        metavar="DIR",
    )
    export: str = setting("dense", "format that is written", choices=sorted(EXPORTS))
    keep: str = setting(
        "8bit",
        "how compressed-tensors and torchao keep the matrices with critical entries: they have no"
        " room for single ones",
        choices=KEEP,
        group="Export",
    )
    gguf: str | None = setting(
        None,
        "show the --tensor-type flags with which llama-quantize keeps those matrices so",
        choices=TYPES,
        group="Export",
    )


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
    on those. Of a streamed model
    a checkpoint is written without a table.
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
        named = several(self.critical)
        if len(named) > 1 and any(one in (FIND, NONE) for one in named if isinstance(one, str)):
            raise BadInput(
                "‹critical› find and ‹critical› none stand alone; name entries, or one of the two."
            )
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
        if self.export.output is not None:
            check_new_folder(Path(self.export.output))

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


@record
class HeldOut:
    """The critical entries, and where they come from."""

    entries: list[Entry]
    source: str


@record
class Written:
    """A checkpoint that was written.

    matrices: what was done to each, which its format may not allow to be what the table is of; None
    where a matrix is as it was.
    """

    kind: str
    folder: str
    bytes: int
    matrices: dict[Site, MatrixReport | None]


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
    source = _source(lab, settings)
    streamed = isinstance(lab.anatomy, StreamedAnatomy)
    if streamed:
        _check_streamed(settings)
    critical, named = _critical(lab, settings)
    settings = replace(
        settings,
        bits=tuple(several(settings.bits)),
        block=tuple(several(settings.block)),
        critical=named,
    )
    gguf = settings.export.gguf
    kept = None if gguf is None else tensor_types(lab.anatomy, critical.entries, gguf)
    if streamed:
        provenance = lab.provenance(settings)
        written = _write(lab, settings, source, critical, {})
        return QuantizeResult(0, 0, critical, export=written, gguf=kept, provenance=provenance)

    require_causal(lab.model)
    corpus = lab.corpus(settings.text)
    provenance = lab.provenance(settings, corpus.record())
    judged = corpus.windows
    calibration = judged[:0]
    if settings.fits:
        calibration, judged = split(judged, corpus.name)
    examine = _examination(lab, settings)
    base = _base(lab, judged, examine)
    squares = _mean_squares(lab, settings, calibration)
    report = QuantizeResult(
        len(calibration), len(judged), critical, base, gguf=kept, provenance=provenance
    )
    method = settings.config
    if settings.sweep:
        rows = sweep(
            lab.anatomy,
            judged,
            method,
            settings.grids,
            critical.entries,
            squares,
            examine,
            lab.tell,
        )
        return replace(report, table=rows)
    ways = table(lab.anatomy, judged, method, critical.entries, squares, examine, progress=lab.tell)
    return replace(
        report,
        table=[way.row for way in ways],
        weights=next(way.weights for way in ways if way.row.method == method.method),
        activations=_activations(lab, settings, calibration, judged, critical),
        export=_write(lab, settings, source, critical, squares),
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


def _source(lab: Lab, settings: Settings) -> Path:
    """The folder that is quantized, where one is to be written. Raises: BadInput."""
    if settings.export.output is None:
        return lab.loaded.folder
    if lab.opened_by is None:
        raise BadInput(
            "a checkpoint is written from the files of a model, and one that was made of a module"
            " has none; save it, and open its folder."
        )
    source = locate(lab.opened_by)
    check_new_folder(Path(settings.export.output), source)
    return source


def _check_streamed(settings: Settings) -> None:
    """Raises: BadInput for what takes a model in memory."""
    needs = (settings.sweep, settings.quantize.weighted, settings.activations.activations)
    if settings.export.output is None or any(needs) or settings.tasks:
        raise BadInput(
            "‹stream› does not load the model, so it only writes: give ‹output›, and leave ‹sweep›,"
            " ‹weighted›, ‹activations› and ‹tasks› out."
        )


def _critical(lab: Lab, settings: Settings) -> tuple[HeldOut, list[str]]:
    """The entries to hold out, and what a record of the settings names them by."""
    named = several(settings.critical) or [FIND]
    if list(named) == [NONE]:
        return HeldOut([], "none asked for"), [NONE]
    if list(named) == [FIND]:
        finding = vital_sets(lab, settings.text, settings.seed)
        entries = [one.entry for each in finding.sets if each.vital for one in each.entries]
        return HeldOut(entries, f"find: {finding.verdict}"), [FIND]
    # of a finding every vital set counts, not only the first
    sets = [one.sets if isinstance(one, FindResult) else [one] for one in named]
    parts = regions_of(
        lab, [one for each in sets for one in each], settings.text, settings.seed, "critical"
    )
    entries = [entry for part in parts for entry in entries_of(lab.anatomy, part)]
    return HeldOut(entries, "named"), [str(part) for part in parts]


def _examination(lab: Lab, settings: Settings) -> Callable[[], Mapping[str, float]] | None:
    if not settings.tasks:
        return None
    return partial(task_accuracy, lab.model, lab.tokenizer, settings.tasks, settings.limit)


def _base(lab: Lab, judged: Tensor, examine: Callable[[], Mapping[str, float]] | None) -> Base:
    """Raises: SurgeonError if the predictions of the intact model are not finite."""
    nll = mean_nll(lab.model, judged)
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
    lab: Lab, settings: Settings, calibration: Tensor, judged: Tensor, critical: HeldOut
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
        judged,
        ActivationConfig(ACTIVATION_BITS[asked.activations], hold=asked.hold),
        critical.entries,
        replace(settings.config, weighted=False),
        asked.alpha,
        progress=lab.tell,
    )


def _write(
    lab: Lab,
    settings: Settings,
    source: Path,
    critical: HeldOut,
    squares: Mapping[Site, Tensor],
) -> Written | None:
    asked = settings.export
    if asked.output is None:
        return None
    target = Path(asked.output)
    plan = ExportPlan(
        source, target, settings.config, tuple(critical.entries), squares, lab.tell, asked.keep
    )
    try:
        matrices = EXPORTS[asked.export](plan)
    except KeyboardInterrupt:
        # unlike other work, this goes on where it was stopped, which must be said
        raise KeyboardInterrupt(
            f"finished shards stay in {unfinished(target)}, and the same command goes on from them."
        ) from None
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    return Written(asked.export, str(target), size, matrices)


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
