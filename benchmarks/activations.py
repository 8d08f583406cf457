"""Weights and activations rounded together, W8A8 and W8A4, with each treatment of outliers, as
Markdown tables.

    python benchmarks/activations.py [MODEL[=TEXT] ...]      # default: patient

The first 8 windows of the text are for fitting (clipping, SmoothQuant); 16 others are judged on.
The critical entries are found on all 24.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from surgeon.anatomy import Anatomy, load_model
from surgeon.corpus import Corpus, load_corpus, read_text
from surgeon.find import find
from surgeon.patients import heldout_text
from surgeon.quantize.activations import ActivationConfig
from surgeon.quantize.compare_activations import (
    CALIBRATION_WINDOWS,
    INT8,
    ROWS,
    activation_table,
    tensor_table,
)

JUDGED, WINDOW = 16, 256
HOLDS = (1, 16, 0)
ALPHAS = (0.25, 0.75)
TENSORS = ("inputs", "down", "residual")


def number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=["patient"])
    for each in parser.parse_args().models:
        name, _, text = each.partition("=")
        loaded = load_model(name)
        anatomy = Anatomy.of(loaded.model)
        assert loaded.tokenizer is not None
        source = read_text(text) if text else heldout_text()
        corpus = load_corpus(
            loaded.tokenizer,
            source,
            Path(text).name or "held-out text",
            WINDOW,
            CALIBRATION_WINDOWS + JUDGED,
        )
        critical = [
            c.entry for s in find(anatomy, corpus).sets if s.verification.vital for c in s.entries
        ]
        where = ", ".join(sorted({f"{e.site} row {e.row}" for e in critical}))
        print(
            f"\n## {Path(name).name} on {corpus.name}: {len(critical)} critical entries in {where}"
        )
        alone(anatomy, corpus, critical)
        for bits in (8, 4):
            together(anatomy, corpus, critical, bits)


def alone(anatomy, corpus: Corpus, critical) -> None:  # type: ignore[no-untyped-def]
    print(
        "\nEach tensor alone, INT8, one scale per sequence, float weights: its largest magnitude"
        " over its median; relative squared error"
    )
    print("of what a hold-out rounds; nats. One entry per sequence held out, and whole channels.\n")
    print(
        "| tensor | peak | channels | error naive | error held, 1 | nats naive | nats held, 1 |"
        " nats held, all |"
    )
    print("|---|---|---|---|---|---|---|---|")
    config = ActivationConfig(8, "tensor", tensors=TENSORS)
    whole = tensor_table(anatomy, corpus, replace(config, hold=0), critical)
    for row, all_held in zip(tensor_table(anatomy, corpus, config, critical), whole, strict=True):
        what = {"inputs": "", "down": " out", "residual": ""}[row.tensor]
        held = (
            f"{row.held_error:.5f} | {row.naive_nats:+.4f} | {row.held_nats:+.4f} |"
            f" {all_held.held_nats:+.4f}"
        )
        without = f"| {row.naive_nats:+.4f} | |".replace("| ", "", 1)
        print(
            f"| {row.label}{what} | {row.peak:.0f} | {row.channels} | {row.naive_error:.5f} |"
            f" {held if row.channels else '| ' + without} |"
        )


def together(anatomy, corpus: Corpus, critical, bits: int) -> None:  # type: ignore[no-untyped-def]
    for tensors, holds in ((("inputs",), HOLDS), (TENSORS, HOLDS[:1])):
        for hold in holds:
            methods: Sequence[str] = ROWS
            if tensors == TENSORS or hold != HOLDS[0]:
                methods = [
                    *(["naive"] if hold == HOLDS[0] else []),
                    "holdout",
                    "control",
                    *(["smooth+holdout"] if hold == 0 else ["largest"]),
                ]
            config = ActivationConfig(bits, hold=hold, tensors=tensors)
            result = activation_table(anatomy, corpus, config, critical, methods=methods)
            if hold == HOLDS[0]:
                print(
                    f"\nW8A{bits}, {' + '.join(tensors)}: NLL {result.intact:.4f} intact,"
                    f" {number(result.weights)} with INT8 weights alone, {result.judged_on}"
                    f" windows; {result.smooth}\n"
                )
                print(
                    "| method | held out | NLL per tensor | KL | top-1 | NLL per token | KL | top-1"
                    " |\n|---|---|---|---|---|---|---|---|"
                )
            rows = {(r.method, r.per): r for r in result.rows}
            for method in dict.fromkeys(r.method for r in result.rows):
                tensor, token = rows[method, "tensor"], rows[method, "token"]
                clipped = (
                    f" ({tensor.clip_value:g}, {token.clip_value:g})"
                    if tensor.clip_value and token.clip_value
                    else ""
                )
                numbers = " | ".join(
                    f"{number(r.nll)} | {number(r.kl)} | {r.top1_agreement:.3f}"
                    for r in (tensor, token)
                )
                share = f"{hold or 'all'} ({tensor.held:.2g})" if tensor.held else ""
                print(f"| {method}{clipped} | {share} | {numbers} |", flush=True)
    for alpha in ALPHAS:
        smooth = ("smooth", "smooth everywhere")
        rows = activation_table(
            anatomy, corpus, ActivationConfig(bits), critical, INT8, alpha, ("tensor",), smooth
        ).rows
        print(
            f"\nalpha {alpha}: KL "
            + ", ".join(f"{r.method} per {r.per} {number(r.kl)}" for r in rows),
            flush=True,
        )


if __name__ == "__main__":
    main()
