"""Sections on facts: the trace, an edit beside its controls, a recipe of edits, and what conditions
one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .charts import Row, lines
from .folder import Result
from .picture import Cell, Picture, Table, command, compare, many, percent

SHARES = ("efficacy", "paraphrase", "neighbourhood")
LISTED = 8
RESTORED = {
    "state": "the state",
    "mlp": "the MLPs around",
    "attn": "the attention around",
    "severed": "the state, severed,",
}


def edit_pictures(result: Result) -> Iterator[Picture]:
    """The forecast, the scorecard, the control prompts and what the model writes."""
    d = result.data
    facts = d["scorecard"]["facts"]
    what = (
        f"{facts[0]['subject']} → {facts[0]['target']}"
        if len(facts) == 1
        else many(len(facts), "fact")
    )
    yield from _edit(
        d, f"{what} by {d['method']}", result.file, command("edit", result.model, "...")
    )


def edits_pictures(result: Result) -> Iterator[Picture]:
    """A recipe of edits: all beside one another, then each."""
    rows = result.data["edits"]
    made_by = command("run", "RECIPE", "-o", "DIR")
    columns = (
        "edit",
        "method",
        "P(target)",
        "update norm",
        "relative damage",
        "forecast",
        "controls changed",
    )
    table = Table(columns, [_summary(row) for row in rows])
    changed = sum(c["changed"] for row in rows for c in row["controls"])
    asked = sum(len(row["controls"]) for row in rows)
    published = " ".join(f"Published: {line}." for line in result.data["published"])
    yield Picture(
        "The edits",
        f"{changed} of {asked} control prompts changed their answer over {many(len(rows), 'edit')}",
        "P: of the target's first token. Update norm: relative to the weight's. Relative damage:"
        " by how much what the matrix writes changes on usual text, relative to its usual size,"
        f" known before any weight changed. {published}".strip(),
        result.file,
        made_by,
        shown=table,
    )
    for row in rows:
        yield from _edit(row, f"{row['name']} by {row['method']}", result.file, made_by)


def _summary(row: dict[str, Any]) -> list[Cell]:
    flight, p = row["preflight"], row["target_probability"]
    changed = sum(c["changed"] for c in row["controls"])
    return [
        row["name"],
        row["method"],
        p["after"],
        percent(flight["update_norm_ratio"]),
        flight["relative_damage"],
        flight["verdict"],
        f"{changed} of {len(row['controls'])}",
    ]


def _edit(d: dict[str, Any], what: str, file: str, made_by: str) -> Iterator[Picture]:
    flight, card, p = d["preflight"], d["scorecard"], d["target_probability"]
    shares = [
        (
            name,
            card[name]["prompts"],
            card[name]["before"],
            card[name]["after"],
            card[name]["magnitude_before"],
            card[name]["magnitude_after"],
        )
        for name in SHARES
        if card[name]["prompts"]
    ]
    ppl, known = card["ppl"], card["neighbours_known_before"]
    yield Picture(
        "An edit and its forecast",
        f"{what}: P(target) went from {p['before']:.4f} to {p['after']:.4f}",
        f"Forecast {flight['verdict']}: what is written changes by {flight['relative_damage']:.3f}"
        f" of its usual size; the update's norm is {percent(flight['update_norm_ratio'])} of the"
        " weight's (published for wide models: clean under 15%, broken over 50%). "
        + (
            ""
            if ppl["before"] is None
            else (
                f"Perplexity of unrelated text {ppl['before']:.2f} before, {ppl['after']:.2f}"
                " after. "
            )
        )
        + (
            f"Neighbours that keep their answer: {card['neighbours_kept']} of {known}."
            if known
            else ""
        ),
        file,
        made_by,
        shown=Table(
            ("", "prompts", "success before", "after", "mean difference of P before", "after"),
            shares,
        ),
    )
    if d["controls"]:
        changed = [c for c in d["controls"] if c["changed"]]
        yield Picture(
            "Control prompts",
            f"{what}: {len(changed)} of {many(len(d['controls']), 'control prompt')} changed",
            "Prompts that are not about the edited fact: the most likely next token and its"
            " probability, before and after.",
            file,
            made_by,
            shown=Table(
                ("prompt", "before", "p", "after", "p", ""),
                [
                    (
                        c["prompt"],
                        c["before"][0],
                        c["before"][1],
                        c["after"][0],
                        c["after"][1],
                        "changed" if c["changed"] else "",
                    )
                    for c in d["controls"]
                ],
            ),
        )
    texts = [t for fact in card["facts"][:LISTED] for t in fact["free"]]
    yield Picture(
        "What it writes",
        f"{what}: free continuations, without teacher forcing",
        "Greedy. The first prompt of each fact is its own; the others ask about its subject and"
        " should not sound like the target.",
        file,
        made_by,
        generations=[
            compare(t["prompt"], (("before", t["before"]), ("after", t["after"]))) for t in texts
        ],
    )


def conditioning_pictures(result: Result) -> Iterator[Picture]:
    """How the update depends on the sample of keys, the ridge, and words before the subject."""
    rows = result.data["conditioning"]
    ridges, ratios = (
        sorted({row["ridge"] for row in rows}),
        [row["update_norm_ratio"] for row in rows],
    )
    middle = ridges[len(ridges) // 2]
    kinds = {True: "nothing before the subject", False: "words before the subject"}
    points: list[Row] = [
        {
            "x": row["tokens_per_dimension"],
            "y": row["update_norm_ratio"],
            "series": kinds[row["position_zero"]],
        }
        for row in rows
        if row["ridge"] == middle
    ]
    columns = (
        "tokens / d_mlp",
        "ridge",
        "prompt",
        "update / weight",
        "relative damage",
        "half to all",
        "P(target)",
        "controls changed",
        "NLL, nats",
    )
    published = " ".join(f"Published: {line}." for line in result.data["published"])
    yield Picture(
        "What conditions an edit",
        f"The update's norm is {percent(min(ratios))} to {percent(max(ratios))} of the weight's",
        f"Drawn at a ridge of {middle:g} of the mean diagonal. Half to all: the cosine of the"
        f" edit's direction from half of the sample and from all of it. {published}".strip(),
        result.file,
        command("run", "RECIPE", "-o", "DIR"),
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
                    row["tokens_per_dimension"],
                    f"{row['ridge']:g}",
                    row["prompt"],
                    row["update_norm_ratio"],
                    row["relative_damage"],
                    row["direction_stability"],
                    row["target_probability"],
                    row["controls_changed"],
                    row["nll_rise"],
                )
                for row in rows
            ],
        ),
    )


def trace_pictures(result: Result) -> Iterator[Picture]:
    """What comes back with one site restored, layer by token."""
    d = result.data
    for kind in [k for k in RESTORED if k in d]:
        cells = d[kind]
        best = max(
            (value, layer, i) for layer, row in enumerate(cells) for i, value in enumerate(row)
        )
        tokens = [
            f"{'* ' if d['subject_range'][0] <= i < d['subject_range'][1] else ''}{t}"
            for i, t in enumerate(d["tokens"])
        ]
        where = f"{RESTORED[kind]} of layer {best[1]} restored at {d['tokens'][best[2]]!r}"
        yield Picture(
            f"Causal trace, {kind}",
            f"With {where} it is {best[0]:.3f}, of {d['p_clean']:.3f} clean",
            f"The {d['metric']} of {d['answer']!r}; with the subject (*) corrupted"
            f" {d['p_corrupt']:.3f}. Each cell: the same with that of the clean run restored, mean"
            f" over draws of the noise. Prompt: {d['prompt']}",
            result.file,
            command("trace", result.model, "--prompt", d["prompt"], "--subject", "..."),
            shown=Table(
                ("token", *(f"layer {i}" for i in range(len(cells)))),
                [(tokens[i], *(row[i] for row in cells)) for i in range(len(tokens))],
            ),
        )


def average_pictures(result: Result) -> Iterator[Picture]:
    """Mean effects over many facts, layer by where the token stands."""
    d = result.data
    for kind in [k for k in RESTORED if k in d]:
        cells = d[kind]
        best = max(
            (value, layer, i)
            for layer, row in enumerate(cells)
            for i, value in enumerate(row)
            if value is not None
        )
        low, high = d["ci"][kind][best[1]][best[2]]
        where = f"{RESTORED[kind]} of layer {best[1]} at the {d['places'][best[2]]}"
        yield Picture(
            f"Mean causal trace, {kind}",
            f"{where[0].upper()}{where[1:]}: {best[0]:+.3f} comes back ({low:+.3f} to {high:+.3f})",
            f"Mean over {many(d['facts'], 'fact')} that the model knows ({d['skipped']} left out),"
            f" less the corrupted run: {d['p_clean']:.3f} clean, {d['p_corrupt']:.3f} corrupted. In"
            " brackets 95% over facts.",
            result.file,
            command("trace", result.model, "--facts", "FILE"),
            shown=Table(
                ("layer", *d["places"]), [(str(layer), *row) for layer, row in enumerate(cells)]
            ),
        )
