"""Sections on models of gene expression: how one was trained, the screen beside its controls, cells
as sentences, a Geneformer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ...cells import CellTraining
from ...studies.cells_geneformer import GeneformerDamage
from ...studies.cells_screen import CellScreen, Check, Verified
from ...studies.cells_sentences import CellSentences
from .charts import Row, bars, lines, strip
from .critical import verify_pictures as geneformer_pictures
from .picture import Cell, Claim, Headline, Picture, Table, many, model_name, nats, percent

__all__ = ["geneformer_pictures"]

LISTED = 20
HYPOTHESES = "Hypotheses about the model, not biomarkers."
DAMAGE = "damage, nats per masked value"


def train_headline(result: CellTraining) -> Headline:
    (low, high), test = result.lead_ci95, many(result.cells["test"], "held-out cell")
    lead = f"less per masked value than the baseline, on {test} (95%: {nats(low)} to {nats(high)})"
    beside = f"gene-marginal baseline: {result.baseline_nll:.3f} nats"
    return Headline(
        f"A model of {many(result.genes, 'gene')}, from scratch",
        [Claim("base", f"{nats(-result.lead_nats)} nats", lead, beside)],
    )


def train_pictures(result: CellTraining) -> Iterator[Picture]:
    """The looks at the validation cells, beside the baseline."""
    model = "the model, on the validation cells"
    rows: list[Row] = [
        {"x": step, "y": nll - result.baseline_nll, "series": model}
        for step, nll in result.validation_curve
    ]
    yield Picture(
        "Training",
        f"NLL {result.nll:.3f} nats per masked value, the gene-marginal baseline"
        f" {result.baseline_nll:.3f}",
        f"Both on {many(result.cells['test'], 'cell')} that were neither fitted nor stopped by;"
        f" {percent(result.mask_ratio)} of the values are hidden. On the fitted cells the model has"
        f" {result.train_nll:.3f}. Step {result.best_step} of {result.steps} was kept.",
        chart=lines(
            rows,
            {model: "patched"},
            "step",
            "NLL less that of the baseline, nats",
            0.0,
            "gene-marginal baseline",
        ),
        table=Table(("step", "NLL"), result.validation_curve),
    )


def sentences_headline(result: CellSentences) -> Headline:
    return Headline(f"{many(result.cells, 'cell')} as sentences of gene names")


def sentences_pictures(result: CellSentences) -> Iterator[Picture]:
    """The first of them."""
    yield Picture(
        "Cells as sentences",
        f"{many(result.cells, 'cell')} of at most {many(result.genes, 'gene')}",
        "One line a cell: its genes, highest expressed first. Text for a language model of cells.",
        shown=Table(("file", "the first cell"), [(result.output, result.first)], result.cells),
    )


def geneformer_headline(result: GeneformerDamage) -> Headline:
    model = model_name(result.provenance.model)
    return Headline(f"What {model}, a model of cells, loses without the given weights")


def screen_headline(result: CellScreen) -> Headline:
    model = model_name(result.provenance.model)
    return Headline(f"Is there a weight that {model} cannot live without?")


def screen_pictures(result: CellScreen) -> Iterator[Picture]:
    """The verdict with its controls, what was pruned, cell types, the probe, and the screen's own
    controls.
    """
    yield _verdicts(result)
    columns = ("candidate", "kind", "weight", "largest |w·x|", "height", "damage alone, nats")
    pruned = [
        (str(c.address), c.kind, c.weight, c.write, c.height, c.probe_nats)
        for c in result.candidates
    ]
    yield Picture(
        "Candidates pruned one by one",
        f"{many(len(pruned), 'candidate')}: the worst alone costs"
        f" {nats(result.candidates[0].probe_nats or 0.0)} nats",
        "On the probe cells, one draw. Height: |w·x| over the root mean square of its matrix or"
        " vector. mlp: an entry of an MLP's output matrix; scale, shift: of a LayerNorm.",
        shown=Table(columns, pruned[:LISTED], len(pruned)),
    )
    worst = _worst_alone(result)
    if worst.by_type:
        yield types(worst.by_type, worst.name)
    if result.probe is not None:
        yield _probe(result)
    if result.check is not None:
        yield _check(result.check)


def _worst_alone(result: CellScreen) -> Verified:
    alone = [c.verified for c in result.candidates if c.verified is not None]
    return max(alone, key=lambda one: one.nats)


def _named(result: CellScreen) -> list[tuple[str, Verified]]:
    """Every verification, by a name short enough for a row."""
    together = "all of these together"
    return [(together if v is result.together else v.name, v) for v in result.verified]


def _verdicts(result: CellScreen) -> Picture:
    dots: list[Row] = []
    for name, one in _named(result):
        low, high = one.ci95
        at = {"row": name, "x": one.nats, "low": low, "high": high}
        controls = [{"row": name, "x": x, "colour": "control"} for x in one.controls.nats]
        dots += [{**row, "says": ""} for row in controls]
        dots.append({**at, "colour": "broken", "says": nats(one.nats)})
    columns = ("", "damage, nats", "95% from", "to", "collapse share")
    more = ("worst control", "median control", "p", "verdict")
    rows = [
        (
            name,
            one.nats,
            *one.ci95,
            _share(one.collapse_share),
            one.controls.max_nats,
            one.controls.median_nats,
            one.p_value,
            _found(one.found),
        )
        for name, one in _named(result)
    ]
    return Picture(
        "The screen",
        _verdict(result),
        f"Damage in nats per masked value, on {many(result.cells['judge'], 'cell')} that chose no"
        f" candidate, {many(result.draws, 'draw')} of masks. {result.criteria.capitalize()}. The"
        f" lead over the gene-marginal baseline is {nats(result.lead_nats)} nats. {HYPOTHESES}",
        chart=strip(dots, [name for name, _ in _named(result)], DAMAGE),
        table=Table((*columns, *more), rows),
    )


def _verdict(result: CellScreen) -> str:
    worst = _worst_alone(result)
    said = (
        f"{worst.name} costs {nats(worst.nats)} nats without it, {_share(worst.collapse_share)} of"
        f" the model's lead (matched controls: {nats(worst.controls.max_nats)} at worst)"
    )
    if result.verdict == "none":
        return f"None found among {many(len(result.candidates), 'candidate')}: the worst, {said}"
    return f"Found: {said}" if worst.found else f"Found, together: the worst alone, {said}"


def _found(found: bool) -> str:
    return "found" if found else "not found"


def _share(share: float | None) -> str:
    return "no share (the model has no lead)" if share is None else percent(share)


def types(by_type: dict[str, float], what: str) -> Picture:
    """Mean damage of the cells of each type."""
    ranked = sorted(by_type.items(), key=lambda item: -item[1])
    (first, most), (last, least) = ranked[0], ranked[-1]
    return Picture(
        "Damage by cell type",
        f"{what}: {first} loses most, {nats(most)} nats; {last} least, {nats(least)}",
        f"Mean over the cells of each type, in nats per masked value. {HYPOTHESES}",
        chart=bars(ranked, DAMAGE, [nats(value) for _, value in ranked]),
        table=Table(("cell type", "damage, nats"), ranked),
    )


def _probe(result: CellScreen) -> Picture:
    assert result.probe is not None
    intact = (result.probe.accuracy, result.probe.macro_f1)
    rows: list[Sequence[Cell]] = [("intact", *intact, None, None)]
    for name, one in _named(result):
        frozen, again = one.probe["frozen"], one.probe["refitted"]
        scores = (frozen.accuracy, frozen.macro_f1, again.accuracy, again.macro_f1)
        rows.append((name, *scores))
    return Picture(
        "Cell types from the embeddings",
        f"A probe names {percent(intact[0])} of the cell types from intact embeddings",
        "Logistic regression, tested on half of the cells; always the commonest type:"
        f" {percent(result.probe.majority)}. Frozen: fitted on the intact model. Refitted: on the"
        " broken one, which asks whether the type is still there.",
        shown=Table(("", "frozen accuracy", "macro-F1", "refitted accuracy", "macro-F1"), rows),
    )


def _check(check: Check) -> Picture:
    planted, rescaled = check.planted, check.rescaled
    verdict = "as it must be" if check.passed else "the screen fails here"
    was, other = _found(planted.found), _found(rescaled.found)
    neuron = f"neuron × {rescaled.factor:g}"
    rows: list[Sequence[Cell]] = [
        ("planted fragile weight", "found", was, planted.nats, planted.max_abs_difference),
        (neuron, "not found", other, rescaled.nats, rescaled.max_abs_difference),
    ]
    return Picture(
        "The screen's own controls",
        f"The planted weight was {was}, the rescaled neuron {other}: {verdict}",
        "Both are copies that compute the same as the model. Difference: the largest absolute"
        " difference between states of the model and of the copy.",
        shown=Table(("control", "must be", "was", "damage, nats", "difference"), rows),
    )
