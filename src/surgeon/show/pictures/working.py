"""Sections on how a patch works: top-k curve, geometry, the channel and the attention sink."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from ...explain import Channel, Curve, CurvePoint, Explanation, Geometry, Sink
from .charts import Row, lines
from .influence import influence_pictures, token_pictures
from .picture import Cell, Headline, Picture, Table, many, model_name, percent
from .texts import generations

STATES = {"base": "intact", "broken": "broken", "patched": "repaired"}
COLOURS = {"intact": "base", "broken": "broken", "repaired": "patched"}
LARGEST, RANDOM, TRAINED = (
    "the k largest entries",
    "k random entries (band: range)",
    "trained with k entries",
)


def explain_headline(result: Explanation) -> Headline:
    return Headline(f"How patches of {model_name(result.provenance.model)} work")


def explain_pictures(result: Explanation) -> Iterator[Picture]:
    """Each part of the explanation that there is."""
    if result.topk_curve is not None:
        yield _curve(result.topk_curve)
    yield _geometry(result.geometry)
    for channel in (result.channel.channels or [])[:1]:
        yield _channel(channel)
    if result.channel.attention_sink is not None:
        yield _sink(result.channel.attention_sink)
    yield from influence_pictures(result.influence)
    if result.tokens is not None:
        yield from token_pictures(result.tokens)
    if result.behaviour.generations:
        states = list(result.behaviour.summary)
        yield generations(
            [
                (each.prompt, [(STATES[state], getattr(each, state)) for state in states])
                for each in result.behaviour.generations
            ]
        )


def _curve(curve: Curve) -> Picture:
    rows = [row for point in curve.points for row in _dots(point)]
    colours = {LARGEST: "patched", RANDOM: "control", TRAINED: "base"}
    drawn = {row["series"] for row in rows}
    return Picture(
        "How many entries it takes",
        _few_entries(curve),
        "The repair cut to k of its entries; share of the damage recovered on"
        f" {many(curve.tokens, 'token')}, on a doubling axis. Below 0% the cut patch makes things"
        " worse.",
        chart=lines(
            rows,
            {name: colour for name, colour in colours.items() if name in drawn},
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
                    point.k,
                    point.largest,
                    point.random,
                    *(point.random_range or (None, None)),
                    point.trained,
                )
                for point in curve.points
            ],
        ),
    )


def _dots(point: CurvePoint) -> Iterator[Row]:
    if point.largest is not None:
        yield {"x": point.k, "y": point.largest, "series": LARGEST}
    if point.random is not None:
        low, high = point.random_range or (point.random, point.random)
        yield {"x": point.k, "y": point.random, "series": RANDOM, "low": low, "high": high}
    if point.trained is not None:
        yield {"x": point.k, "y": point.trained, "series": TRAINED}


def _few_entries(curve: Curve) -> str:
    """The fewest entries that recover nine tenths of what the whole patch does, if it does any."""
    cut = [(p.k, p.largest, p.random) for p in curve.points if p.largest is not None]
    size, whole, _ = max(cut)
    enough = [point for point in cut if point[1] >= 0.9 * whole > 0]
    k, largest, random = enough[0] if enough else max(cut)
    which = "largest entry" if k == 1 else f"{k:,} largest entries"
    verb = "recovers" if k == 1 else "recover"
    said = f"The {which} of {size:,} {verb} {percent(largest)} of the damage"
    if random is None:
        return said
    beside = "a random one" if k == 1 else "as many random ones"
    return f"{said}; {beside}: {percent(random)}"


def _geometry(geometry: Geometry) -> Picture:
    first = geometry.lines[0]
    norms, cosine = first.norms, first.cosines["delta_base"]
    size = f"norm {norms['delta']:.3g}"
    if norms["base"]:
        size = f"{norms['delta'] / norms['base']:.2f} times the norm of the intact row"
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
    rows: list[Sequence[Cell]] = [
        (
            str(line.region),
            *(line.norms[name] for name in ("base", "broken", "delta", "merged")),
            line.cosines["delta_base"],
            line.participation,
            line.changed,
        )
        for line in geometry.lines
    ]
    return Picture(
        "Where the patch points",
        f"The change of {first.region} has {size}, and a cosine of {cosine:+.2f} to it",
        "Euclidean norms, in units of the weights. Effective entries: participation ratio of the"
        " change, (sum d²)² / sum d⁴.",
        shown=Table(columns, rows, geometry.of),
        table=Table(
            ("entry", "change", "intact", "rank by size of change"),
            [(str(one.entry), one.delta, one.base, one.rank) for one in first.top],
        ),
    )


def _channel(channel: Channel) -> Picture:
    states = {STATES[name]: state for name, state in channel.states.items()}
    rows: list[Row] = [
        {"x": position, "y": size, "series": name}
        for name, state in states.items()
        for position, size in enumerate(state.positions)
    ]
    against = ", ".join(
        f"{percent(state.ratio)} {name}" for name, state in states.items() if name != "intact"
    )
    return Picture(
        "What the patch writes",
        f"The peak of channel {channel.channel}, as a share of the intact model's: {against}",
        f"Mean size of residual channel {channel.channel} after {channel.written_by} has written"
        " it, by position in the window (position 0 is the first token), over all windows.",
        chart=lines(
            rows, _legend(states), "position in the window", f"|channel {channel.channel}|"
        ),
        table=Table(
            ("state", "position", "mean size"),
            [(row["series"], row["x"], row["y"]) for row in rows],
        ),
    )


def _sink(sink: Sink) -> Picture:
    states = {STATES[name]: shares for name, shares in sink.states.items()}
    rows: list[Row] = [
        {"x": layer, "y": share, "series": name}
        for name, shares in states.items()
        for layer, share in enumerate(shares)
    ]
    most = ", ".join(f"{percent(max(shares))} {name}" for name, shares in states.items())
    return Picture(
        "Where attention goes",
        f"Attention to the first position, in the layer with most: {most}",
        "Share of attention on position 0, by layer: mean over heads and"
        f" {many(sink.windows, 'window')}.",
        chart=lines(
            rows,
            _legend(states),
            "layer",
            "share of attention",
            sink.uniform,
            "attention spread evenly",
            percent=True,
            ticks=range(max(map(len, states.values()))),
        ),
        table=Table(
            ("state", "layer", "share"), [(row["series"], row["x"], row["y"]) for row in rows]
        ),
    )


def _legend(states: Iterable[str]) -> dict[str, str]:
    return {name: COLOURS[name] for name in states}
