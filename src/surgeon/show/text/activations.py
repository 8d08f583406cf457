"""Quantized activations as text."""

from __future__ import annotations

from typing import Any

from rich.markup import escape
from rich.table import Table

from ..console import out, print_table


def print_activations(document: dict[str, Any]) -> None:
    d, nll = document, document["nll"]
    only = "not finite" if nll["weights_only"] is None else f"{nll['weights_only']:.4f}"
    out.print(
        f"activations of {d['bits']} bits with these weights, on {d['judged_on']} windows (the"
        f" {d['fitted_on']} before are fitted to): NLL {nll['intact']:.4f} intact, {only} with"
        " float activations"
    )
    shown = Table(
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
    for row in d["rows"]:
        shown.add_row(
            row["per"],
            escape(row["method"]),
            row["smooth"] or "",
            (
                f"{row['held']:.2%}"
                if row["held"] > 1e-3
                else f"{row['held']:.1e}"
                if row["held"]
                else ""
            ),
            "not finite" if row["nll"] is None else f"{row['nll']:.4f}",
            "" if row["nll"] is None else f"{row['nll'] - nll['intact']:+.4f}",
            "" if row["kl"] is None else f"{row['kl']:.4f}",
            f"{row['top1_agreement']:.3f}",
        )
    print_table(shown)
    for kind, count in d["smooth"].items():
        folded, divided = count["folded_norms"], count["divided_inputs"]
        out.print(
            f"smoothed ({kind}): SmoothQuant, alpha {d['alpha']:g}, {folded} norms folded,"
            f" {divided} inputs divided as the model runs"
        )
