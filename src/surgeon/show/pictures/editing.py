"""Sections on facts: an edit beside its controls, several edits beside one another, what conditions
one, the layers to edit, and traces.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ...edit import PUBLISHED_RATIOS
from ...measure import Control, Scorecard
from ...studies.edit import EditResult
from ...studies.edit_layers import LayerRanking
from ...studies.edit_many import EditsResult
from ...trace import TraceAverage, TraceResult
from .charts import Row, lines
from .picture import Cell, Claim, Headline, Picture, Table, compare, many, model_name, percent

SHARES = ("efficacy", "paraphrase", "neighbourhood")
LISTED = 8
RESTORED = {
    "state": "the state",
    "mlp": "the MLPs around",
    "attn": "the attention around",
    "severed": "the state, severed,",
}


# -- edits ----------------------------------------------------------------------------------------


def edit_headline(result: EditResult) -> Headline:
    p, controls = result.target_probability, result.controls
    beside = "no control prompts were given"
    if controls:
        beside = f"{_changed(controls)} of {many(len(controls), 'control prompt')} changed"
    said = f"probability of the new answer, {p.before:.3f} before"
    return Headline(
        f"{model_name(result.provenance.model)} says something else",
        [Claim("patched", f"{p.after:.3f}", said, beside)],
    )


def edit_pictures(result: EditResult) -> Iterator[Picture]:
    """The forecast, the scorecard, the control prompts and what the model writes."""
    facts = result.scorecard.facts
    what = many(len(facts), "fact")
    if len(facts) == 1:
        what = f"{facts[0].subject} → {facts[0].target}"
    yield from edit_sections(result, f"{what} by {result.method}")


def edits_headline(result: EditsResult) -> Headline:
    return Headline(
        f"Facts of {model_name(result.provenance.model)} were rewritten one after the other",
        edit_headline(result).claims,
    )


def edits_pictures(result: EditsResult) -> Iterator[Picture]:
    """The edits step by step, then what all of them together did."""
    last = "every edit stayed" if result.stopped is None else result.stopped
    yield Picture(
        "Edit by edit",
        f"{result.kept_edits} of {many(len(result.steps), 'edit')} stayed",
        "After each edit: whether it holds, how many of those before it do, the NLL of unrelated"
        " text in nats per token, how far the matrix has moved relative to its norm, and by how"
        f" much this edit changes the layer's output on ordinary text. In the end: {last}.",
        shown=Table(
            ("edit", "holds", "earlier that hold", "NLL", "norm", "layer's output"),
            [
                (
                    f"{step.prompt} {step.target}",
                    "yes" if step.holds else "no",
                    f"{step.earlier_kept} of {number}",
                    step.nll,
                    step.norm,
                    percent(step.relative_damage),
                )
                for number, step in enumerate(result.steps)
            ],
        ),
    )
    yield from edit_pictures(result)


def edit_sections(result: EditResult, what: str) -> Iterator[Picture]:
    """The sections of one edit, which is called `what` in their headlines."""
    yield _forecast(result, what)
    if result.controls:
        yield _controls(result.controls, what)
    texts = [text for fact in result.scorecard.facts[:LISTED] for text in fact.free]
    yield Picture(
        "What it writes",
        f"{what}: free continuations, without teacher forcing",
        "Greedy. The first prompt of each fact is its own; the others ask about its subject and"
        " should not sound like the target.",
        generations=[
            compare(text.prompt, (("before", text.before), ("after", text.after))) for text in texts
        ],
    )


def _forecast(result: EditResult, what: str) -> Picture:
    flight, card, p = result.preflight, result.scorecard, result.target_probability
    clean, broken = PUBLISHED_RATIOS
    about = [
        f"Forecast {flight.verdict}: the layer's output changes by"
        f" {percent(flight.relative_damage)} on ordinary text; the update's norm is"
        f" {percent(flight.update_norm_ratio)} of the weight's (published for wide models: clean"
        f" under {clean:.0%}, broken over {broken:.0%}).",
        "Magnitude: the mean of P(target) - P(true), for the neighbourhood the reverse.",
    ]
    if card.ppl is not None:
        about.append(
            f"Perplexity of unrelated text {card.ppl.before:.2f} before, {card.ppl.after:.2f}"
            " after."
        )
    if card.neighbours_known_before:
        kept, known = card.neighbours_kept, card.neighbours_known_before
        about.append(f"Neighbours that keep their answer: {kept} of {known}.")
    columns = ("", "prompts", "success before", "after", "magnitude before", "after")
    return Picture(
        "An edit and its forecast",
        f"{what}: P(target) went from {p.before:.4f} to {p.after:.4f}",
        " ".join(about),
        shown=Table(columns, _shares(card)),
    )


def _shares(card: Scorecard) -> list[list[Cell]]:
    rows: list[list[Cell]] = []
    for name in SHARES:
        one = getattr(card, name)
        if one.prompts:
            numbers = (one.before, one.after, one.magnitude_before, one.magnitude_after)
            rows.append([name, one.prompts, *numbers])
    return rows


def _controls(controls: Sequence[Control], what: str) -> Picture:
    rows = [
        (*(one.prompt, *one.before, *one.after), "changed" if one.changed else "")
        for one in controls
    ]
    return Picture(
        "Control prompts",
        f"{what}: {_changed(controls)} of {many(len(controls), 'control prompt')} changed",
        "Prompts that are not about the edited fact: the most likely next token and its"
        " probability, before and after.",
        shown=Table(("prompt", "before", "p", "after", "p", ""), rows),
    )


def _changed(controls: Sequence[Control]) -> int:
    return sum(one.changed for one in controls)


def beside_one_another(
    edits: Sequence[tuple[str, EditResult]], published: Sequence[str] = ()
) -> Picture:
    """Several edits, each by its name, in one table. published: sentences on published figures."""
    controls = [one for _, edit in edits for one in edit.controls]
    said = " ".join(f"Published: {line}." for line in published)
    columns = (
        *("edit", "method", "P(target)", "update norm", "layer's output", "forecast"),
        "controls changed",
    )
    return Picture(
        "The edits",
        f"{_changed(controls)} of {len(controls)} control prompts changed their answer over"
        f" {many(len(edits), 'edit')}",
        "P: of the target's first token. Update norm: relative to the weight's. Layer's output: by"
        " how much it changes on ordinary text, relative to its usual size, known before any weight"
        f" changed. {said}".strip(),
        shown=Table(columns, [_summary(name, edit) for name, edit in edits]),
    )


def _summary(name: str, edit: EditResult) -> list[Cell]:
    flight = edit.preflight
    return [
        name,
        edit.method,
        edit.target_probability.after,
        percent(flight.update_norm_ratio),
        percent(flight.relative_damage),
        flight.verdict,
        f"{_changed(edit.controls)} of {len(edit.controls)}",
    ]


def conditioning_picture(rows: Sequence[Any], published: Sequence[str] = ()) -> Picture:
    """How the update depends on the sample of keys, the ridge, and words before the subject.

    rows: with the attributes tokens_per_dimension, ridge, prompt, position_zero, update_norm_ratio,
    relative_damage, direction_stability, target_probability, controls_changed, nll_rise.
    """
    ridges = sorted({row.ridge for row in rows})
    ratios = [row.update_norm_ratio for row in rows]
    middle = ridges[len(ridges) // 2]
    kinds = {True: "nothing before the subject", False: "words before the subject"}
    points: list[Row] = [
        {
            "x": row.tokens_per_dimension,
            "y": row.update_norm_ratio,
            "series": kinds[row.position_zero],
        }
        for row in rows
        if row.ridge == middle
    ]
    said = " ".join(f"Published: {line}." for line in published)
    columns = (
        *("tokens / d_mlp", "ridge", "prompt", "update / weight", "layer's output"),
        *("half to all", "P(target)", "controls changed", "NLL, nats"),
    )
    return Picture(
        "What conditions an edit",
        f"The update's norm is {percent(min(ratios))} to {percent(max(ratios))} of the weight's",
        f"Drawn at a ridge of {middle:g} of the mean diagonal. Half to all: the cosine of the"
        f" edit's direction from half of the sample and from all of it. {said}".strip(),
        chart=lines(
            points,
            {kinds[True]: "broken", kinds[False]: "patched"},
            "tokens / d_mlp",
            "update / weight",
            percent=True,
        ),
        table=Table(
            columns,
            [
                (
                    row.tokens_per_dimension,
                    f"{row.ridge:g}",
                    row.prompt,
                    row.update_norm_ratio,
                    row.relative_damage,
                    row.direction_stability,
                    row.target_probability,
                    row.controls_changed,
                    row.nll_rise,
                )
                for row in rows
            ],
        ),
    )


def layers_headline(result: LayerRanking) -> Headline:
    return Headline(f"Where {model_name(result.provenance.model)} is edited best")


def layers_pictures(result: LayerRanking) -> Iterator[Picture]:
    """The layers by their trial edits."""
    best = result.layers[0]
    close = many(len(result.as_good), "other layer")
    yield Picture(
        "The layers, by trial edits",
        f"Layer {best.layer} is best, {best.score:.3f} ({best.ci95[0]:.3f} to {best.ci95[1]:.3f})",
        "Score: the mean of P(target), the share of paraphrases that prefer the target, and the"
        f" share of neighbours that keep their answer, over {many(result.facts, 'fact')} by"
        f" {result.method}; in brackets 95% over facts. {close} cannot be told from the best."
        " Layer's output: by how much it changes on ordinary text. Trace: the effect of the layer's"
        " MLP.",
        shown=Table(
            ("layer", "score", "95% from", "to", "layer's output", "trace"),
            [
                (one.layer, one.score, *one.ci95, one.relative_damage, one.prior)
                for one in result.layers
            ],
        ),
    )


# -- traces ---------------------------------------------------------------------------------------


def trace_headline(result: TraceResult) -> Headline:
    return Headline(f"Where {model_name(result.provenance.model)} keeps a fact")


def trace_pictures(result: TraceResult) -> Iterator[Picture]:
    """What comes back with one site restored, layer by token."""
    start, stop = result.subject_range
    tokens = [f"* {token}" if start <= i < stop else token for i, token in enumerate(result.tokens)]
    for kind, grid in result.effects.items():
        best = result.best[kind][0]
        where = f"{RESTORED[kind]} of layer {best.layer} restored at {best.token!r}"
        yield Picture(
            f"Causal trace, {kind}",
            f"With {where} it is {best.value:.3f}, of {result.p_clean:.3f} clean",
            f"The {result.metric} of {result.answer!r}; with the subject (*) corrupted"
            f" {result.p_corrupt:.3f}. Each cell: the same with that of the clean run restored,"
            f" mean over draws of the noise. Prompt: {result.prompt}",
            shown=Table(
                ("token", *(f"layer {layer}" for layer in range(len(grid)))),
                [(token, *(row[i] for row in grid)) for i, token in enumerate(tokens)],
            ),
        )


def average_headline(result: TraceAverage) -> Headline:
    return Headline(f"Where {model_name(result.provenance.model)} keeps facts")


def average_pictures(result: TraceAverage) -> Iterator[Picture]:
    """Mean effects over many facts, layer by where the token stands."""
    for kind, grid in result.effects.items():
        cells = [
            (value, layer, i)
            for layer, row in enumerate(grid)
            for i, value in enumerate(row)
            if value is not None
        ]
        effect, layer, place = max(cells)
        low, high = getattr(result.ci, kind)[layer][place]
        where = f"{RESTORED[kind]} of layer {layer} at the {result.places[place]}"
        yield Picture(
            f"Mean causal trace, {kind}",
            f"{where[0].upper()}{where[1:]}: {effect:+.3f} comes back ({low:+.3f} to {high:+.3f})",
            f"Mean over {many(result.facts, 'fact')} that the model knows ({result.skipped} left"
            f" out), less the corrupted run: {result.p_clean:.3f} clean, {result.p_corrupt:.3f}"
            " corrupted. In brackets 95% over facts.",
            shown=Table(
                ("layer", *result.places),
                [(str(number), *row) for number, row in enumerate(grid)],
            ),
        )
