"""`surgeon cells screen` and `surgeon cells map`: vital weights of a model of gene expression, and
what falls with them.
"""

from __future__ import annotations

from typing import Any

import click
from rich.markup import escape
from rich.table import Table

from ..cells.check import CheckConfig, check
from ..cells.donors import DonorTest
from ..cells.enrich import EnrichConfig, read_gmt
from ..cells.map import Groups, Map, MapConfig, map_damage
from ..cells.parts import part_of
from ..cells.planted import plant
from ..cells.screen import NOTE, Screen, ScreenConfig, screen, worst_candidate
from ..cells.stage import Stage, StageConfig, column, open_stage
from ..cells.write_back import write_back
from ..errors import BadInput
from ..show.console import out, print_table
from .common import (
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
    click.option(
        "--cells",
        default=StageConfig.cells,
        show_default=True,
        help="Most cells to measure on; held-out cells first.",
    ),
    click.option(
        "--genes",
        default=StageConfig.genes,
        show_default=True,
        help="Most genes of a cell, a random choice where it has more.",
    ),
    click.option(
        "--draws",
        default=StageConfig.draws,
        show_default=True,
        help="Draws of masks over the same tokenised cells.",
    ),
    click.option(
        "--ratio",
        default=StageConfig.ratio,
        show_default=True,
        help="Share of the values that a draw hides.",
    ),
    click.option(
        "--source",
        default="auto",
        show_default=True,
        help="Expression to read: auto (as trained on), X, raw or layer:NAME.",
    ),
    click.option(
        "--type",
        "type_column",
        metavar="COL",
        help="Column of obs that holds the cell type.  [default: the first known name]",
    ),
)


@click.command("screen")
@stage_options
@click.option(
    "--controls",
    default=ScreenConfig.controls,
    show_default=True,
    help="Matched controls of each verified candidate.",
)
@click.option(
    "--each",
    default=ScreenConfig.each,
    show_default=True,
    help="Candidates from every matrix and LayerNorm vector.",
)
@click.option(
    "--verify",
    default=ScreenConfig.verify,
    show_default=True,
    help="Candidates, the worst, held against controls.",
)
@click.option(
    "--min-share",
    default=ScreenConfig.min_share,
    show_default=True,
    help="Least collapse share of a finding.",
)
@click.option(
    "--controls-check",
    is_flag=True,
    help="Also screen a planted fragile weight and a rescaled neuron.",
)
@click.option(
    "--write-h5ad",
    metavar="F",
    help="Write a copy of DATA with the worst candidate's damage per cell and gene.",
)
@seed_option
@folder_option
@json_option
def screen_command(
    model: str,
    data: str,
    cells: int,
    genes: int,
    draws: int,
    ratio: float,
    source: str,
    type_column: str | None,
    controls: int,
    each: int,
    verify: int,
    min_share: float,
    controls_check: bool,
    write_h5ad: str | None,
    seed: int,
    folder: str | None,
    as_json: bool,
) -> None:
    """Is there a weight the model in the folder MODEL cannot live without, on the cells in DATA?
    "None found" is a result.
    """
    config = ScreenConfig(
        each=each, verify=verify, controls=controls, min_share=min_share, seed=seed
    )
    run = run_folder(folder)
    with progress() as tell:
        stage = open_stage(
            model, data, StageConfig(cells, genes, draws, ratio, seed), type_column, source
        )
        fixed = (stage.model, stage.batch, stage.masked, stage.baseline, stage.types)
        result = screen(*fixed, config, tell)
        checked = check(*fixed, CheckConfig(screen=config), tell) if controls_check else None
    document = {
        **stage.to_json(),
        **result.to_json(),
        "check": None if checked is None else checked.to_json(),
    }
    require_finite(intact_nll=result.intact_nll, baseline_nll=result.baseline_nll)
    if write_h5ad is not None:
        worst = max(result.verified, key=lambda v: v.nats)
        write_back(
            stage.adata, write_h5ad, {"damage": worst.by_gene}, {"damage": worst.by_cell}, document
        )
    deliver(
        "cells-screen",
        document,
        lambda: print_screen(model, result, document["check"]),
        as_json,
        run,
    )


