"""The part of `surgeon quantize` about activations: its options, and how its table is printed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import click

from ..anatomy import Anatomy, Entry
from ..corpus import Corpus
from ..quantize import ActivationConfig, QuantizeConfig, activation_table
from .common import options, progress

BITS = {"INT8": 8, "INT4": 4}
activation_options = options(
    click.option(
        "--activations",
        type=click.Choice(list(BITS)),
        help=(
            "Also the table of weights and activations rounded together, per tensor and per token:"
            " naive, the super activation held out, its control, and SmoothQuant."
        ),
    ),
    click.option(
        "--hold",
        type=click.IntRange(0),
        default=ActivationConfig.hold,
        show_default=True,
        help=(
            "With --activations: entries held out of a tensor per sequence, the largest of their"
            " channels; 0: all."
        ),
    ),
    click.option(
        "--alpha",
        type=click.FloatRange(0, 1),
        default=0.5,
        show_default=True,
        help="With --activations: how much of the spread SmoothQuant moves into the weights.",
    ),
)


def measure_activations(
    anatomy: Anatomy,
    corpus: Corpus,
    name: str,
    hold: int,
    alpha: float,
    critical: Sequence[Entry],
    weights: QuantizeConfig,
) -> dict[str, Any]:
    """The table as JSON.

    The weights' clipping is searched by their own error: where inputs are smoothed their E[x^2] is
    another.
    """
    config = ActivationConfig(bits=BITS[name], hold=hold)
    with progress() as tell:
        return activation_table(
            anatomy,
            corpus.windows,
            config,
            critical,
            replace(weights, weighted=False),
            alpha,
            progress=tell,
        ).to_json()
