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

from activation_table import METHODS, Method, tensor_table, treatments
from torch import Tensor

from surgeon.anatomy import Anatomy, Entry, load_model
from surgeon.corpus import load_corpus, read_text
from surgeon.find import find
from surgeon.patients import heldout_text
from surgeon.quantize import ActivationConfig, ActivationRow, Treatment, activation_table
from surgeon.quantize.compare import INT8
from surgeon.studies.quantize import CALIBRATION_WINDOWS, split

JUDGED, WINDOW = 16, 256
HOLDS = (1, 16, 0)
ALPHAS = (0.25, 0.75)
TENSORS = ("inputs", "down", "residual")
NAMED = {method.name: method for method in METHODS}


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
        critical = [c.entry for s in find(anatomy, corpus).sets if s.vital for c in s.entries]
        where = ", ".join(sorted({f"{e.site} row {e.row}" for e in critical}))
        print(
            f"\n## {Path(name).name} on {corpus.name}: {len(critical)} critical entries in {where}"
        )
        alone(anatomy, corpus.windows, critical)
        for bits in (8, 4):
            together(anatomy, corpus.windows, critical, bits)
            smoothed(anatomy, corpus.windows, critical, bits)


def alone(anatomy: Anatomy, windows: Tensor, critical: Sequence[Entry]) -> None:
    print(
        "\nEach tensor alone, INT8, one scale per sequence, float weights: its largest magnitude"
        " over its median; relative squared error\nof what a hold-out rounds; nats. One entry per"
        " sequence held out, and whole channels.\n"
    )
    print(
        "| tensor | peak | channels | error naive | error held, 1 | nats naive | nats held, 1 |"
        " nats held, all |\n|---|---|---|---|---|---|---|---|"
    )
    config = ActivationConfig(8, "tensor", tensors=TENSORS)
    one_held = tensor_table(anatomy, windows, config, critical)
    all_held = tensor_table(anatomy, windows, replace(config, hold=0), critical)
    for one, every in zip(one_held, all_held, strict=True):
        channels = len(one.place.channels)
        cells = [one.label, f"{one.peak:.0f}", channels, f"{one.naive_error:.5f}"]
        if channels:
            cells += [f"{one.held_error:.5f}", f"{one.naive_nats:+.4f}"]
            cells += [f"{one.held_nats:+.4f}", f"{every.held_nats:+.4f}"]
        else:
            cells += ["", f"{one.naive_nats:+.4f}", "", ""]
        print("| " + " | ".join(map(str, cells)) + " |")


def together(anatomy: Anatomy, windows: Tensor, critical: Sequence[Entry], bits: int) -> None:
    fit, judged = split(windows)
    few = [NAMED[name] for name in ("holdout", "control", "largest")]
    whole = [NAMED[name] for name in ("holdout", "control", "smooth, holdout")]
    for tensors, hold, methods in (
        (("inputs",), 1, METHODS),
        (("inputs",), 16, few),
        (("inputs",), 0, whole),
        (TENSORS, 1, [NAMED["naive"], *few]),
    ):
        config = ActivationConfig(bits, hold=hold, tensors=tensors)
        ways = treatments(anatomy, windows, config, methods)
        result = activation_table(anatomy, fit, judged, config, critical, ways=ways)
        if hold == 1:
            print(
                f"\nW8A{bits}, {' + '.join(tensors)}: NLL {result.nll.intact:.4f} intact,"
                f" {number(result.nll.weights_only)} with INT8 weights alone, {result.judged_on}"
                f" windows; {result.smooth}\n"
            )
            print(
                "| method | held out | NLL per tensor | KL | top-1 | NLL per token | KL | top-1"
                " |\n|---|---|---|---|---|---|---|---|"
            )
        half = len(methods)
        for method, tensor, token in zip(
            methods, result.rows[:half], result.rows[half:], strict=True
        ):
            print(line(method, hold, tensor, token), flush=True)


def line(method: Method, hold: int, tensor: ActivationRow, token: ActivationRow) -> str:
    clipped = ""
    if tensor.clip_value is not None and token.clip_value is not None:
        clipped = f" ({tensor.clip_value:g}, {token.clip_value:g})"
    share = f"{hold or 'all'} ({tensor.held:.2g})" if tensor.held else ""
    numbers = " | ".join(
        f"{number(row.nll)} | {number(row.kl)} | {row.top1_agreement:.3f}"
        for row in (tensor, token)
    )
    return f"| {method.name}{clipped} | {share} | {numbers} |"


def smoothed(anatomy: Anatomy, windows: Tensor, critical: Sequence[Entry], bits: int) -> None:
    fit, judged = split(windows)
    config = ActivationConfig(bits, per="tensor")
    ways = [Treatment(config, smooth) for smooth in ("norms", "everywhere")]
    for alpha in ALPHAS:
        result = activation_table(anatomy, fit, judged, config, critical, INT8, alpha, ways)
        kls = [f"smooth {row.smooth} per tensor {number(row.kl)}" for row in result.rows]
        print(f"\nalpha {alpha}: KL {', '.join(kls)}", flush=True)


if __name__ == "__main__":
    main()
