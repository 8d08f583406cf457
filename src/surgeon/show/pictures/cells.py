"""Sections on single cells: the screen beside its controls, and the map of what falls: genes,
cells, types, pathways, heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import altair as alt

from ...cells.map import Map
from ...studies.cells import Screen
from .charts import COLOURS, GRID, INK, MUTED, Chart, Layers, Row, draw, strip
from .picture import Cell, Headline, Picture, Table, many, model_name, nats, percent

LISTED = 20
HYPOTHESES = "Hypotheses about the model, not biomarkers."


def screen_pictures(result: Screen) -> Iterator[Picture]:
    """The verdict with its controls, what was pruned, cell types, the probe, and the screen's own
    controls.
    """
    d = result.to_json()
    judged = [c for c in d["candidates"] if c["verified"]]
    rows = [(c["address"], c["verified"]) for c in judged] + (
        [("all of these together", d["together"])] if d["together"] else []
    )
    yield Picture(
        "The screen",
        _verdict(d),
        f"Damage in nats per masked value, on {many(d['cells']['judge'], 'cell')} that chose no"
        f" candidate, {many(d['draws'], 'draw')} of masks. {d['criteria'].capitalize()}. The lead"
        f" over the gene-marginal baseline is {nats(d['lead_nats'])} nats. {HYPOTHESES}",
        chart=_beside_controls(rows),
        table=Table(
            (
                "",
                "damage, nats",
                "95% from",
                "to",
                "collapse share",
                "worst control",
                "median control",
                "p",
                "verdict",
            ),
            [
                (
                    name,
                    v["nats"],
                    v["ci95"][0],
                    v["ci95"][1],
                    _share(v["collapse_share"]),
                    v["controls"]["max_nats"],
                    v["controls"]["median_nats"],
                    v["p_value"],
                    "found" if v["found"] else "not found",
                )
                for name, v in rows
            ],
        ),
    )
    columns = ("candidate", "kind", "weight", "largest |w·x|", "height", "damage alone, nats")
    pruned = [
        (c["address"], c["kind"], c["weight"], c["write"], c["height"], c["probe_nats"])
        for c in d["candidates"]
    ]
    yield Picture(
        "Candidates pruned one by one",
        f"{many(len(pruned), 'candidate')}: the worst alone costs {nats(pruned[0][-1])} nats",
        "On the probe cells, one draw. Height: |w·x| over the root mean square of its matrix or"
        " vector. mlp: an entry of an MLP's output matrix; scale, shift: of a LayerNorm.",
        shown=Table(columns, pruned[:LISTED], len(pruned)),
    )
    worst = max(judged, key=lambda c: c["verified"]["nats"])
    if worst["verified"]["by_type"]:
        yield _types(worst["verified"]["by_type"], worst["address"])
    if d["probe"]:
        probes = [("intact", d["probe"]["accuracy"], d["probe"]["macro_f1"], None, None)]
        for name, v in rows:
            frozen, again = v["probe"]["frozen"], v["probe"]["refitted"]
            probes.append(
                (name, frozen["accuracy"], frozen["macro_f1"], again["accuracy"], again["macro_f1"])
            )
        yield Picture(
            "Cell types from the embeddings",
            f"A probe names {percent(d['probe']['accuracy'])} of the cell types from intact"
            " embeddings",
            "Logistic regression, tested on half of the cells; always the commonest type:"
            f" {percent(d['probe']['majority'])}. Frozen: fitted on the intact model. Refitted: on"
            " the broken one, which asks whether the type is still there.",
            shown=Table(
                ("", "frozen accuracy", "macro-F1", "refitted accuracy", "macro-F1"), probes
            ),
        )
    if d.get("check"):
        yield _check(d["check"])


def screen_headline(result: Screen) -> Headline:
    model = model_name(result.provenance.model)
    return Headline(f"Is there a weight that {model} cannot live without?")


def map_headline(result: Map) -> Headline:
    model = model_name(result.provenance.model)
    return Headline(f"What {model} loses: genes, cells and pathways")


def _verdict(d: dict[str, Any]) -> str:
    best = max((c for c in d["candidates"] if c["verified"]), key=lambda c: c["verified"]["nats"])
    v = best["verified"]
    said = (
        f"{best['address']} costs {nats(v['nats'])} nats without it, {_share(v['collapse_share'])}"
        " of the model's lead"
    )
    worst = f"matched controls: {nats(v['controls']['max_nats'])} at worst"
    if d["verdict"] == "none":
        return (
            f"None found among {many(len(d['candidates']), 'candidate')}: the worst, {said}"
            f" ({worst})"
        )
    return (
        f"Found: {said} ({worst})"
        if v["found"]
        else f"Found, together: the worst alone, {said} ({worst})"
    )


def _share(share: float | None) -> str:
    return "no share (the model has no lead)" if share is None else percent(share)


def _beside_controls(rows: Sequence[tuple[str, dict[str, Any]]]) -> Chart:
    dots: list[Row] = []
    for name, v in rows:
        dots += [
            {"row": name, "x": x, "colour": "control", "says": ""} for x in v["controls"]["nats"]
        ]
        dots.append(
            {
                "row": name,
                "x": v["nats"],
                "colour": "broken",
                "says": nats(v["nats"]),
                "low": v["ci95"][0],
                "high": v["ci95"][1],
            }
        )
    return strip(dots, [name for name, _ in rows], "damage, nats per masked value")


def _types(by_type: dict[str, float], what: str) -> Picture:
    ranked = sorted(by_type.items(), key=lambda item: -item[1])
    return Picture(
        "Damage by cell type",
        f"{what}: {ranked[0][0]} loses most, {nats(ranked[0][1])} nats; {ranked[-1][0]} least,"
        f" {nats(ranked[-1][1])}",
        f"Mean over the cells of each type, in nats per masked value. {HYPOTHESES}",
        chart=bars(ranked, "damage, nats per masked value"),
        table=Table(("cell type", "damage, nats"), ranked),
    )


def _check(check: dict[str, Any]) -> Picture:
    planted, rescaled = check["planted"], check["rescaled"]
    rows: list[Sequence[Cell]] = [
        (
            "planted fragile weight",
            "found",
            "found" if planted["found"] else "not found",
            planted["nats"],
            planted["max_abs_difference"],
        ),
        (
            "neuron × 1000",
            "not found",
            "found" if rescaled["found"] else "not found",
            rescaled["nats"],
            rescaled["max_abs_difference"],
        ),
    ]
    passed = planted["found"] and not rescaled["found"]
    return Picture(
        "The screen's own controls",
        f"The planted weight was {rows[0][2]}, the rescaled neuron {rows[1][2]}: "
        + ("as it must be" if passed else "the screen fails here"),
        "Both are copies that compute the same as the model. Difference: the largest absolute"
        " difference between states of the model and of the copy.",
        shown=Table(("control", "must be", "was", "damage, nats", "difference"), rows),
    )


def map_pictures(result: Map) -> Iterator[Picture]:
    """Genes, their difficulty, cells on the embedding, types, pathways beside the null, heads and
    blocks, donors.
    """
    d = result.to_json()
    genes, what = d["genes"], ", ".join(d["at"])
    yield Picture(
        "Genes by damage",
        f"Without {what}: {nats(d['damage']['nats'])} nats per masked value, {genes[0]['gene']}"
        f" {nats(genes[0]['nats'])}",
        f"The {min(LISTED, len(genes))} of {many(len(genes), 'scored gene')} that lose most."
        f" {d['note']}",
        chart=bars(
            [(g["gene"], g["nats"]) for g in genes[:LISTED]], "damage, nats per masked value"
        ),
        table=Table(
            ("gene", "damage, nats", "intact NLL", "residual damage", "values"),
            [
                (g["gene"], g["nats"], g["intact_nll"], g["residual_nats"], g["values"])
                for g in genes[:LISTED]
            ],
            len(genes),
        ),
    )
    yield Picture(
        "Damage and difficulty",
        f"Spearman correlation of damage with the intact NLL: {d['difficulty_correlation']:+.2f}",
        "One dot a gene. Where they correlate, a ranking by damage is in part a ranking by how hard"
        " a gene is for the intact model."
        + _null_correlations(d["null"]["difficulty_correlations"]),
        chart=_dots(
            [{"x": g["intact_nll"], "y": g["nats"], "o": 0.6} for g in genes],
            "intact NLL, nats",
            "damage, nats",
        ),
    )
    if d.get("embedding"):
        yield _embedding(d)
    if d["by_type"]:
        yield _types(d["by_type"], what)
    if d["enrichment"]:
        yield _pathways(d)
    if d["components"]:
        ranked = [(c["name"], c["nats"]) for c in d["components"]]
        yield Picture(
            "Heads and MLP blocks",
            f"{ranked[0][0]} matters most: {nats(ranked[0][1])} nats without it",
            "Each head's share of the output projection's input, or each block's write, set to"
            " zero.",
            chart=bars(ranked[:LISTED], "damage, nats per masked value"),
            table=Table(
                ("component", "damage, nats", "95% from", "to"),
                [(c["name"], c["nats"], *c["ci95"]) for c in d["components"]],
            ),
        )
    if d["by_condition"]:
        yield _conditions(d)


def _null_correlations(values: Sequence[float]) -> str:
    return (
        f" Arbitrary weights of equal damage: {min(values):+.2f} to {max(values):+.2f}."
        if values
        else ""
    )


def _embedding(d: dict[str, Any]) -> Picture:
    points = d["embedding"]["points"]
    values = sorted(p["nats"] for p in points)
    low, high = values[len(values) // 20], values[-1 - len(values) // 20]
    rows = [
        {
            "x": p["x"],
            "y": p["y"],
            "o": 0.08 + 0.92 * min(1.0, max(0.0, (p["nats"] - low) / ((high - low) or 1.0))),
        }
        for p in points
    ]
    name = d["embedding"]["name"]
    return Picture(
        "Cells by damage",
        f"Damage over {name}: from {nats(low)} to {nats(high)} nats (5% and 95% of cells)",
        "One dot a cell; the fuller its colour, the more it loses. Axes: the first two coordinates"
        f" of {name}.",
        chart=_dots(rows, f"{name} 1", f"{name} 2"),
    )


def _pathways(d: dict[str, Any]) -> Picture:
    raw, residual = d["enrichment"]["raw"], d["enrichment"]["residual"]
    after = {p["name"]: p for p in residual["pathways"]}
    rows = []
    for p in raw["pathways"]:
        q = after[p["name"]]
        rows.append(
            (
                p["name"],
                p["genes"],
                p["nes"],
                p["p"],
                p["fdr"],
                p["null_p"],
                q["nes"],
                q["p"],
                q["fdr"],
                q["null_p"],
                p["over_p"],
                q["over_p"],
            )
        )
    counts = raw["null_sets_at_fdr_5"]
    beside = (
        f" Arbitrary weights of equal damage have {sum(counts) / len(counts):.1f} on average,"
        f" {max(counts)} at most, and {sum(residual['null_sets_at_fdr_5']) / len(counts):.1f} after"
        " residualising."
        if counts
        else " No null was made, so none of these is a finding."
    )
    columns = (
        "gene set",
        "genes",
        "NES",
        "p",
        "FDR",
        "p, equal damage",
        "NES, residual",
        "p",
        "FDR",
        "p, equal damage",
        "p, over-representation",
        "the same, residual",
    )
    return Picture(
        "Pathways beside the equal-damage null",
        f"{raw['sets_at_fdr_5']} of {many(len(rows), 'gene set')} at an FDR of 5% by raw damage,"
        f" {residual['sets_at_fdr_5']} by residual",
        f"Prerank over the scored genes only. Residual: less what the intact NLL foretells.{beside}"
        f" p, equal damage: how often such a weight gives the set at least this NES. {HYPOTHESES}",
        shown=Table(columns, rows[:LISTED], len(rows)),
    )


def _conditions(d: dict[str, Any]) -> Picture:
    test = d["donors"]
    if test is None:
        rows: list[Sequence[Cell]] = [(c, None, v) for c, v in d["by_condition"].items()]
        headline, about = (
            "Mean damage by condition, without a test",
            "Cells of one donor are not independent: a test needs donors.",
        )
    else:
        rows = [(c, donor, v) for c, of in test["means"].items() for donor, v in of.items()]
        headline = (
            f"{test['condition']}: {test['measure']} {nats(test['statistic'])} nats, p ="
            f" {test['p']:.3g} over donors"
        )
        about = (
            f"Permutation of donors, {test['design']}; with so few the least possible p is"
            f" {test['smallest_p']:.2g}."
        )
    return Picture(
        "By condition",
        headline,
        f"{about} {HYPOTHESES}",
        shown=Table(("condition", "donor", "damage, nats"), rows),
    )


def bars(ranked: Sequence[tuple[str, float]], x: str) -> Chart:
    """Horizontal bars with their numbers, in the order given."""
    rows: list[Row] = [{"row": name, "x": value, "says": nats(value)} for name, value in ranked]
    least, most = min(0.0, *(v for _, v in ranked)), max(0.0, *(v for _, v in ranked))

    def build(narrow: bool) -> Layers:
        width = (most - least) or 1.0
        scale = alt.Scale(
            domain=[least - 0.02 * width, most + (0.35 if narrow else 0.15) * width], nice=False
        )
        y = alt.Y(
            "row:N",
            sort=[name for name, _ in ranked],
            title=None,
            axis=alt.Axis(ticks=False, domain=False, labelColor=INK),
        )
        base = alt.Chart(alt.InlineData(values=rows)).encode(
            x=alt.X("x:Q", title=x, scale=scale, axis=alt.Axis(tickCount=4)), y=y
        )
        beside = alt.Chart(
            alt.InlineData(values=[{**r, "x": max(0.0, r["x"])} for r in rows])
        ).encode(x=alt.X("x:Q", scale=scale), y=y)
        return alt.layer(
            base.mark_bar(color=COLOURS["broken"], height=12),
            beside.mark_text(align="left", dx=5, color=INK, fontSize=12).encode(text="says:N"),
        )

    return draw(build, 22 * len(ranked) + 10)


def _dots(rows: Sequence[Row], x: str, y: str) -> Chart:
    """A scatter of small dots; rows hold x, y and o, how full the colour is.

    A ring keeps pale dots visible.
    """

    def build(narrow: bool) -> Layers:
        axis = alt.Axis(gridColor=GRID, tickCount=5)
        base = alt.Chart(alt.InlineData(values=[dict(r) for r in rows])).encode(
            x=alt.X("x:Q", title=x, axis=axis, scale=alt.Scale(zero=False)),
            y=alt.Y("y:Q", title=y, axis=axis, scale=alt.Scale(zero=False)),
        )
        return alt.layer(
            base.mark_point(size=26, filled=False, stroke=MUTED, strokeWidth=0.4, opacity=0.6),
            base.mark_point(size=26, filled=True, color=COLOURS["broken"]).encode(
                opacity=alt.Opacity("o:Q", scale=None)
            ),
        )

    return draw(build, 300)
