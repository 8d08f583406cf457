"""What was learned of models of gene expression, as text."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

from rich.table import Table

from ...cells import CellMap, CellTraining
from ...cells.donors import DonorTest
from ...cells.map import Story
from ...studies.cells_geneformer import GeneformerDamage
from ...studies.cells_screen import CellScreen, Check, Verified
from ...studies.cells_sentences import CellSentences
from ..console import out, print_table, shown
from .critical import controls_shown, model_shown, print_verdict

LISTED = 8
MOST_SETS = 12


def print_train(result: CellTraining) -> None:
    """The cells, the figures beside the baseline, and where the checkpoint lies."""
    cells, (low, high) = result.cells, result.lead_ci95
    out.print(
        f"{cells['train']} cells fitted, {cells['validation']} to stop by, {cells['test']} to judge"
        f" ({shown(result.source)}); {result.genes} genes, {result.parameters} parameters"
    )
    out.print(
        f"NLL [bold]{result.nll:.4f}[/bold] nats per masked value, gene-marginal baseline"
        f" {result.baseline_nll:.4f}: {result.lead_nats:+.4f} (95% {low:+.4f} to {high:+.4f}); on"
        f" the fitted cells {result.train_nll:.4f}"
    )
    if low <= 0:
        out.print(
            "The model is no better than the baseline: it knows nothing about a cell that a screen"
            " could find it losing."
        )
    out.print(
        f"Step {result.best_step} of {result.steps} is kept, after {result.seconds:.0f} s:"
        f" [bold]{shown(result.output)}[/bold]"
    )


def print_sentences(result: CellSentences) -> None:
    """How many cells, and where they are."""
    out.print(
        f"{result.cells} cells of up to {result.genes} genes ({shown(result.source)}):"
        f" [bold]{shown(result.output)}[/bold]"
    )


def print_screen(result: CellScreen) -> None:
    """The worst candidates beside their controls, and the verdict."""
    out.print(
        f"{model_shown(result.provenance)}: NLL {result.intact_nll:.3f} nats per masked value,"
        f" gene-marginal baseline {result.baseline_nll:.3f} ({result.masked_values} values of"
        f" {result.cells['judge']} cells, {result.draws} draws)"
    )
    out.print(
        f"{len(result.candidates)} candidates by |w·x| were pruned on {result.cells['probe']} other"
        " cells; the worst, held against controls:"
    )
    for one in result.verified:
        _print_verified(one, result)
    found = "; ".join(one.name for one in result.verified if one.found)
    said = f"found: {shown(found)}" if found else "none found"
    out.print(f"Verdict: [bold]{said}[/bold]. The rule: {shown(result.criteria)}.")
    if result.check is not None:
        _print_check(result.check)
    out.print(shown(result.note))


def _print_verified(one: Verified, result: CellScreen) -> None:
    share = "" if one.collapse_share is None else f", {one.collapse_share:.1%} of the lead"
    out.print(f"  [bold]{shown(one.name)}[/bold]  {_damage(one.nats, one.ci95)}{share}")
    out.print(f"    controls  {controls_shown(one.controls)}, p = {one.p_value:.3f}")
    if result.probe is None:
        return
    for name, score in one.probe.items():
        out.print(
            f"    cell types, {shown(name)} probe  accuracy {score.accuracy:.3f} (intact"
            f" {result.probe.accuracy:.3f}), macro-F1 {score.macro_f1:.3f} (intact"
            f" {result.probe.macro_f1:.3f})"
        )


def _print_check(check: Check) -> None:
    planted, rescaled = check.planted, check.rescaled
    out.print(
        f"The screen's own controls: the planted weight {shown(str(planted.address))},"
        f" {planted.nats:+.3f} nats, was {'' if planted.found else 'NOT '}found; a weight of the"
        f" neuron x {rescaled.factor:g} was {'FOUND' if rescaled.found else 'not found'}."
    )


def print_map(result: CellMap) -> None:
    """Genes, types, pathways and components, the first of each."""
    without = ", ".join(map(str, result.at))
    out.print(
        f"{model_shown(result.provenance)} without {shown(without)}:"
        f" {_damage(result.damage.nats, result.damage.ci95)} per masked value"
    )
    if result.planted is not None:
        out.print(
            "The weight was planted in a copy of the model, whose states differ from the model's by"
            f" at most {result.planted.max_abs_difference:.1g}."
        )
    genes = _ranked((gene.gene, gene.nats) for gene in result.genes)
    out.print(
        f"genes ({len(result.genes)} scored): {genes}; correlation with intact NLL"
        f" {result.difficulty_correlation:+.2f}"
    )
    if result.by_type:
        types = sorted(result.by_type.items(), key=lambda item: -item[1])
        out.print(f"cell types: {_ranked(types)}")
    if result.enrichment:
        _print_pathways(result.enrichment)
    if result.components:
        out.print(f"heads and blocks: {_ranked((c.name, c.nats) for c in result.components)}")
    for name, nats in result.by_condition.items():
        out.print(f"condition {shown(name)}: {nats:+.4f} nats")
    if result.donors is not None:
        _print_donors(result.donors)
    out.print(shown(result.note))


def _ranked(pairs: Iterable[tuple[str, float]]) -> str:
    return shown(", ".join(f"{name} {nats:+.3f}" for name, nats in islice(pairs, LISTED)))


def _print_pathways(enrichment: dict[str, Story]) -> None:
    columns = ("NES", "p", "FDR", "p equal damage")
    table = Table("gene set", "genes", *columns, "residual NES", *columns[1:], box=None)
    after = {one.name: one for one in enrichment["residual"].pathways}
    for raw in enrichment["raw"].pathways[:MOST_SETS]:
        row = [shown(raw.name), str(raw.genes)]
        for one in (raw, after[raw.name]):
            null = "-" if one.null_p is None else f"{one.null_p:.3f}"
            row += [f"{one.nes:+.2f}", f"{one.p:.3f}", f"{one.fdr:.3f}", null]
        table.add_row(*row)
    print_table(table)
    for name, story in enrichment.items():
        others = story.null_sets_at_fdr_5
        beside = "no null was made"
        if others:
            beside = (
                f"arbitrary weights of equal damage: {sum(others) / len(others):.1f} on average,"
                f" {max(others)} at most"
            )
        out.print(
            f"{shown(name)} damage: {story.sets_at_fdr_5} of {len(story.pathways)} gene sets at an"
            f" FDR of 5% ({beside})"
        )


def _print_donors(test: DonorTest) -> None:
    n = sum(map(len, test.means.values()))
    out.print(
        f"{shown(test.condition)}, {test.design}, over {n} donors' means: {shown(test.measure)}"
        f" {test.statistic:+.4f} nats, p = {test.p:.3g} (least possible {test.smallest_p:.2g})"
    )


def print_geneformer(result: GeneformerDamage) -> None:
    """The damage beside its controls, and the verdict."""
    out.print(
        f"{model_shown(result.provenance)}: NLL {result.base_nll:.4f} nats per masked gene"
        f" ({result.tokens} of {result.cells} cells)"
    )
    without = ", ".join(map(str, result.at))
    out.print(f"without {shown(without)}: {_damage(result.joint_nats, result.ci95)}")
    out.print(f"controls {controls_shown(result.controls)}, p = {result.p_value:.3f}")
    print_verdict(result.vital, result.criteria)


def _damage(nats: float, ci95: tuple[float, float]) -> str:
    return f"[bold]{nats:+.4f} nats[/bold] (95% {ci95[0]:+.4f} to {ci95[1]:+.4f})"