def print_screen(model: str, result: Screen, checked: dict[str, Any] | None) -> None:
    """The verdict with its controls, in a few lines."""
    c = result.cells
    out.print(
        f"[bold]{escape(model)}[/bold]: NLL {result.intact_nll:.3f}, gene-marginal baseline"
        f" {result.baseline_nll:.3f} nats per masked value ({result.values} values of {c['judge']}"
        f" cells, {result.draws} draws)"
    )
    out.print(
        f"{len(result.pruned)} candidates by |w·x| were pruned on {c['probe']} other cells; the"
        " worst, held against controls:"
    )
    for v in result.verified:
        share = "no lead" if v.collapse_share is None else f"{v.collapse_share:.1%} of the lead"
        where, (low, high) = escape(", ".join(v.addresses)), v.ci95
        out.print(
            f"  [bold]{where}[/bold]  {v.nats:+.4f} nats, {share}  (95% {low:+.4f} to {high:+.4f})"
        )
        out.print(
            f"    controls  {max(v.controls):+.4f} worst of {len(v.controls)} ({v.control_kind}), p"
            f" = {v.p_value:.3f}"
        )
        for name, score in v.probe.items():
            intact = result.probe
            out.print(
                f"    cell types, {name} probe  accuracy {score.accuracy:.3f} (intact"
                f" {intact['accuracy']:.3f}), macro-F1 {score.macro_f1:.3f} (intact"
                f" {intact['macro_f1']:.3f})"
            )
    if result.verdict == "none":
        out.print(f"[bold]none found[/bold] ({result.criteria})")
    else:
        found = "; ".join(", ".join(v.addresses) for v in result.found)
        out.print(f"[bold]found[/bold]: {escape(found)} ({result.criteria})")
    if checked is not None:
        planted, rescaled = checked["planted"], checked["rescaled"]
        out.print(
            f"planted weight {escape(planted['address'])}, {planted['nats']:+.3f} nats:"
            f" {'found' if planted['found'] else 'NOT found'}; neuron x {rescaled['factor']:g}:"
            f" {'FOUND' if rescaled['found'] else 'not found'}"
        )
    out.print(NOTE)


@click.command("map")
@stage_options
@click.option(
    "--at",
    "at",
    multiple=True,
    metavar="WEIGHT",
    help="Weights to take out together.  [default: the screen's worst candidate]",
)
@click.option(
    "--plant",
    "planted",
    is_flag=True,
    help="Plant a fragile weight of +0.25 nats in a copy of the model and map that.",
)
@click.option(
    "--gmt", metavar="FILE", help="Gene sets to test: name, description, genes, tab-separated."
)
@click.option(
    "--min-size",
    default=EnrichConfig.min_size,
    show_default=True,
    help="Least scored genes in a gene set.",
)
@click.option(
    "--null",
    "null",
    default=MapConfig.null,
    show_default=True,
    help="Arbitrary weights of equal damage; 0 for none.",
)
@click.option(
    "--condition", metavar="COL", help="Column of obs with the condition or disease stage."
)
@click.option(
    "--donor",
    metavar="COL",
    help="Column of obs with the donor; donors are the replicates of --condition.",
)
@click.option(
    "--write-h5ad", metavar="F", help="Write a copy of DATA with the damage per gene and cell."
)
@seed_option
@folder_option
@json_option
def map_command(
    model: str,
    data: str,
    cells: int,
    genes: int,
    draws: int,
    ratio: float,
    source: str,
    type_column: str | None,
    at: tuple[str, ...],
    planted: bool,
    gmt: str | None,
    min_size: int,
    null: int,
    condition: str | None,
    donor: str | None,
    write_h5ad: str | None,
    seed: int,
    folder: str | None,
    as_json: bool,
) -> None:
    """Which genes, cells, cell types and pathways fall with given weights, beside arbitrary weights
    of equal damage.
    """
    if donor is not None and condition is None:
        raise BadInput(
            "--donor names the replicates of a comparison; name what is compared with --condition"
            " COL."
        )
    if planted and at:
        raise BadInput("--plant maps the planted weight and --at others; give one of them.")
    config = MapConfig(null=null, enrich=EnrichConfig(min_size=min_size, seed=seed), seed=seed)
    sets = None if gmt is None else read_gmt(gmt)
    run = run_folder(folder)
    with progress() as tell:
        stage = open_stage(
            model, data, StageConfig(cells, genes, draws, ratio, seed), type_column, source
        )
        groups = _groups(stage, condition, donor)
        network, extra = stage.model, {}
        if planted:
            made = plant(network, stage.batch, stage.masked, seed=seed)
            network, parts, extra = made.model, [made.part], {"planted": made.to_json()}
        elif at:
            parts = [part_of(network, text) for text in at]
        else:
            parts = [worst_candidate(network, stage.batch, stage.masked, progress=tell)]
        result = map_damage(
            network, stage.batch, stage.masked, parts, sets, stage.types, groups, config, tell
        )
    document = {
        **stage.to_json(),
        **result.to_json(),
        **extra,
        "embedding": stage.embedding(result.cells),
    }
    require_finite(damage=result.nats, intact_nll=result.intact_nll)
    if write_h5ad is not None:
        per_gene = {
            "damage": {g[0]: g[1] for g in result.genes},
            "nll": {g[0]: g[2] for g in result.genes},
            "residual_damage": {g[0]: g[3] for g in result.genes},
        }
        write_back(
            stage.adata,
            write_h5ad,
            per_gene,
            {"damage": result.cells, "nll": result.cell_nll},
            document,
        )
    deliver("cells-map", document, lambda: print_map(model, result), as_json, run)


