"""Sections on quantization: the four methods beside one another, and a sweep with its Pareto
front.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .charts import Row, scatter
from .folder import Result
from .picture import Cell, Picture, Table, command, many, nats

OWN = {"rtn": "broken", "clip": "base", "restore": "broken", "holdout": "patched"}
LISTED = 12


def quantize_pictures(result: Result) -> Iterator[Picture]:
    """The table of methods, or the sweep; then what was done to each matrix."""
    d = result.data
    made_by = command("quantize", result.model, "--bits", "N")
    tasks = list(d["base"]["accuracy"])
    rows = d.get("sweep") or d["table"]
    finite = [r for r in rows if r["nll"] is not None]
    columns = (
        "bits",
        "block",
        "method",
        "bits per weight",
        "NLL",
        "more than intact",
        "KL to intact",
        "top-1 agreement",
        *tasks,
    )
    table = Table(columns, [_row(r, d["base"]["nll"], tasks) for r in rows])
    about = (
        f"NLL and KL in nats per token, on {many(d['corpus']['judged_on'], 'window')}; the intact"
        f" model has {d['base']['nll']:.4f}."
        f" {many(len(d['critical']['entries']), 'critical entry')} ({d['critical']['source']})."
        " rtn: rounded; clip: clipped, then rounded; restore: rounded, then the critical entries"
        " put back; holdout: clipped, rounded and put back. Bits per weight count scales, offsets"
        " and what is put back. " + " ".join(d.get("notes", ()))
    )
    if "sweep" in d:
        front = [(r["method"], r["bits"], r["block"]) for r in d["pareto"]]
        yield Picture(
            "Quantized: size and damage",
            f"{len(front)} of {len(rows)} ways to quantize are beaten by no other in both size"
            " and NLL",
            about,
            result.file,
            made_by,
            chart=scatter(
                [_point(r, front) for r in finite],
                _series(finite),
                "bits per weight",
                "NLL, nats per token",
                d["base"]["nll"],
            ),
            table=table,
        )
        return
    best = min(finite, key=lambda r: r["nll"], default=None)
    said = "no method gives finite predictions"
    if best is not None:
        said = f"least damage by {best['method']}, {nats(best['nll'] - d['base']['nll'])} nats"
    headline = f"At {rows[0]['bits']} bits and {rows[0]['block']}: {said}"
    yield Picture("Quantized, four ways", headline, about, result.file, made_by, shown=table)
    matrices = sorted(d["config"]["matrices"], key=lambda m: -m["error"])
    yield Picture(
        "Matrix by matrix",
        f"{matrices[0]['site']} has the largest error, {matrices[0]['error']:.3g} of its squared"
        " norm",
        f"The method that was chosen: {d['config']['method']}. Clipped at: the z-score, percentage"
        " or share of the range that was used. Error: squared, as a share of that of the weights,"
        " without the critical entries.",
        result.file,
        made_by,
        shown=Table(
            ("matrix", "blocks", "clipped at", "clipped", "held out", "error"),
            [
                (m["site"], m["blocks"], m["clip"], m["clipped"], m["held"], m["error"])
                for m in matrices[:LISTED]
            ],
            len(matrices),
        ),
    )


def _row(r: dict[str, Any], base: float, tasks: list[str]) -> list[Cell]:
    nll = r["nll"]
    more = None if nll is None else nats(nll - base)
    accuracy = [r["accuracy"][t] for t in tasks]
    return [
        r["bits"],
        r["block"],
        r["method"],
        r["bits_per_weight"],
        nll,
        more,
        r["kl"],
        r["top1_agreement"],
        *accuracy,
    ]


def _name(r: dict[str, Any]) -> str:
    return {"holdout": "hold-out", "restore": "rounded", "rtn": "rounded", "clip": "clipped"}.get(
        r["method"], "peers"
    )


def _series(rows: list[dict[str, Any]]) -> dict[str, str]:
    return {_name(r): OWN.get(r["method"], "control") for r in rows}


def _point(r: dict[str, Any], front: list[tuple[str, int, str]]) -> Row:
    return {
        "x": r["bits_per_weight"],
        "y": r["nll"],
        "series": _name(r),
        "front": (r["method"], r["bits"], r["block"]) in front,
    }
