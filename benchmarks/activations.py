"""Weights and activations rounded together, W8A8 and W8A4, with each treatment of outliers, as
Markdown tables.

    python benchmarks/activations.py [MODEL[=TEXT] ...]      # default: patient

The first 8 windows of the text are for fitting (clipping, SmoothQuant); 16 others are judged on.
The critical entries are found on all 24.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from activation_table import METHODS, Method, tensor_table, treatments
from models import heading, line, models_asked_for
from torch import Tensor

from surgeon.anatomy import Anatomy, Entry
from surgeon.measure import Reference
from surgeon.quantize import ActivationConfig, ActivationRow, Treatment, activation_table
from surgeon.quantize.compare import INT8
from surgeon.studies.quantize import CALIBRATION_WINDOWS, split

JUDGED = 16
ALPHAS = (0.25, 0.75)
TENSORS = ("inputs", "down", "residual")
NAMED = {method.name: method for method in METHODS}


def number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def main() -> None:
    for model in models_asked_for(__doc__, CALIBRATION_WINDOWS + JUDGED):
        anatomy, windows, critical = model.anatomy, model.corpus.windows, model.critical
        where = ", ".join(sorted({f"{e.site} row {e.row}" for e in critical}))
        print(
            f"\n## {model.name} on {model.corpus.name}: {len(critical)} critical entries in {where}"
        )
        alone(anatomy, windows, critical)
        for bits in (8, 4):
            together(anatomy, windows, critical, bits)
            smoothed(anatomy, windows, critical, bits)


def alone(anatomy: Anatomy, windows: Tensor, critical: Sequence[Entry]) -> None:
    print(
        "\nEach tensor alone, INT8, one scale per sequence, float weights: its largest magnitude"
        " over its median; relative squared error\nof what a hold-out rounds; nats. One entry per"
        " sequence held out, and whole channels.\n"
    )
    errors, nats = ("error naive", "error held, 1"), ("nats naive", "nats held, 1")
    heading("tensor", "peak", "channels", *errors, *nats, "nats held, all")
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
        line(*cells)


def together(anatomy: Anatomy, windows: Tensor, critical: Sequence[Entry], bits: int) -> None:
    fit, judged = split(windows)
    reference = Reference(anatomy.model, judged)
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
        result = activation_table(anatomy, fit, reference, config, critical, ways=ways)
        if hold == 1:
            print(
                f"\nW8A{bits}, {' + '.join(tensors)}: NLL {result.nll.intact:.4f} intact,"
                f" {number(result.nll.weights_only)} with INT8 weights alone, {result.judged_on}"
                f" windows; {result.smooth}\n"
            )
            numbers = ("KL", "top-1")
            heading("method", "held out", "NLL per tensor", *numbers, "NLL per token", *numbers)
        half = len(methods)
        for method, tensor, token in zip(
            methods, result.rows[:half], result.rows[half:], strict=True
        ):
            line(*cells_of(method, hold, tensor, token))


def cells_of(method: Method, hold: int, tensor: ActivationRow, token: ActivationRow) -> list[str]:
    clipped = ""
    if tensor.clip_value is not None and token.clip_value is not None:
        clipped = f" ({tensor.clip_value:g}, {token.clip_value:g})"
    share = f"{hold or 'all'} ({tensor.held:.2g})" if tensor.held else ""
    cells = [f"{method.name}{clipped}", share]
    for row in (tensor, token):
        cells += [number(row.nll), number(row.kl), f"{row.top1_agreement:.3f}"]
    return cells


def smoothed(anatomy: Anatomy, windows: Tensor, critical: Sequence[Entry], bits: int) -> None:
    fit, judged = split(windows)
    reference = Reference(anatomy.model, judged)
    config = ActivationConfig(bits, per="tensor")
    ways = [Treatment(config, smooth) for smooth in ("norms", "everywhere")]
    for alpha in ALPHAS:
        result = activation_table(anatomy, fit, reference, config, critical, INT8, alpha, ways)
        kls = [f"smooth {row.smooth} per tensor {number(row.kl)}" for row in result.rows]
        print(f"\nalpha {alpha}: KL {', '.join(kls)}", flush=True)


if __name__ == "__main__":
    main()
