"""`surgeon cells`: models of gene expression. Here the group, training, data as text, Geneformer;
the screen and the map are in cells_screen.py.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.markup import escape

from ..cells import TrainConfig, expression, read_cells, save_cells, train
from ..cells.checkpoint import require_free
from ..cells.data import EXAMPLE, cell_sentences
from ..cells.geneformer import read_dictionary
from ..cells.train import PRESETS
from ..errors import BadInput
from ..show.console import out
from ..studies.geneformer import GeneformerConfig, geneformer
from .cells_options import changed, configured, settings
from .cells_screen import map_command, screen_command
from .common import (
    _write,
    json_option,
    model_options,
    open_model,
    options,
    print_json,
    progress,
    regions,
    require_finite,
    run_folder,
    seed_option,
)

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
@click.option("--overwrite", is_flag=True, help="Replace a model that is there already.")
@click.option(
    "--preset",
    default="pbmc68k",
    show_default=True,
    type=click.Choice(sorted(PRESETS)),
    help="Settings tried on a data set.",
)
@settings(TrainConfig, "steps", "layers", "d_model", "genes", "max_genes", "lr")
@seed_option
@json_option
def train_command(
    data: str,
    raw: bool,
    layer: str | None,
    output: str,
    overwrite: bool,
    preset: str,
    as_json: bool,
    **given: Any,
) -> None:
    """Train a small scGPT on DATA, on a CPU in minutes, with cells held out and a gene-marginal
    baseline beside it.
    """
    config = changed(PRESETS[preset], given)
    if not overwrite:
        require_free(output)
    values = expression(read_cells(data), _source(data, raw, layer))
    folder = run_folder(output)
    assert folder is not None
    with progress() as tell:
        trained = train(values, config, tell)
    d = trained.to_json()
    require_finite(**{"the model's NLL": d["nll"], "the baseline's NLL": d["baseline_nll"]})
    save_cells(
        folder, trained.model, trained.vocab, trained.tokens, trained.marginal, trained.record()
    )
    if as_json:
        print_json({"data": Path(data).name, "kind": values.kind, **d, "output": output})
        return
    cells, (low, high) = d["cells"], d["lead_ci95"]
    out.print(
        f"[bold]{escape(data)}[/bold] ({escape(d['source'])}): {cells['train']} cells fitted,"
        f" {cells['validation']} to stop by, {cells['test']} to judge; {d['genes']} genes,"
        f" {d['parameters']} parameters"
    )
    out.print(
        f"NLL [bold]{d['nll']:.4f}[/bold] nats per masked value, gene-marginal baseline"
        f" {d['baseline_nll']:.4f}: {d['lead_nats']:+.4f} (95% {low:+.4f} to {high:+.4f}); on the"
        f" fitted cells {d['train_nll']:.4f}"
    )
    if low <= 0:
        out.print(
            "the model is no better than the baseline: it knows nothing about a cell that a screen"
            " could find it losing"
        )
    out.print(
        f"step {d['best_step']} of {d['steps']} kept, {d['seconds']:.0f} s; checkpoint in"
        f" [bold]{escape(output)}[/bold]"
    )


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
    text = "\n".join(lines) + "\n"
    try:
        _write(Path(output), lambda part: part.write_text(text, encoding="utf-8"))
    except OSError as error:
        raise BadInput(
            f"{output} cannot be written: {error.strerror}; choose another place."
        ) from error
    if as_json:
        made = {"data": Path(data).name, "source": values.source, "cells": len(lines)}
        print_json({**made, "genes": genes, "output": output})
    else:
        out.print(
            f"{len(lines)} cells of up to {genes} genes, from {escape(values.source)}, in"
            f" [bold]{escape(output)}[/bold]"
        )


@command.command("geneformer")
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
    multiple=True,
    metavar="ENTRY",
    help="Weights to zero.  [default: the worst of each layer's largest |w·x|]",
)
@settings(GeneformerConfig, "cells", "length", "draws", "ratio")
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
    as_json: bool,
    **given: Any,
) -> None:
    """Zero weights of the Geneformer in MODEL and measure its masked likelihood on the cells in
    DATA (counts, Ensembl ids).
    """
    known, scale = read_dictionary(tokens), None if medians is None else read_dictionary(medians)
    values = expression(read_cells(data))
    config = configured(GeneformerConfig, given)
    loaded, anatomy = open_model(model, dtype, device)
    parts = regions(anatomy, at)
    with progress() as tell:
        result = geneformer(anatomy, values, known, scale, parts, config, tell)
    require_finite(base_nll=result.base_nll, damage=result.joint_nats)
    if as_json:
        print_json({"model": model, "fingerprint": loaded.fingerprint, **asdict(result)})
        return
    (low, high), controls = result.ci95, result.controls
    out.print(
        f"[bold]{escape(model)}[/bold]: {result.base_nll:.4f} nats per masked gene"
        f" ({result.masked_genes} of {result.cells} cells)"
    )
    out.print(
        f"without {escape(', '.join(result.at))}: [bold]{result.joint_nats:+.4f}[/bold] (95%"
        f" {low:+.4f} to {high:+.4f})"
    )
    out.print(
        f"controls {controls['max_nats']:+.4f} worst of {controls['n']}, p = {result.p_value:.3f}:"
        f" {'vital' if result.vital else 'not vital'}"
    )


command.add_command(screen_command)
command.add_command(map_command)


def _source(data: str, raw: bool, layer: str | None) -> str:
    if raw and layer is not None:
        raise click.UsageError("give either --raw or --layer.")
    if layer is not None:
        return f"layer:{layer}"
    # the X of the example is scaled
    return "raw" if raw or data == EXAMPLE else "auto"
