"""Sections on what was found and taken out: the rising channel, the damage beside its controls, the
states of the demo.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .charts import Row, lines, strip
from .folder import Result
from .picture import Picture, Table, command, compare, many, nats

LISTED = 300


def find_pictures(result: Result) -> Iterator[Picture]:
    """Where channels rise, each set's damage beside its controls, and what was looked at and
    rejected.
    """
    d = result.data
    made_by = command("find", result.model, corpus=d["corpus"])
    detection = d["detection"]
    yield _rise(d, result.file, made_by)
    for number, found in enumerate(d["sets"], 1):
        which = "the set" if len(d["sets"]) == 1 else f"set {number}"
        damage = {
            **found["damage"],
            "controls": found["controls"],
            "vital": found["vital"],
            "criteria": found["criteria"],
        }
        entries = Table(
            ("entry", "weight", "share of the channel's write", "rank by |w| in its matrix"),
            [
                (e["entry"], e["weight"], e["share"], e["rank_abs"])
                for e in found["entries"][:LISTED]
            ],
            len(found["entries"]),
        )
        size = many(len(found["entries"]), "entry")
        yield _damage(damage, f"{which} of {size}", result.file, made_by)
        one = found["geometry"] == "single"
        shape = "one entry" if one else f"a {found['geometry']} of {size}"
        yield Picture(
            "The entries",
            f"{which.capitalize()} is {shape}",
            "Row = output channel, column = input neuron. The share is that of what the layer"
            " writes to the channel at its peaks or on average. The largest |w| of the matrix has"
            " rank 1.",
            result.file,
            made_by,
            shown=Table(entries.columns, entries.rows[:5], entries.of),
            table=entries,
        )
    if d["rejected"]:
        names = {
            "height": "height",
            "joint_nats": "damage, nats",
            "control_max_nats": "worst control, nats",
        }
        keys = [k for k in names if any(k in r for r in d["rejected"])]
        yield Picture(
            "Looked at and rejected",
            f"{many(len(d['rejected']), 'other candidate')} did not hold up",
            f"Channels that stood above the bar, {detection['bar']:.3g} times the median, and why"
            " they are not called vital. Damage: of zeroing every entry that writes the channel,"
            " in nats per token.",
            result.file,
            made_by,
            shown=Table(
                ("where", "why", *(names[k] for k in keys)),
                [(r["entry"], r["reason"], *(r.get(k) for k in keys)) for r in d["rejected"]],
            ),
        )


def _rise(d: dict[str, Any], file: str, made_by: str) -> Picture:
    heights, bar = d["detection"]["heights"], d["detection"]["bar"]
    tallest = "tallest channel of the layer"
    series, rows = (
        {tallest: "control"},
        [{"x": i, "y": h, "series": tallest} for i, h in enumerate(heights)],
    )
    for found in d["sets"]:
        for channel, by_layer in zip(found["channels"], found.get("heights", ()), strict=False):
            name = f"channel {channel}, written by the {'vital ' if found['vital'] else ''}set"
            if len(series) < 4:
                series = {name: "broken" if len(series) == 1 else "patched", **series}
                rows += [{"x": i, "y": h, "series": name} for i, h in enumerate(by_layer)]
    if d["verdict"] == "none":
        top = max(heights)
        where = f"{top:.1f} times the median (layer {heights.index(top)})"
        headline = (
            f"None found: the tallest channel is {where}, and nothing that writes such a channel is"
            " vital"
        )
    else:
        first = next(s for s in d["sets"] if s["vital"])
        where = (
            f"Layer {min(e['layer'] for e in first['entries'])} writes channel"
            f" {', '.join(map(str, first['channels']))}"
        )
        by_layer = first.get("heights") or [[]]
        peak = max((h for each in by_layer for h in each), default=None)
        headline = (
            where
            if peak is None
            else f"{where}, which rises to {peak:.1f} times the height of the median channel"
        )
    return Picture(
        "Where the channel rises",
        headline,
        "Height of a residual channel after each layer: its peak over tokens, or its RMS, over the"
        f" median channel's. Above the bar ({bar:.3g}) a channel is looked into; but the tallest"
        " need not be vital: only damage decides, below.",
        file,
        made_by,
        chart=lines(
            rows,
            series,
            "layer",
            "height, times the median channel",
            bar,
            f"bar {bar:.3g}",
            log_y=max(heights) > 30 * bar,
            ticks=range(len(heights)),
        ),
        table=Table(
            ("layer", "channel", "height, times the median"),
            [(r["x"], r["series"], r["y"]) for r in rows],
        ),
    )


def verify_pictures(result: Result) -> Iterator[Picture]:
    d = result.data
    at = [word for a in d.get("at", ()) for word in ("--at", str(a))]
    yield _damage(d, "the entries given", result.file, command("verify", result.model, *at))


def _damage(d: dict[str, Any], what: str, file: str, made_by: str) -> Picture:
    """Damage together, alone, all but one, and of the matched controls, on one axis."""
    controls = d["controls"]
    together, alone, others = "all together", "each one alone", f"{controls['n']} matched controls"
    low, high = d.get("ci95", (d["joint_nats"], d["joint_nats"]))
    rows: list[Row] = [
        {
            "row": together,
            "x": d["joint_nats"],
            "low": low,
            "high": high,
            "colour": "broken",
            "says": nats(d["joint_nats"]),
        }
    ]
    rows += [{"row": alone, "x": v, "colour": "broken", "says": ""} for v in d["single_nats"]]
    rows += [
        {"row": "all but one", "x": v, "colour": "broken", "says": ""}
        for v in d["leave_one_out_nats"]
    ]
    order = [together, others, alone, "all but one"]
    if len(d["single_nats"]) == 1:  # a single entry is what is taken out together
        rows, order = rows[:1], [together, others]
    drawn = controls.get("nats") or [controls["median_nats"], controls["max_nats"]]
    worst = max(drawn)
    rows += [
        {
            "row": others,
            "x": v,
            "colour": "control",
            "says": f"worst {nats(v)}" if i == drawn.index(worst) else "",
        }
        for i, v in enumerate(drawn)
    ]
    verdict = "vital" if d["vital"] else "not vital"
    listed = (
        f" (each one alone and all but one: of the {len(d['single_nats'])} strongest)"
        if len(order) > 2
        else ""
    )
    names = {together: "joint", others: "control", alone: "single", "all but one": "leave one out"}
    return Picture(
        "Damage beside its controls",
        f"Zeroing {what} costs {nats(d['joint_nats'])} nats per token; "
        f"the worst of {controls['n']} matched controls {nats(controls['max_nats'])}",
        "Damage: NLL after minus NLL before, on the same tokens. Each dot is one"
        f" measurement{listed}; the bar is the 95% interval over windows. Controls:"
        f" {controls.get('kind', 'matched random weights')}. Verdict: {verdict}. To be vital takes"
        f" {str(d.get('criteria', '')).removeprefix('vital: ')}.",
        file,
        made_by,
        chart=strip(rows, order, "damage, nats per token"),
        table=Table(
            ("what was zeroed", "damage, nats per token", "95% from", "to"),
            [(names[r["row"]], r["x"], r.get("low"), r.get("high")) for r in rows],
        ),
    )


def state_pictures(result: Result) -> Iterator[Picture]:
    """The states of the demo: a table, and what each writes."""
    d = result.data
    states, file = d["states"], result.file
    made_by = command("demo", "-o", "DIR")
    total = d.get("facts")
    base, worst = states[0], max(states, key=lambda s: float(s["nll"]))
    back = states[-1]
    restored = back["nll"] == base["nll"] and back["same_bits"]
    headline = f"Perplexity goes from {base['ppl']:.2f} to {worst['ppl']:.2f}" + (
        f"; once {back['state']}, the model is bit for bit as before"
        if restored
        else f"; {back['state']}, it is {back['ppl']:.2f}"
    )
    known = "facts known" if total is None else f"facts known, of {total}"
    yield Picture(
        "The states",
        headline,
        "NLL: mean negative log-likelihood of held-out text, in nats per token; perplexity is its"
        " exponential. A fact counts as known when at least three of its phrasings give it more"
        " than half the probability. Damage to stories need not be damage to facts.",
        file,
        made_by,
        shown=Table(
            ("state", "NLL, nats per token", "perplexity", known, "weights"),
            [
                (
                    s["state"],
                    s["nll"],
                    s["ppl"],
                    s["facts_known"],
                    "as trained, bit for bit" if s["same_bits"] else "changed",
                )
                for s in states
            ],
        ),
    )
    yield generations(
        [
            (prompt, [(s["state"], s["texts"][i]) for s in states])
            for i, prompt in enumerate(d["prompts"])
        ],
        file,
        made_by,
    )


def generations(
    written: list[tuple[str, list[tuple[str, str]]]], file: str, made_by: str
) -> Picture:
    """What each state writes after each prompt; the first state is what the others are compared
    with.
    """
    first = written[0][1][0][0]
    differ = [
        f"{state} {sum(texts[i][1] != texts[0][1] for _, texts in written)} of {len(written)}"
        for i, (state, _) in enumerate(written[0][1])
        if i
    ]
    headline = (
        "Texts that differ from the " + first + " model's: " + ", ".join(differ)
        if differ
        else f"What the {first} model writes"
    )
    return Picture(
        "What it writes",
        headline,
        f"Greedy continuations. Underlined on colour: words that differ from the {first} model's. A"
        " few prompts are an illustration, not a measurement.",
        file,
        made_by,
        generations=[compare(prompt, texts) for prompt, texts in written],
    )
