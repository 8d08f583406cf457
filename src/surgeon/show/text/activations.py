"""Quantized activations as text."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from ...quantize import ActivationRow, ActivationTable
from ..console import out, print_table

SMALL = 1e-3  # a share below it is not written as percent


def print_activations(result: ActivationTable) -> None:
    """Each treatment of activations beside the same weights with float activations."""
    intact, alone = result.nll.intact, result.nll.weights_only
    weights = "not finite" if alone is None else f"{alone:.4f}"
    out.print(
        f"With activations of {result.config.bits} bits and these weights, on"
        f" {result.judged_on} windows (the {result.fitted_on} before them are fitted to): NLL"
        f" {intact:.4f} intact, {weights} with float activations"
    )
    table = Table(
        "one scale per",
        "method",
        "smoothed",
        "held out",
        "NLL",
        "more",
        "KL to base",
        "top-1",
        box=None,
        header_style="bold",
    )
    for row in result.rows:
        table.add_row(
            row.per,
            row.method,
            row.smooth or "",
            _share(row.held),
            *_loss(row, intact),
            f"{row.top1_agreement:.3f}",
        )
    print_table(table)
    for kind, count in result.smooth.items():
        out.print(
            f"smoothed ({escape(kind)}): SmoothQuant, alpha {result.alpha:g},"
            f" {count.folded_norms} norms folded, {count.divided_inputs} inputs divided as the"
            " model runs"
        )


def _share(held: float) -> str:
    if not held:
        return ""
    return f"{held:.2%}" if held > SMALL else f"{held:.1e}"


def _loss(row: ActivationRow, intact: float) -> tuple[str, str, str]:
    if row.nll is None:
        return "not finite", "", ""
    kl = "" if row.kl is None else f"{row.kl:.4f}"
    return f"{row.nll:.4f}", f"{row.nll - intact:+.4f}", kl
