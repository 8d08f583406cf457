"""Sections on quantization: the four methods beside one another, a sweep with its Pareto front,
and activations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ...quantize import ActivationTable, RoundedWeights
from ...quantize import Row as Judged
from ...studies.quantize import Base, QuantizeResult
from ...studies.quantized_folder import Written
from .charts import Row, scatter
from .picture import Cell, Claim, Headline, Picture, Table, many, model_name, nats

COLOURS = {"rtn": "broken", "clip": "base", "restore": "broken", "holdout": "patched"}
SERIES = {"rtn": "rounded", "clip": "clipped", "restore": "rounded", "holdout": "hold-out"}
LISTED = 12
COLUMNS = (
    "bits",
    "block",
    "method",
    "bits per weight",
    "NLL",
    "more than intact",
    "KL to intact",
    "top-1 agreement",
)


def quantize_headline(result: QuantizeResult) -> Headline:
    """What the hold-out costs, beside clip-only and restore-only."""
    model = model_name(result.provenance.model)
    if result.base is None or not result.table:
        return Headline(f"{model}, quantized")
    if result.weights is None:
        return Headline(f"What few bits cost {model}, by bits, blocks and method")
    bits = result.table[0].bits
    damage = {row["method"]: row["damage_nats"] for row in result.rows()}
    claims = []
    if damage.get("holdout") is not None:
        beside = [
            f"{name}: {nats(damage[method])}"
            for name, method in (("clip-only", "clip"), ("restore-only", "restore"))
            if damage.get(method) is not None
        ]
        what = f"per token lost at {bits} bits with the critical weights held out"
        claims = [Claim("patched", f"{nats(damage['holdout'])} nats", what, "; ".join(beside))]
    return Headline(f"{model} at {bits} bits", claims)


def quantize_pictures(result: QuantizeResult) -> Iterator[Picture]:
    """The table of methods, or the sweep; then each matrix, activations, and what was written."""
    if result.base is not None and result.weights is None:
        yield _swept(result, result.base)
    elif result.base is not None:
        yield _methods(result, result.base)
    if result.weights is not None:
        yield _matrices(result.weights)
    if result.activations is not None:
        yield _activations(result.activations)
    if result.export is not None:
        yield _written(result.export)


def _swept(result: QuantizeResult, base: Base) -> Picture:
    front = result.pareto
    finite = [row for row in result.table if row.nll is not None]
    return Picture(
        "Quantized: size and damage",
        f"{len(front)} of {len(result.table)} ways to quantize are beaten by no other in both size"
        " and NLL",
        _about(result, base),
        chart=scatter(
            [_point(row, row in front) for row in finite],
            {SERIES[row.method]: COLOURS[row.method] for row in finite},
            "bits per weight",
            "NLL, nats per token",
            base.nll,
        ),
        table=_table(result, base),
    )


def _methods(result: QuantizeResult, base: Base) -> Picture:
    finite = [(row.nll, row.method) for row in result.table if row.nll is not None]
    said = "no method gives finite predictions"
    if finite:
        least, method = min(finite)
        said = f"least damage by {method}, {nats(least - base.nll)} nats"
    first = result.table[0]
    return Picture(
        "Quantized, four ways",
        f"At {first.bits} bits and {first.block}: {said}",
        _about(result, base),
        shown=_table(result, base),
    )


def _table(result: QuantizeResult, base: Base) -> Table:
    tasks = list(base.accuracy)
    return Table((*COLUMNS, *tasks), [_cells(row, base.nll, tasks) for row in result.table])


def _cells(row: Judged, base: float, tasks: Sequence[str]) -> list[Cell]:
    return [
        row.bits,
        row.block,
        row.method,
        row.bits_per_weight,
        row.nll,
        None if row.nll is None else nats(row.nll - base),
        row.kl,
        row.top1_agreement,
        *(row.accuracy[task] for task in tasks),
    ]


def _about(result: QuantizeResult, base: Base) -> str:
    calibrated = ""
    if result.calibrated_on:
        calibrated = f" after the {many(result.calibrated_on, 'window')} that are calibrated on"
    critical = many(len(result.critical.entries), "critical entry")
    return (
        f"NLL and KL in nats per token, on {many(result.judged_on, 'window')}{calibrated}; the"
        f" intact model has {base.nll:.4f}. {critical} ({result.critical.source}). rtn: rounded to"
        " nearest; clip: clipped, then rounded; restore: rounded, then the critical entries put"
        " back; holdout: clipped, rounded and put back, to be compared with clip-only and"
        " restore-only. Bits per weight count scales, offsets and what is put back. "
        + " ".join(result.notes)
    ).strip()


def _point(row: Judged, on_front: bool) -> Row:
    return {
        "x": row.bits_per_weight,
        "y": row.nll,
        "series": SERIES[row.method],
        "front": on_front,
    }


def _matrices(weights: RoundedWeights) -> Picture:
    worst = sorted(weights.matrices.items(), key=lambda item: -item[1].error)
    rows = [
        (str(site), one.blocks, one.clip, one.clipped, one.held, one.error) for site, one in worst
    ]
    site, report = worst[0]
    return Picture(
        "Matrix by matrix",
        f"{site} has the largest error, {report.error:.3g} of its squared norm",
        f"The method that was chosen: {weights.config.method}. Clipped at: the z-score, percentage"
        " or share of the range that was used. Error: squared, as a share of that of the weights,"
        " without the critical entries.",
        shown=Table(
            ("matrix", "blocks", "clipped at", "clipped", "held out", "error"),
            rows[:LISTED],
            len(rows),
        ),
    )


def _activations(result: ActivationTable) -> Picture:
    finite = [(row.nll, row) for row in result.rows if row.nll is not None]
    said = "no treatment gives finite predictions"
    if finite:
        least, row = min(finite, key=lambda one: one[0])
        smooth = "" if row.smooth is None else ", smoothed"
        more = nats(least - result.nll.intact)
        said = f"least damage by {row.method}{smooth}, one scale per {row.per}, {more} nats"
    return Picture(
        "Activations rounded, too",
        f"With activations of {result.config.bits} bits {said}",
        f"On {many(result.judged_on, 'window')}; SmoothQuant is fitted to the"
        f" {result.fitted_on} before them. The intact model has NLL {result.nll.intact:.4f} there."
        " naive: rounded; holdout: the super activation kept out; control: as many entries of"
        " other channels kept out; smoothed: by SmoothQuant before.",
        shown=Table(
            (
                "one scale per",
                "method",
                "smoothed",
                "held out, share",
                "NLL",
                "KL to intact",
                "top-1 agreement",
            ),
            [
                (r.per, r.method, r.smooth or "", r.held, r.nll, r.kl, r.top1_agreement)
                for r in result.rows
            ],
        ),
    )


def _written(written: Written) -> Picture:
    kept = sum(report is None for report in written.matrices.values())
    rounded = len(written.matrices) - kept
    return Picture(
        "Written",
        f"{written.kind}, {written.bytes:,} bytes",
        f"Matrices that were rounded: {rounded}; kept as they were: {kept}.",
        shown=Table(("folder", "format", "bytes"), [(written.folder, written.kind, written.bytes)]),
    )
