"""Quantization as text."""

from __future__ import annotations

from rich.table import Table

from ...quantize import QuantizeConfig, RoundedWeights, Row, TensorTypes
from ...studies.quantize import Base, QuantizeResult
from ...studies.quantized_folder import Written
from ..console import out, print_table, shown
from .activations import print_activations

MOST_MATRICES = 40
METHODS = {
    "rtn": "rounded to nearest",
    "clip": "clip-only",
    "restore": "restore-only",
    "holdout": "clipped, rounded and put back",
}


def print_quantize(result: QuantizeResult) -> None:
    """The methods beside the intact model and one another, and what was written."""
    model = f"[bold]{shown(result.provenance.model)}[/bold]"
    count = len(result.critical.entries)
    critical = f"{count} critical {'entry' if count == 1 else 'entries'}"
    out.print(f"{model}: {critical} ({shown(result.critical.source)})")
    if result.base is not None:
        _print_table(result, result.base)
    if result.weights is not None:
        _print_worth(result)
        _print_matrices(result.weights)
    if result.activations is not None:
        print_activations(result.activations)
    for note in result.notes:
        out.print(shown(note))
    if result.export is not None:
        _print_written(result.export)
    if result.gguf is not None:
        _print_flags(result.gguf)


def _print_table(result: QuantizeResult, base: Base) -> None:
    corpus = result.provenance.corpus
    name = "" if corpus is None else f" of {shown(corpus.name)}"
    calibrated = ""
    if result.calibrated_on:
        calibrated = f"; the {result.calibrated_on} before them are calibrated on"
    out.print(f"NLL {base.nll:.4f} on {result.judged_on} windows{name}{calibrated}")
    front = result.pareto if result.weights is None else []
    tasks = list(base.accuracy)
    table = Table(
        "bits",
        "block",
        "method",
        "bits/weight",
        "NLL",
        "more",
        "KL to base",
        "top-1",
        *map(shown, tasks),
        box=None,
        header_style="bold",
    )
    intact = [f"{base.accuracy[task]:.3f}" for task in tasks]
    table.add_row("", "", "intact", "", f"{base.nll:.4f}", "", "", "", *intact)
    for row in result.table:
        mark = " *" if row in front else ""
        accuracy = [f"{row.accuracy[task]:.3f}" for task in tasks]
        table.add_row(
            str(row.bits),
            shown(row.block),
            shown(row.method) + mark,
            f"{row.bits_per_weight:.3f}",
            *_loss(row, base),
            f"{row.top1_agreement:.3f}",
            *accuracy,
        )
    print_table(table)
    if front:
        out.print(
            "* on the Pareto front: none of the others has as few bits per weight and a lower NLL."
        )


def _loss(row: Row, base: Base) -> tuple[str, str, str]:
    if row.nll is None:
        return "not finite", "", ""
    kl = "" if row.kl is None else f"{row.kl:.4f}"
    return f"{row.nll:.4f}", f"{row.nll - base.nll:+.4f}", kl


def _print_worth(result: QuantizeResult) -> None:
    """What the hold-out costs, beside each half of it."""
    damage = {row["method"]: row["damage_nats"] for row in result.rows()}
    if damage.get("holdout") is None:
        return
    beside = [
        f"{METHODS[method]} {damage[method]:+.4f}"
        for method in ("clip", "restore", "rtn")
        if damage.get(method) is not None
    ]
    out.print(
        f"The hold-out costs [bold]{damage['holdout']:+.4f} nats[/bold] per token, compared with"
        f" {', '.join(beside)}."
    )


def _print_matrices(weights: RoundedWeights) -> None:
    table = Table(
        f"matrix ({_method(weights.config)})",
        "blocks",
        "clipped at",
        "entries clipped",
        "held out",
        "error",
        box=None,
        header_style="bold",
    )
    for site, one in list(weights.matrices.items())[:MOST_MATRICES]:
        table.add_row(
            shown(str(site)),
            str(one.blocks),
            "" if one.clip is None else f"{one.clip:.4g}",
            str(one.clipped),
            str(one.held),
            f"{one.error:.3g}",
        )
    print_table(table)
    more = len(weights.matrices) - MOST_MATRICES
    if more > 0:
        out.print(f"and {more} more matrices, all in the result's JSON")


def _method(config: QuantizeConfig) -> str:
    return f"{config.method}: {METHODS[config.method]}"


def _print_written(written: Written) -> None:
    out.print(shown(f"{written.folder}: {written.kind}, {written.bytes} bytes"))


def _print_flags(flags: TensorTypes) -> None:
    line = flags.line or "(no critical matrix to keep)"
    out.print(shown(f"llama-quantize {line}"), soft_wrap=True)
