"""Quantization as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from ..console import out, print_table
from .activations import print_activations


def print_quantize(document: dict[str, Any]) -> None:
    corpus, base, critical = document["corpus"], document["base"], document["critical"]
    config = document["config"]
    text = f"{corpus['judged_on']} windows of {escape(corpus['name'])}"
    out.print(
        f"[bold]{escape(document['model'])}[/bold]: NLL {base['nll']:.4f} on {text};"
        f" {len(critical['entries'])} critical entries ({critical['source']})"
    )
    rows = document.get("sweep") or document["table"]
    front = [(r["method"], r["bits"], r["block"]) for r in document.get("pareto", ())]
    tasks = list(base["accuracy"])
    shown = Table(
        "bits",
        "block",
        "method",
        "bits/weight",
        "NLL",
        "more",
        "KL to base",
        "top-1",
        *tasks,
        box=None,
        header_style="bold",
    )
    shown.add_row(
        "",
        "",
        "intact",
        "",
        f"{base['nll']:.4f}",
        "",
        "",
        "",
        *(f"{base['accuracy'][t]:.3f}" for t in tasks),
    )
    for row in rows:
        nll, kl = row["nll"], row["kl"]
        shown.add_row(
            str(row["bits"]),
            row["block"],
            row["method"] + (" *" if (row["method"], row["bits"], row["block"]) in front else ""),
            f"{row['bits_per_weight']:.3f}",
            "not finite" if nll is None else f"{nll:.4f}",
            "" if nll is None else f"{nll - base['nll']:+.4f}",
            "" if kl is None else f"{kl:.4f}",
            f"{row['top1_agreement']:.3f}",
            *(f"{row['accuracy'][t]:.3f}" for t in tasks),
        )
    print_table(shown)
    if front:
        out.print(
            "* on the Pareto front: none of the others has as few bits per weight and a lower NLL"
        )
    if "matrices" in config:
        _print_matrices(config["matrices"], config["method"])
    if "activations" in document:
        print_activations(document["activations"])
    for note in document.get("notes", ()):
        out.print(escape(note))
    print_written(document)


def _print_matrices(matrices: Sequence[Mapping[str, Any]], method: str) -> None:
    shown = Table(
        f"matrix ({method})",
        "blocks",
        "clipped at",
        "entries clipped",
        "held out",
        "error",
        box=None,
        header_style="bold",
    )
    for m in matrices[:40]:
        value = "" if m["clip"] is None else f"{m['clip']:.4g}"
        shown.add_row(
            escape(m["site"]),
            str(m["blocks"]),
            value,
            str(m["clipped"]),
            str(m["held"]),
            f"{m['error']:.3g}",
        )
    print_table(shown)
    if len(matrices) > 40:
        out.print(f"and {len(matrices) - 40} more matrices, all in --json")


def print_written(document: dict[str, Any]) -> None:
    if "export" in document:
        export = document["export"]
        out.print(escape(f"{export['folder']}: {export['kind']}, {export['bytes']} bytes"))
    if "gguf" in document:
        out.print(
            escape(f"llama-quantize {document['gguf']['line'] or '(no critical matrix to keep)'}"),
            soft_wrap=True,
        )