def _groups(stage: Stage, condition: str | None, donor: str | None) -> Groups | None:
    if condition is None:
        return None
    donors = None if donor is None else column(stage.adata, donor, stage.batch.cell_names)
    return Groups(condition, column(stage.adata, condition, stage.batch.cell_names), donor, donors)


def print_map(model: str, result: Map) -> None:
    """Genes, types, pathways and components, the first of each."""
    out.print(
        f"[bold]{escape(model)}[/bold] without {escape(', '.join(result.addresses))}:"
        f" [bold]{result.nats:+.4f} nats[/bold] per masked value (95% {result.ci95[0]:+.4f} to"
        f" {result.ci95[1]:+.4f})"
    )
    worst = ", ".join(f"{name} {nats:+.3f}" for name, nats, *_ in result.genes[:8])
    out.print(
        f"genes ({len(result.genes)} scored): {escape(worst)}; correlation with intact NLL"
        f" {result.difficulty_correlation:+.2f}"
    )
    if result.by_type:
        ranked = sorted(result.by_type.items(), key=lambda item: -item[1])
        out.print(
            "cell types: " + escape(", ".join(f"{name} {nats:+.3f}" for name, nats in ranked))
        )
    if result.stories:
        _print_pathways(result)
    if result.components:
        out.print(
            "heads and blocks: "
            + ", ".join(f"{c.name} {c.nats:+.3f}" for c in result.components[:8])
        )
    for name, nats in result.by_condition.items():
        out.print(f"condition {escape(name)}: {nats:+.4f} nats")
    if result.donors is not None:
        _print_donors(result.donors)
    out.print(NOTE)


def _print_pathways(result: Map) -> None:
    table = Table(
        "gene set",
        "genes",
        "NES",
        "p",
        "FDR",
        "p equal damage",
        "residual NES",
        "p",
        "FDR",
        "p equal damage",
        box=None,
    )
    after = {e.pathway.name: e for e in result.stories["residual"].pathways}
    for e in result.stories["raw"].pathways[:12]:
        row = [escape(e.pathway.name), str(e.pathway.genes)]
        for one in (e, after[e.pathway.name]):
            p = one.pathway
            row += [
                f"{p.nes:+.2f}",
                f"{p.p:.3f}",
                f"{p.fdr:.3f}",
                "-" if one.null_p is None else f"{one.null_p:.3f}",
            ]
        table.add_row(*row)
    print_table(table)
    for name, story in result.stories.items():
        null = story.null_sets
        beside = (
            f"arbitrary weights of equal damage: {sum(null) / len(null):.1f} on average,"
            f" {max(null)} at most"
            if null
            else "no null"
        )
        out.print(
            f"{name} damage: {story.sets} of {len(story.pathways)} gene sets at an FDR of 5%"
            f" ({beside})"
        )


def _print_donors(test: DonorTest) -> None:
    n = sum(map(len, test.means.values()))
    out.print(
        f"{escape(test.condition)}, {test.design}, over {n} donors' means: {test.statistic:+.4f}"
        f" nats, p = {test.p:.3g} (least possible {test.smallest_p:.2g})"
    )
