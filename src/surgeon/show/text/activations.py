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
        "clipped at",
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
            "" if row["clip_value"] is None else f"{row['clip_value']:g}",
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
    for name, count in d["smooth"].items():
        where = ", the inputs of attn.out and mlp.down too" if name.endswith("everywhere") else ""
        folded, divided = count["folded_norms"], count["divided_inputs"]
        out.print(
            f"{name}: SmoothQuant, alpha {d['alpha']:g}, {folded} norms folded, {divided} inputs"
            f" divided as the model runs{where}"
        )
