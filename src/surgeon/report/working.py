"""Sections on how a patch works: top-k curve, geometry, the channel and the attention sink, influence beside its null."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from .charts import Row, dumbbells, lines
from .critical import generations
from .folder import Result
from .picture import Cell, Picture, Table, command, many, percent

STATES = {"base": "intact", "broken": "broken", "patched": "repaired"}
COLOURS = {"intact": "base", "broken": "broken", "repaired": "patched"}
DRAWN = 12
LISTED = 10
LEVEL = 0.05


def explain_pictures(result: Result) -> Iterator[Picture]:
    d, file = result.data, result.file
    patches = [word for p in d.get("patches", ()) for word in ("--patch", str(p))]
    made_by = command("explain", result.model, *patches, corpus=d.get("corpus"))
    if d["topk_curve"]:
        yield _curve(d["topk_curve"], file, made_by)
    yield _geometry(d["geometry"], file, made_by)
    for channel in (d["channel"]["channels"] or ())[:1]:
        yield _channel(channel, file, made_by)
    if d["channel"]["attention_sink"]:
        yield _sink(d["channel"]["attention_sink"], file, made_by)
    yield from _influence(d["influence"], file, made_by)
    written = d["behaviour"]["generations"]
    if written:
        states = [s for s in STATES if s in written[0]]
        yield generations([(g["prompt"], [(STATES[s], g[s]) for s in states]) for g in written], file, made_by)


def _curve(d: dict[str, Any], file: str, made_by: str) -> Picture:
    largest, random, trained = "the k largest entries", "k random entries (band: range)", "trained with k entries"
    kinds = {"largest": largest, "random": random, "trained": trained}
    series = {largest: "patched", random: "control", trained: "base"}
    rows: list[Row] = []
    for p in d["points"]:
        for key, name in kinds.items():
            if p[key] is not None:
                band = dict(zip(("low", "high"), p["random_range"], strict=True)) if key == "random" and p["random_range"] else {}
                rows.append({"x": p["k"], "y": p[key], "series": name, **band})
    series = {name: colour for name, colour in series.items() if any(r["series"] == name for r in rows)}
    whole = max((p for p in d["points"] if p["largest"] is not None), key=lambda p: p["k"])
    # nine tenths of what the whole patch recovers, if it recovers anything
    enough = next((p for p in d["points"] if p["largest"] is not None and p["largest"] >= 0.9 * whole["largest"] > 0), whole)
    k = enough["k"]
    which = "largest entry" if k == 1 else f"{k:,} largest entries"
    headline = f"The {which} of {whole['k']:,} recover{'s' if k == 1 else ''} {percent(enough['largest'])} of the damage"
    if enough["random"] is not None:
        headline += f"; {'a random one' if k == 1 else 'as many random ones'}: {percent(enough['random'])}"
    return Picture(
        "How many entries it takes",
        headline,
        f"The repair cut to k of its entries; share of the damage recovered on {many(d['tokens'], 'token')}, on a doubling axis. "
        "Below 0% the cut patch makes things worse.",
        file,
        made_by,
        chart=lines(rows, series, "k, entries kept", "recovered share of the damage", 0.0, "as broken", log_x=True, percent=True),
        table=Table(
            ("k", "k largest", "k random", "random, least", "random, most", "trained with k"),
            [(p["k"], p["largest"], p["random"], *(p["random_range"] or (None, None)), p["trained"]) for p in d["points"]],
        ),
    )


def _geometry(d: dict[str, Any], file: str, made_by: str) -> Picture:
    first = d["lines"][0]
    norms, cosine = first["norms"], first["cosines"]["delta_base"]
    size = f"{norms['delta'] / norms['base']:.2f} times the norm of the intact row" if norms["base"] else f"norm {norms['delta']:.3g}"
    columns = ("row or column", "intact", "broken", "change", "result", "cos(change, intact)", "effective entries", "of")
    rows: list[list[Cell]] = [
        [
            x["region"],
            *(x["norms"][n] for n in ("base", "broken", "delta", "merged")),
            x["cosines"]["delta_base"],
            x["participation"],
            x["changed"],
        ]
        for x in d["lines"]
    ]
    return Picture(
        "Where the patch points",
        f"The change of {first['region']} has {size}, and a cosine of {cosine:+.2f} to it",
        "Euclidean norms, in units of the weights. Effective entries: participation ratio of the change, (sum d²)² / sum d⁴.",
        file,
        made_by,
        shown=Table(columns, rows, d["of"]),
        table=Table(
            ("entry", "change", "intact", "rank by size of change"), [(e["entry"], e["delta"], e["base"], e["rank"]) for e in first["top"]]
        ),
    )


def _channel(d: dict[str, Any], file: str, made_by: str) -> Picture:
    states = {STATES[s]: v for s, v in d["states"].items()}
    rows = [{"x": i, "y": v, "series": name} for name, state in states.items() for i, v in enumerate(state["positions"])]
    against = ", ".join(f"{percent(v['ratio'])} {name}" for name, v in states.items() if name != "intact")
    return Picture(
        "What the patch writes",
        f"The peak of channel {d['channel']}, as a share of the intact model's: {against}",
        f"Mean size of residual channel {d['channel']} after {d['written_by']} has written it, by position in the window "
        "(position 0 is the first token), over all windows.",
        file,
        made_by,
        chart=lines(rows, _legend(states), "position in the window", f"|channel {d['channel']}|"),
        table=Table(("state", "position", "mean size"), [(r["series"], r["x"], r["y"]) for r in rows]),
    )


def _sink(d: dict[str, Any], file: str, made_by: str) -> Picture:
    states = {STATES[s]: v for s, v in d["states"].items()}
    rows = [{"x": i, "y": v, "series": name} for name, shares in states.items() for i, v in enumerate(shares)]
    most = {name: max(shares) for name, shares in states.items()}
    return Picture(
        "Where attention goes",
        "Attention to the first position, in the layer with most: " + ", ".join(f"{percent(v)} {name}" for name, v in most.items()),
        f"Share of attention on position 0, by layer: mean over heads and {many(d['windows'], 'window')}.",
        file,
        made_by,
        chart=lines(
            rows, _legend(states), "layer", "share of attention", d["uniform"], "attention spread evenly", percent=True,
            ticks=range(len(next(iter(states.values())))),
        ),
        table=Table(("state", "layer", "share"), [(r["series"], r["x"], r["y"]) for r in rows]),
    )  # fmt: skip


def _legend(states: dict[str, Any]) -> dict[str, str]:
    return {name: COLOURS[name] for name in states}


def _influence(d: dict[str, Any], file: str, made_by: str) -> Iterator[Picture]:
    """Each story beside what chance gives: groups of words, then documents and frequencies."""
    n = d["permutations"]
    if d["groups"]:
        yield _groups(d["groups"], n, file, made_by)
    classes = [{**s, "name": f"{s['name']} times"} for s in d["frequencies"]]
    for name, strata, beside in (
        ("document", d["documents"], "words of the same frequency in the other documents"),
        ("class of frequency", classes, "words of other frequencies in the same documents"),
    ):
        if tested := [s for s in strata if s["p"] is not None]:
            yield _strata(name, tested, beside, n, file, made_by)
    top = d["top"]
    by_document = list(d["top_by_document"].items())
    yield Picture(
        "Tokens that change most",
        f"Of the {len(top)} tokens that change most, {by_document[0][1]} stand in one document of {d['documents_seen']}",
        "A ranking, not a finding: it shows what the text is about. KL(intact || broken) in nats, booked on the token that is predicted. "
        f"How documents are told apart: {d['documents_rule']}.",
        file,
        made_by,
        shown=Table(
            ("KL, nats", "context", "token", "document"),
            [(t["kl_broken"], t["context"], t["token"], t["title"]) for t in top[:LISTED]],
            len(top),
        ),
        table=Table(("document", "of the top tokens"), by_document),
    )  # fmt: skip


def _groups(groups: Sequence[dict[str, Any]], n: int, file: str, made_by: str) -> Picture:
    own, near, anywhere = "the group", "words of the same documents and frequency", "all other tokens"
    rows: list[Row] = []
    for g in groups:
        rows += _placed(g["name"], {own: g["mean_kl"], near: g["same_documents_kl"], anywhere: g["others_kl"]})
    names = ", ".join(f"{g['name']} (p {g['p_corrected']:.2g})" for g in groups if g["holds"])
    others = ", ".join(f"{g['name']} (p {g['p_corrected']:.2g})" for g in groups if not g["holds"])
    parts = [f"Hit harder than other words of their documents: {names}"] if names else []
    parts += [f"{'not' if names else 'Not'} shown to be hit harder than other words of their documents: {others}"] if others else []
    columns = {
        "name": "group",
        "tokens": "tokens",
        "mean_kl": "mean KL",
        "same_documents_kl": "same documents",
        "others_kl": "all others",
        "p_naive": "p, tokens from anywhere",
        "p_within": "p within documents",
        "p_corrected": "corrected",
        "p_document": "p of documents",
    }
    return Picture(
        "The influence null",
        "; ".join(parts),
        "Mean KL(intact || broken), nats per token, of the group's tokens beside two controls. p: one-sided, within documents and classes "
        f"of frequency, {n:,} permutations, corrected over the groups. A bare ranking compares with all other tokens, and so takes what a "
        "document is about for an effect of the weights.",
        file,
        made_by,
        chart=dumbbells(rows, {own: "broken", near: "control", anywhere: "base"}, "mean KL, nats per token"),
        table=Table(list(columns.values()), [[g[key] for key in columns] for g in groups]),
    )


def _strata(name: str, strata: Sequence[dict[str, Any]], beside: str, n: int, file: str, made_by: str) -> Picture:
    drawn = strata[:DRAWN]
    names = [s["name"] for s in drawn]
    rows: list[Row] = []
    for i, s in enumerate(drawn):
        row = s["name"] if names.count(s["name"]) == 1 else f"{i + 1}. {s['name']}"
        rows += _placed(row, {"observed": s["mean_kl"], "expected": s["expected_kl"]}, f", p {s['p_corrected']:.2g}")
    hit = [s["name"] for s in strata if s["p_corrected"] <= LEVEL]
    plural = f"{name}s" if name == "document" else "classes of frequency"
    which = f" ({', '.join(hit)})" if 0 < len(hit) <= 3 else ""
    least = min(s["p_corrected"] for s in strata)
    return Picture(
        f"Influence by {name}",
        f"{len(hit)} of {len(strata)} {plural}{which} {'is' if len(hit) == 1 else 'are'} hit harder than comparable words elsewhere"
        if hit
        else f"None found: no {name} of {len(strata)} is hit harder than comparable words (smallest corrected p {least:.2g})",
        f"Mean KL(intact || broken), nats per token. Expected: {beside}. p: one-sided, {n:,} permutations of whole words, corrected over "
        f"all {len(strata)}." + (f" The {DRAWN} with the largest KL are drawn." if len(strata) > DRAWN else ""),
        file,
        made_by,
        chart=dumbbells(rows, {"observed": "broken", "expected": "control"}, "mean KL, nats per token"),
        table=Table(
            (name, "tokens", "mean KL", "expected", "p", "corrected p"),
            [[s[key] for key in ("name", "tokens", "mean_kl", "expected_kl", "p", "p_corrected")] for s in strata],
        ),
    )


def _placed(row: str, values: dict[str, float], more: str = "") -> list[Row]:
    """The dots of one row, with where their numbers stand: beside the outermost, above what is between. more: said behind the last."""
    ordered = sorted(values.items(), key=lambda item: item[1])
    places = ["low", *["mid"] * (len(ordered) - 2), "high"]
    return [
        {"row": row, "x": v, "series": s, "says": f"{v:.3f}{more if place == 'high' else ''}", "place": place}
        for (s, v), place in zip(ordered, places, strict=True)
    ]
