"""Sections on what falls with given weights of a model of gene expression: genes and their
difficulty, cells, types, pathways beside the null, heads and blocks, donors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ...cells import CellMap
from ...cells.stage import Embedding
from .cells import DAMAGE, HYPOTHESES, LISTED, types
from .charts import Row, bars, dots
from .picture import Cell, Headline, Picture, Table, many, model_name, nats


def map_headline(result: CellMap) -> Headline:
    model = model_name(result.provenance.model)
    return Headline(f"What {model} loses: genes, cells and pathways")


def map_pictures(result: CellMap) -> Iterator[Picture]:
    """What there is, in this order."""
    what = ", ".join(map(str, result.at))
    yield _genes(result, what)
    yield _difficulty(result)
    if result.embedding is not None:
        yield _embedding(result.embedding)
    if result.by_type:
        yield types(result.by_type, what)
    if result.enrichment:
        yield _pathways(result)
    if result.components:
        yield _components(result)
    if result.by_condition:
        yield _conditions(result)


def _genes(result: CellMap, what: str) -> Picture:
    worst = result.genes[:LISTED]
    return Picture(
        "Genes by damage",
        f"Without {what}: {nats(result.damage.nats)} nats per masked value, {worst[0].gene}"
        f" {nats(worst[0].nats)}",
        f"The {len(worst)} of {many(len(result.genes), 'scored gene')} that lose most."
        f" {result.note}",
        chart=bars([(g.gene, g.nats) for g in worst], DAMAGE, [nats(g.nats) for g in worst]),
        table=Table(
            ("gene", "damage, nats", "intact NLL", "residual damage", "values"),
            [(g.gene, g.nats, g.intact_nll, g.residual_nats, g.values) for g in worst],
            len(result.genes),
        ),
    )


def _difficulty(result: CellMap) -> Picture:
    null = result.null.difficulty_correlations
    beside = ""
    if null:
        beside = f" Arbitrary weights of equal damage: {min(null):+.2f} to {max(null):+.2f}."
    return Picture(
        "Damage and difficulty",
        f"Spearman correlation of damage with the intact NLL: {result.difficulty_correlation:+.2f}",
        "One dot a gene. Where they correlate, a ranking by damage is in part a ranking by how hard"
        f" a gene is for the intact model.{beside}",
        chart=dots(
            [{"x": g.intact_nll, "y": g.nats, "o": 0.6} for g in result.genes],
            "intact NLL, nats",
            "damage, nats",
        ),
        table=Table(
            ("gene", "intact NLL", "damage, nats"),
            [(g.gene, g.intact_nll, g.nats) for g in result.genes[:LISTED]],
            len(result.genes),
        ),
    )


def _embedding(embedding: Embedding) -> Picture:
    values = sorted(point.nats for point in embedding.points)
    low, high = values[len(values) // 20], values[-1 - len(values) // 20]
    span = (high - low) or 1.0
    rows: list[Row] = []
    for point in embedding.points:
        fullness = min(1.0, max(0.0, (point.nats - low) / span))
        rows.append({"x": point.x, "y": point.y, "o": 0.08 + 0.92 * fullness})
    name = embedding.name
    return Picture(
        "Cells by damage",
        f"Damage over {name}: from {nats(low)} to {nats(high)} nats (5% and 95% of cells)",
        "One dot a cell; the fuller its colour, the more it loses. Axes: the first two coordinates"
        f" of {name}.",
        chart=dots(rows, f"{name} 1", f"{name} 2"),
        table=Table(
            (f"{name} 1", f"{name} 2", "damage, nats"),
            [(point.x, point.y, point.nats) for point in embedding.points[:LISTED]],
            len(embedding.points),
        ),
    )


def _pathways(result: CellMap) -> Picture:
    raw, residual = result.enrichment["raw"], result.enrichment["residual"]
    after = {one.name: one for one in residual.pathways}
    rows: list[Sequence[Cell]] = []
    for one in raw.pathways:
        other = after[one.name]
        figures = [(p.nes, p.p, p.fdr, p.null_p) for p in (one, other)]
        rows.append((one.name, one.genes, *figures[0], *figures[1], one.over_p, other.over_p))
    beside = "No null was made, so none of these is a finding."
    counts, later = raw.null_sets_at_fdr_5, residual.null_sets_at_fdr_5
    if counts:
        beside = (
            f"Arbitrary weights of equal damage have {sum(counts) / len(counts):.1f} on average,"
            f" {max(counts)} at most, and {sum(later) / len(later):.1f} after residualising."
        )
    figures_of = ("p", "FDR", "p, equal damage")
    over = ("p, over-representation", "the same, residual")
    columns = ("gene set", "genes", "NES", *figures_of, "NES, residual", *figures_of, *over)
    return Picture(
        "Pathways beside the equal-damage null",
        f"{raw.sets_at_fdr_5} of {many(len(rows), 'gene set')} at an FDR of 5% by raw damage,"
        f" {residual.sets_at_fdr_5} by residual",
        "Prerank over the scored genes only. Residual: less what the intact NLL foretells."
        f" {beside} p, equal damage: how often such a weight gives the set at least this NES."
        f" {HYPOTHESES}",
        shown=Table(columns, rows[:LISTED], len(rows)),
    )


def _components(result: CellMap) -> Picture:
    ranked = [(one.name, one.nats) for one in result.components]
    worst = ranked[:LISTED]
    return Picture(
        "Heads and MLP blocks",
        f"{ranked[0][0]} matters most: {nats(ranked[0][1])} nats without it",
        "Each head's share of the output projection's input, or each block's write, set to zero.",
        chart=bars(worst, DAMAGE, [nats(value) for _, value in worst]),
        table=Table(
            ("component", "damage, nats", "95% from", "to"),
            [(one.name, one.nats, *one.ci95) for one in result.components],
        ),
    )


def _conditions(result: CellMap) -> Picture:
    test = result.donors
    headline = "Mean damage by condition, without a test"
    about = "Cells of one donor are not independent: a test needs donors."
    rows: list[Sequence[Cell]] = [(name, None, v) for name, v in result.by_condition.items()]
    if test is not None:
        rows = [(name, donor, v) for name, of in test.means.items() for donor, v in of.items()]
        headline = (
            f"{test.condition}: {test.measure} {nats(test.statistic)} nats, p = {test.p:.3g} over"
            " donors"
        )
        about = (
            f"Permutation of donors, {test.design}; with so few the least possible p is"
            f" {test.smallest_p:.2g}."
        )
    return Picture(
        "By condition",
        headline,
        f"{about} {HYPOTHESES}",
        shown=Table(("condition", "donor", "damage, nats"), rows),
    )
