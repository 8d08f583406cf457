"""The part of `surgeon quantize` about activations: its options, and how its table is printed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import click
from rich.markup import escape
from rich.table import Table

from ..anatomy import Anatomy, Entry
from ..corpus import Corpus
from ..quantize import QuantizeConfig
from ..quantize.activations import ActivationConfig
from ..quantize.compare_activations import activation_table
from .common import options, out, print_table, progress

BITS = {"INT8": 8, "INT4": 4}
activation_options = options(
    click.option("--activations", type=click.Choice(list(BITS)), help="Also the table of weights and activations rounded together: naive, "
                 "clipped, the super activation held out, and SmoothQuant."),
    click.option("--hold", type=click.IntRange(0), default=ActivationConfig.hold, show_default=True,
                 help="With --activations: entries held out of a tensor per sequence, the largest of their channels; 0: all."),
    click.option("--alpha", type=click.FloatRange(0, 1), default=0.5, show_default=True,
                 help="With --activations: how much of the spread SmoothQuant moves into the weights."),
)  # fmt: skip


def measure_activations(
    anatomy: Anatomy, corpus: Corpus, name: str, hold: int, alpha: float, critical: Sequence[Entry], weights: QuantizeConfig
) -> dict[str, Any]:
    """The table as JSON. The weights' clipping is searched by their own error: where inputs are smoothed their E[x^2] is another."""
    config = ActivationConfig(bits=BITS[name], hold=hold)
    with progress() as tell:
        return activation_table(anatomy, corpus, config, critical, replace(weights, weighted=False), alpha, progress=tell).to_json()


def print_activations(document: dict[str, Any]) -> None:
    d, nll = document, document["nll"]
    only = "not finite" if nll["weights_only"] is None else f"{nll['weights_only']:.4f}"
    out.print(
        f"activations of {d['bits']} bits with these weights, on {d['judged_on']} windows (the {d['fitted_on']} before are fitted to): "
        f"NLL {nll['intact']:.4f} intact, {only} with float activations"
    )
    shown = Table("one scale per", "method", "clipped at", "held out", "NLL", "more", "KL to base", "top-1", box=None, header_style="bold")
    for row in d["rows"]:
        shown.add_row(
            row["per"],
            escape(row["method"]),
            "" if row["clip_value"] is None else f"{row['clip_value']:g}",
            f"{row['held']:.2%}" if row["held"] > 1e-3 else f"{row['held']:.1e}" if row["held"] else "",
            "not finite" if row["nll"] is None else f"{row['nll']:.4f}",
            "" if row["nll"] is None else f"{row['nll'] - nll['intact']:+.4f}",
            "" if row["kl"] is None else f"{row['kl']:.4f}",
            f"{row['top1_agreement']:.3f}",
        )
    print_table(shown)
    for name, count in d["smooth"].items():
        where = ", the inputs of attn.out and mlp.down too" if name.endswith("everywhere") else ""
        folded, divided = count["folded_norms"], count["divided_inputs"]
        out.print(f"{name}: SmoothQuant, alpha {d['alpha']:g}, {folded} norms folded, {divided} inputs divided as the model runs{where}")
