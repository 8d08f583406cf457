"""`surgeon cells screen` and `surgeon cells map`: vital weights of a model of gene expression, and
what falls with them.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import click
from rich.markup import escape
from rich.table import Table

from ..cells.data import write_back
from ..cells.donors import DonorTest
from ..cells.map import Map
from ..cells.stage import StageConfig, open_stage
from ..settings import values_of
from ..show.console import out, print_table
from ..studies.cells import MapCellsConfig, Screen, ScreenConfig, map_cells, screen
from .cells_options import configured, settings
from .common import (
    command_line,
    deliver,
    folder_option,
    json_option,
    options,
    progress,
    require_finite,
    run_folder,
    seed_option,
)

stage_options = options(
    click.argument("model"),
    click.argument("data"),
    settings(StageConfig, "cells", "genes", "draws", "ratio", "source", "type"),
    click.option(
        "--write-h5ad", metavar="F", help="Write a copy of DATA with the damage per gene and cell."
    ),
    seed_option,
    folder_option,
    json_option,
)


@click.command("screen")
@stage_options
@settings(ScreenConfig, "controls", "each", "verify", "min_share", "controls_check")
def screen_command(
    model: str, data: str, write_h5ad: str | None, folder: str | None, as_json: bool, **given: Any
) -> None:
    """Is there a weight the model in the folder MODEL cannot live without, on the cells in DATA?
    "None found" is a result.
    """
    config, run = configured(ScreenConfig, given), run_folder(folder)
    with progress() as tell:
        stage = open_stage(model, data, configured(StageConfig, given))
        fixed = (stage.model, stage.batch, stage.masked, stage.baseline, stage.types)
        result = screen(*fixed, config, tell)
    result = result.made(
        model=model,
        fingerprint=stage.about["fingerprint"],
        settings=values_of(config),
        seed=config.seed,
        surgeon=version("weight-surgeon"),
        command=command_line(),
    )
    document = {**stage.about, **result.to_json()}
    require_finite(intact_nll=result.intact_nll, baseline_nll=result.baseline_nll)
    if write_h5ad is not None:
        per_gene, per_cell = {"damage": result.worst.by_gene}, {"damage": result.worst.by_cell}
        write_back(stage.adata, write_h5ad, per_gene, per_cell, document)
    deliver("cells-screen", document, lambda: print_screen(model, result), as_json, run)


def print_screen(model: str, result: Screen) -> None:
    """The verdict with its controls, in a few lines."""
    out.print(
        f"[bold]{escape(model)}[/bold]: NLL {result.intact_nll:.3f}, gene-marginal baseline"
        f" {result.baseline_nll:.3f} nats per masked value ({result.masked_values} values of"
        f" {result.cells['judge']} cells, {result.draws} draws)"
    )
    out.print(
        f"{len(result.candidates)} candidates by |w·x| were pruned on {result.cells['probe']} other"
        " cells; the worst, held against controls:"
    )
    intact = result.probe
    for v in result.verified:
        share = "no lead" if v.collapse_share is None else f"{v.collapse_share:.1%} of the lead"
        where, (low, high) = escape(", ".join(v.addresses)), v.ci95
        out.print(
            f"  [bold]{where}[/bold]  {v.nats:+.4f} nats, {share}  (95% {low:+.4f} to {high:+.4f})"
        )
        out.print(
            f"    controls  {v.controls['max_nats']:+.4f} worst of {v.controls['n']}"
            f" ({v.controls['kind']}), p = {v.p_value:.3f}"
        )
        for name, score in v.probe.items():
            out.print(
                f"    cell types, {name} probe  accuracy {score.accuracy:.3f} (intact"
                f" {intact['accuracy']:.3f}), macro-F1 {score.macro_f1:.3f} (intact"
                f" {intact['macro_f1']:.3f})"
            )
    found = "; ".join(", ".join(v.addresses) for v in result.verified if v.found)
    verdict = "[bold]found[/bold]: " + escape(found) if found else "[bold]none found[/bold]"
    out.print(f"{verdict} ({result.criteria})")
    if result.check is not None:
        planted, rescaled = result.check.planted, result.check.rescaled
        out.print(
            f"planted weight {escape(planted['address'])}, {planted['nats']:+.3f} nats:"
            f" {'found' if planted['found'] else 'NOT found'}; neuron x {rescaled['factor']:g}:"
            f" {'FOUND' if rescaled['found'] else 'not found'}"
        )
    out.print(result.note)


@click.command("map")
@stage_options
@settings(MapCellsConfig, "at", "plant", "gmt", "min_size", "null", "condition", "donor")
def map_command(
    model: str, data: str, write_h5ad: str | None, folder: str | None, as_json: bool, **given: Any
) -> None:
    """Which genes, cells, cell types and pathways fall with given weights, beside arbitrary weights
    of equal damage.
    """
    config, run = configured(MapCellsConfig, given), run_folder(folder)
    with progress() as tell:
        stage = open_stage(model, data, configured(StageConfig, given))
        result = map_cells(stage, config, tell)
    result = result.made(
        model=model,
        fingerprint=stage.about["fingerprint"],
        settings=values_of(config),
        seed=config.seed,
        surgeon=version("weight-surgeon"),
        command=command_line(),
    )
    document = {**stage.about, **result.to_json()}
    require_finite(damage=result.damage.nats, intact_nll=result.intact_nll)
    if write_h5ad is not None:
        columns = {"damage": "nats", "nll": "intact_nll", "residual_damage": "residual_nats"}
        per_gene = {
            column: {gene.gene: getattr(gene, name) for gene in result.genes}
            for column, name in columns.items()
        }
        per_cell = {"damage": result.by_cell, "nll": result.cell_nll}
        write_back(stage.adata, write_h5ad, per_gene, per_cell, document)
    deliver("cells-map", document, lambda: print_map(model, result), as_json, run)


def print_map(model: str, result: Map) -> None:
    """Genes, types, pathways and components, the first of each."""
    nats, (low, high) = result.damage.nats, result.damage.ci95
    out.print(
        f"[bold]{escape(model)}[/bold] without {escape(', '.join(result.at))}:"
        f" [bold]{nats:+.4f} nats[/bold] per masked value (95% {low:+.4f} to {high:+.4f})"
    )
    genes = _ranked([(g.gene, g.nats) for g in result.genes[:8]])
    out.print(
        f"genes ({len(result.genes)} scored): {genes}; correlation with intact NLL"
        f" {result.difficulty_correlation:+.2f}"
    )
    if result.by_type:
        types = sorted(result.by_type.items(), key=lambda item: -item[1])
        out.print(f"cell types: {_ranked(types)}")
    if result.enrichment:
        _print_pathways(result)
    if result.components:
        out.print(f"heads and blocks: {_ranked([(c.name, c.nats) for c in result.components[:8]])}")
    for name, nats in result.by_condition.items():
        out.print(f"condition {escape(name)}: {nats:+.4f} nats")
    if result.donors is not None:
        _print_donors(result.donors)
    out.print(result.note)


def _ranked(pairs: list[tuple[str, float]]) -> str:
    return escape(", ".join(f"{name} {nats:+.3f}" for name, nats in pairs))


def _print_pathways(result: Map) -> None:
    columns = ("NES", "p", "FDR", "p equal damage")
    residual = (f"residual {columns[0]}", *columns[1:])
    table = Table("gene set", "genes", *columns, *residual, box=None)
    after = {p.name: p for p in result.enrichment["residual"].pathways}
    for raw in result.enrichment["raw"].pathways[:12]:
        row = [escape(raw.name), str(raw.genes)]
        for p in (raw, after[raw.name]):
            null = "-" if p.null_p is None else f"{p.null_p:.3f}"
            row += [f"{p.nes:+.2f}", f"{p.p:.3f}", f"{p.fdr:.3f}", null]
        table.add_row(*row)
    print_table(table)
    for name, story in result.enrichment.items():
        null_sets, beside = story.null_sets_at_fdr_5, "no null"
        if null_sets:
            beside = (
                "arbitrary weights of equal damage:"
                f" {sum(null_sets) / len(null_sets):.1f} on average, {max(null_sets)} at most"
            )
        out.print(
            f"{name} damage: {story.sets_at_fdr_5} of {len(story.pathways)} gene sets at an FDR of"
            f" 5% ({beside})"
        )


def _print_donors(test: DonorTest) -> None:
    n = sum(map(len, test.means.values()))
    out.print(
        f"{escape(test.condition)}, {test.design}, over {n} donors' means: {test.measure}"
        f" {test.statistic:+.4f} nats, p = {test.p:.3g} (least possible {test.smallest_p:.2g})"
    )
