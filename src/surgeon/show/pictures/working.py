"""Sections on how a patch works: top-k curve, geometry, the channel and the attention sink."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .charts import Row, lines
from .critical import generations
from .folder import Result
from .influence import influence_pictures
from .picture import Cell, Picture, Table, command, many, percent

STATES = {"base": "intact", "broken": "broken", "patched": "repaired"}
COLOURS = {"intact": "base", "broken": "broken", "repaired": "patched"}


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
    yield from influence_pictures(d["influence"], file, made_by)
    written = d["behaviour"]["generations"]
    if written:
        states = [s for s in STATES if s in written[0]]
        yield generations(
            [(g["prompt"], [(STATES[s], g[s]) for s in states]) for g in written], file, made_by
        )


def _curve(d: dict[str, Any], file: str, made_by: str) -> Picture:
    largest, random, trained = (
        "the k largest entries",
        "k random entries (band: range)",
        "trained with k entries",
    )
    kinds = {"largest": largest, "random": random, "trained": trained}
    series = {largest: "patched", random: "control", trained: "base"}
    rows: list[Row] = []
    for p in d["points"]:
        for key, name in kinds.items():
            if p[key] is not None:
                band = (
                    dict(zip(("low", "high"), p["random_range"], strict=True))
                    if key == "random" and p["random_range"]
                    else {}
                )
                rows.append({"x": p["k"], "y": p[key], "series": name, **band})
    series = {
        name: colour for name, colour in series.items() if any(r["series"] == name for r in rows)
    }
    whole = max((p for p in d["points"] if p["largest"] is not None), key=lambda p: p["k"])
    # nine tenths of what the whole patch recovers, if it recovers anything
    enough = next(
        (
            p
            for p in d["points"]
            if p["largest"] is not None and p["largest"] >= 0.9 * whole["largest"] > 0
        ),
        whole,
    )
    k = enough["k"]
    which = "largest entry" if k == 1 else f"{k:,} largest entries"
    headline = (
        f"The {which} of {whole['k']:,} recover{'s' if k == 1 else ''} {percent(enough['largest'])}"
        " of the damage"
    )
    if enough["random"] is not None:
        headline += (
            f"; {'a random one' if k == 1 else 'as many random ones'}: {percent(enough['random'])}"
        )
    return Picture(
        "How many entries it takes",
        headline,
        "The repair cut to k of its entries; share of the damage recovered on"
        f" {many(d['tokens'], 'token')}, on a doubling axis. Below 0% the cut patch makes things"
        " worse.",
        file,
        made_by,
        chart=lines(
            rows,
            series,
            "k, entries kept",
            "recovered share of the damage",
            0.0,
            "as broken",
            log_x=True,
            percent=True,
        ),
        table=Table(
            ("k", "k largest", "k random", "random, least", "random, most", "trained with k"),
            [
                (
                    p["k"],
                    p["largest"],
                    p["random"],
                    *(p["random_range"] or (None, None)),
                    p["trained"],
                )
                for p in d["points"]
            ],
        ),
    )


def _geometry(d: dict[str, Any], file: str, made_by: str) -> Picture:
    first = d["lines"][0]
    norms, cosine = first["norms"], first["cosines"]["delta_base"]
    size = (
        f"{norms['delta'] / norms['base']:.2f} times the norm of the intact row"
        if norms["base"]
        else f"norm {norms['delta']:.3g}"
    )
    columns = (
        "row or column",
        "intact",
        "broken",
        "change",
        "result",
        "cos(change, intact)",
        "effective entries",
        "of",
    )
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
        "Euclidean norms, in units of the weights. Effective entries: participation ratio of the"
        " change, (sum d²)² / sum d⁴.",
        file,
        made_by,
        shown=Table(columns, rows, d["of"]),
        table=Table(
            ("entry", "change", "intact", "rank by size of change"),
            [(e["entry"], e["delta"], e["base"], e["rank"]) for e in first["top"]],
        ),
    )


def _channel(d: dict[str, Any], file: str, made_by: str) -> Picture:
    states = {STATES[s]: v for s, v in d["states"].items()}
    rows = [
        {"x": i, "y": v, "series": name}
        for name, state in states.items()
        for i, v in enumerate(state["positions"])
    ]
    against = ", ".join(
        f"{percent(v['ratio'])} {name}" for name, v in states.items() if name != "intact"
    )
    return Picture(
        "What the patch writes",
        f"The peak of channel {d['channel']}, as a share of the intact model's: {against}",
        f"Mean size of residual channel {d['channel']} after {d['written_by']} has written it, by"
        " position in the window (position 0 is the first token), over all windows.",
        file,
        made_by,
        chart=lines(rows, _legend(states), "position in the window", f"|channel {d['channel']}|"),
        table=Table(
            ("state", "position", "mean size"), [(r["series"], r["x"], r["y"]) for r in rows]
        ),
    )


def _sink(d: dict[str, Any], file: str, made_by: str) -> Picture:
    states = {STATES[s]: v for s, v in d["states"].items()}
    rows = [
        {"x": i, "y": v, "series": name}
        for name, shares in states.items()
        for i, v in enumerate(shares)
    ]
    most = {name: max(shares) for name, shares in states.items()}
    return Picture(
        "Where attention goes",
        "Attention to the first position, in the layer with most: "
        + ", ".join(f"{percent(v)} {name}" for name, v in most.items()),
        "Share of attention on position 0, by layer: mean over heads and"
        f" {many(d['windows'], 'window')}.",
        file,
        made_by,
        chart=lines(
            rows,
            _legend(states),
            "layer",
            "share of attention",
            d["uniform"],
            "attention spread evenly",
            percent=True,
            ticks=range(len(next(iter(states.values())))),
        ),
        table=Table(("state", "layer", "share"), [(r["series"], r["x"], r["y"]) for r in rows]),
    )


def _legend(states: dict[str, Any]) -> dict[str, str]:
    return {name: COLOURS[name] for name in states}
