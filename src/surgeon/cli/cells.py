"""`surgeon cells`: models of gene expression; here the group, training, and data as text."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import click
from rich.markup import escape

from ..cells import TrainConfig, expression, read_cells, save_cells
from ..cells.data import EXAMPLE
from ..cells.sentences import cell_sentences
from ..cells.train import PRESETS, Trained
from ..cells.train import train as train_cells
from ..errors import BadInput
from ..show.console import out
from .cells_ranks import geneformer_command
from .cells_screen import map_command, screen_command
from .common import (
    _write,
    json_option,
    options,
    print_json,
    progress,
    require_finite,
    run_folder,
    seed_option,
)

HELP = {
    f.name: f"{f.metadata['help'][0].upper()}{f.metadata['help'][1:]}." for f in fields(TrainConfig)
}

data_options = options(
    click.argument("data"),
    click.option(
        "--raw",
        is_flag=True,
        help="Take .raw, where X is scaled.  [default: X, or .raw if X has negative values]",
    ),
    click.option("--layer", metavar="NAME", help="Take this layer."),
)


@click.group("cells")
def command() -> None:
    """Models of gene expression, on CPU.

    DATA is an .h5ad file of counts or log-counts, or pbmc68k_reduced, which ships inside scanpy.
    """


@command.command("train")
@data_options
@click.option(
    "-o",
    "--output",
    required=True,
    metavar="DIR",
    help="Folder for the checkpoint, in the published scGPT layout.",
)
@click.option(
    "--preset",
    type=click.Choice(sorted(PRESETS)),
    help="Settings tried on a data set.  [default: pbmc68k]",
)
@click.option(
    "--steps", type=click.IntRange(min=1), help=f"{HELP['steps']}  [default: {TrainConfig.steps}]"
)
@click.option(
    "--layers",
    type=click.IntRange(min=1),
    help=f"{HELP['layers']}  [default: {TrainConfig.layers}]",
)
@click.option(
    "--d-model",
    type=click.IntRange(min=2),
    help=f"{HELP['d_model']}  [default: {TrainConfig.d_model}]",
)
@click.option(
    "--genes", type=click.IntRange(min=2), help=f"{HELP['genes']}  [default: {TrainConfig.genes}]"
)
@click.option(
    "--max-genes",
    type=click.IntRange(min=2),
    help=f"{HELP['max_genes']}  [default: {TrainConfig.max_genes}]",
)
@click.option(
    "--lr",
    type=click.FloatRange(min=0, min_open=True),
    help=f"{HELP['lr']}  [default: {TrainConfig.lr:g}]",
)
@seed_option
@json_option
def train_command(
    data: str,
    raw: bool,
    layer: str | None,
    output: str,
    preset: str | None,
    steps: int | None,
    layers: int | None,
    d_model: int | None,
    genes: int | None,
    max_genes: int | None,
    lr: float | None,
    seed: int,
    as_json: bool,
) -> None:
    """Train a small scGPT on DATA, on a CPU in minutes, with cells held out and a gene-marginal
    baseline beside it.
    """
    given = {
        "steps": steps,
        "layers": layers,
        "d_model": d_model,
        "genes": genes,
        "max_genes": max_genes,
        "lr": lr,
    }
    chosen: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
    config = replace(PRESETS[preset or "pbmc68k"], seed=seed, **chosen)
    values = expression(read_cells(data), _source(data, raw, layer))
    folder = run_folder(output)
    assert folder is not None
    with progress() as tell:
        trained = train_cells(values, config, tell)
    require_finite(**{"the model's NLL": trained.nll, "the baseline's NLL": trained.baseline_nll})
    save_cells(
        folder, trained.model, trained.vocab, trained.tokens, trained.marginal, trained.record()
    )
    if as_json:
        print_json(
            {"data": Path(data).name, "kind": values.kind, **trained.to_json(), "output": output}
        )
    else:
        _tell(data, output, trained)


@command.command("sentences")
@data_options
@click.option(
    "-o", "--output", required=True, metavar="FILE", help="Text file to write, one cell a line."
)
@click.option(
    "--genes",
    default=100,
    show_default=True,
    type=click.IntRange(min=1),
    help="Genes of each cell, highest expressed first.",
)
@seed_option
@json_option
def sentences_command(
    data: str, raw: bool, layer: str | None, output: str, genes: int, seed: int, as_json: bool
) -> None:
    """Write cells as sentences of gene names, text for a language model of cells: `surgeon find
    MODEL --text FILE`.
    """
    values = expression(read_cells(data), _source(data, raw, layer))
    lines = cell_sentences(values, genes, seed)
    path = Path(output)
    try:
        _write(path, lambda part: part.write_text("\n".join(lines) + "\n", encoding="utf-8"))
    except OSError as error:
        raise BadInput(
            f"{output} cannot be written: {error.strerror}; choose another place."
        ) from error
    document: dict[str, Any] = {
        "data": Path(data).name,
        "source": values.source,
        "cells": len(lines),
        "genes": genes,
        "output": output,
    }
    if as_json:
        print_json(document)
    else:
        out.print(
            f"{len(lines)} cells of up to {genes} genes, from {escape(values.source)}, in"
            f" [bold]{escape(output)}[/bold]"
        )


command.add_command(screen_command)
command.add_command(geneformer_command)
command.add_command(map_command)


def _source(data: str, raw: bool, layer: str | None) -> str:
    if raw and layer is not None:
        raise click.UsageError("give either --raw or --layer.")
    if data == EXAMPLE and layer is None:
        return "raw"  # its X is scaled
    return "raw" if raw else "auto" if layer is None else f"layer:{layer}"


def _tell(data: str, output: str, trained: Trained) -> None:
    d = trained.to_json()
    cells = d["cells"]
    out.print(
        f"[bold]{escape(data)}[/bold] ({escape(d['source'])}): {cells['train']} cells fitted,"
        f" {cells['validation']} to stop by, {cells['test']} to judge; {d['genes']} genes,"
        f" {d['parameters']} parameters"
    )
    out.print(
        f"NLL [bold]{d['nll']:.4f}[/bold] nats per masked value, gene-marginal baseline"
        f" {d['baseline_nll']:.4f}: {d['lead_nats']:+.4f} (95% {d['lead_ci95'][0]:+.4f} to"
        f" {d['lead_ci95'][1]:+.4f}); on the fitted cells {d['train_nll']:.4f}"
    )
    if d["lead_ci95"][0] <= 0:
        out.print(
            "the model is no better than the baseline: it knows nothing about a cell that a screen"
            " could find it losing"
        )
    out.print(
        f"step {d['best_step']} of {d['steps']} kept, {d['seconds']:.0f} s; checkpoint in"
        f" [bold]{escape(output)}[/bold]"
    )
