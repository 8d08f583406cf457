"""`surgeon cells geneformer`: what a Geneformer loses without given weights, beside matched
controls.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click
import torch
from rich.markup import escape
from torch import Tensor

from ..anatomy import Anatomy, Region
from ..cells import expression, read_cells
from ..cells.geneformer import (
    RankBatch,
    largest_writes,
    rank_masks,
    rank_nll,
    rank_tokens,
    read_dictionary,
)
from ..errors import BadInput
from ..find.controls import matched_controls
from ..find.verify import Controls, VerifyConfig, control_kind, entries_of
from ..measure.bootstrap import interval
from ..patch import injured
from ..show.console import out
from .common import (
    json_option,
    model_options,
    open_model,
    print_json,
    progress,
    regions,
    require_finite,
    seed_option,
)

CHUNK = 8  # cells in one pass
CONTROLS = VerifyConfig().controls


@click.command("geneformer")
@model_options
@click.argument("data")
@click.option(
    "--tokens",
    required=True,
    metavar="FILE",
    help="Token dictionary as JSON: Ensembl id to token, <pad> and <mask> too.",
)
@click.option(
    "--medians",
    metavar="FILE",
    help="Median of each gene as JSON.  [default: none, genes are ranked as they are]",
)
@click.option(
    "--at",
    "at",
    multiple=True,
    metavar="ENTRY",
    help="Weights to zero.  [default: the worst of each layer's largest |w·x|]",
)
@click.option(
    "--cells",
    default=32,
    show_default=True,
    type=click.IntRange(min=8),
    help="Most cells to measure on, a random choice.",
)
@click.option(
    "--length",
    default=2048,
    show_default=True,
    type=click.IntRange(min=4),
    help="Most tokens of a cell.",
)
@click.option(
    "--draws",
    default=2,
    show_default=True,
    type=click.IntRange(min=1),
    help="Draws of masks over the same cells.",
)
@click.option(
    "--ratio", default=0.15, show_default=True, help="Share of the genes that a draw hides."
)
@seed_option
@json_option
def geneformer_command(
    model: str,
    dtype: str,
    device: str,
    data: str,
    tokens: str,
    medians: str | None,
    at: tuple[str, ...],
    cells: int,
    length: int,
    draws: int,
    ratio: float,
    seed: int,
    as_json: bool,
) -> None:
    """Zero weights of the Geneformer in MODEL and measure its masked likelihood on the cells in
    DATA (counts, Ensembl ids).
    """
    known, scale = read_dictionary(tokens), None if medians is None else read_dictionary(medians)
    values = expression(read_cells(data))
    n = len(values.cell_names)
    if n < 8:
        raise BadInput(
            f"{data} has {n} cells, too few to choose a weight on some and judge it on others; give"
            " at least 8."
        )
    order = (
        torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:cells]
        .sort()
        .values.tolist()
    )
    loaded, anatomy = open_model(model, dtype, device)
    longest = min(length, getattr(anatomy.config, "max_position_embeddings", length))
    batch = rank_tokens(values.of(order), known, scale, longest)
    hidden = rank_masks(batch, ratio, draws, seed)
    parts = regions(anatomy, at)
    with progress() as tell:
        if not parts:  # chosen on a quarter of the cells, judged on the others
            first = len(order) // 4
            parts = [_worst(anatomy, batch.of(slice(first)), hidden[:1, :first])]
            batch, hidden = batch.of(slice(first, None)), hidden[:, first:]
        base = _by_cell(anatomy, batch, hidden)
        joint = _by_cell(anatomy, batch, hidden, parts) - base
        controls = matched_controls(
            anatomy, [e for part in parts for e in entries_of(anatomy, part)], CONTROLS, seed
        )
        nats = []
        for control in controls:
            nats.append(
                float(
                    (
                        _by_cell(
                            anatomy, batch, hidden, [Region(e.site, e.row, e.col) for e in control]
                        )
                        - base
                    ).mean()
                )
            )
            tell("controls", len(nats), len(controls))
    mean, (low, high) = float(joint.mean()), interval(joint, seed)
    require_finite(base_nll=float(base.mean()), damage=mean)
    p, rule = (1 + sum(c >= mean for c in nats)) / (1 + len(nats)), VerifyConfig()
    held = Controls(nats, control_kind(parts))
    vital = (
        low > 0
        and p <= 0.05
        and mean >= rule.min_nats
        and mean >= rule.min_ratio * max(held.max, 0.0)
    )
    document: dict[str, Any] = {
        "model": model,
        "fingerprint": loaded.fingerprint,
        "at": [str(part) for part in parts],
        "base_nll": float(base.mean()),
        "masked_genes": int(hidden.sum()),
        "cells": len(batch.cell_names),
        "joint_nats": mean,
        "ci95": [low, high],
        "p_value": p,
        "controls": held.to_json(),
        "vital": vital,
    }
    if as_json:
        print_json(document)
        return
    out.print(
        f"[bold]{escape(model)}[/bold]: {document['base_nll']:.4f} nats per masked gene"
        f" ({document['masked_genes']} of {len(base)} cells)"
    )
    out.print(
        f"without {escape(', '.join(document['at']))}: [bold]{mean:+.4f}[/bold] (95% {low:+.4f} to"
        f" {high:+.4f})"
    )
    out.print(
        f"controls {held.max:+.4f} worst of {len(nats)}, p = {p:.3f}:"
        f" {'vital' if vital else 'not vital'}"
    )


def _worst(anatomy: Anatomy, batch: RankBatch, hidden: Tensor) -> Region:
    candidates = [Region(e.site, e.row, e.col) for e in largest_writes(anatomy, batch)]
    return max(candidates, key=lambda part: float(_by_cell(anatomy, batch, hidden, [part]).mean()))


def _by_cell(
    anatomy: Anatomy, batch: RankBatch, hidden: Tensor, zeroed: Sequence[Region] = ()
) -> Tensor:
    """NLL (cell,) in nats per masked gene, with these weights at zero."""
    if zeroed:
        with injured(anatomy, zeroed):
            return _by_cell(anatomy, batch, hidden)
    pieces = [slice(i, i + CHUNK) for i in range(0, len(batch.cell_names), CHUNK)]
    return torch.cat(
        [
            rank_nll(anatomy.model, batch.of(p), hidden[:, p]).double().nanmean((0, 2))
            for p in pieces
        ]
    )
