"""Sections on what was found: the rising channel, the damage beside its controls, the entries."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import exp

from ...find import CriticalSet, Detection, FindResult, Link, Rejection, Suspect, Verification
from ...measure import GRADES, Controls
from .charts import Chart, Row, lines, strip
from .picture import Claim, Headline, Picture, Table, many, model_name, nats

LISTED = 300  # entries in the data of a table
MOST_SERIES = 4  # lines in the chart of heights
TOGETHER, ALONE, ALL_BUT_ONE = "all together", "each one alone", "all but one"


def find_headline(result: FindResult) -> Headline:
    model = model_name(result.provenance.model)
    vital = [one for one in result.sets if one.vital]
    if not vital:
        return Headline(f"Nothing that {model} cannot live without was found")
    first = vital[0]
    size, (low, high) = first.size, first.damage.ci95
    joint, worst = first.damage.joint_nats, first.controls.max_nats
    where = {"row": " in one row", "column": " in one column"}.get(first.geometry, "")
    sentence = f"{size:,} weights{where} are vital to {model}"
    zeroed = f"all {size:,} are"
    if size == 1:
        sentence, zeroed = f"One weight is vital to {model}", "it is"
    if len(vital) > 1:
        sentence = f"{sentence}, and {many(len(vital) - 1, 'other set')}"
    lost = f"per token lost when {zeroed} set to zero (95%: {nats(low)} to {nats(high)})"
    beside = f"{first.controls.n} matched random sets: {nats(worst)} at worst"
    perplexity = f"matched random sets: × {exp(worst):.2f} at worst"
    return Headline(
        sentence,
        [
            Claim("broken", f"{nats(joint)} nats", lost, beside),
            Claim("broken", f"× {exp(joint):.2f}", "in perplexity", perplexity),
        ],
    )


def find_pictures(result: FindResult) -> Iterator[Picture]:
    """Where channels rise, each set's damage beside its controls, and what was rejected."""
    yield _rise(result)
    if len(result.sets) > 1:
        yield _sets(result)
    for number, one in enumerate(result.sets, 1):
        which = "the set" if len(result.sets) == 1 else f"set {number}"
        size = many(one.size, "entry")
        damage = one.damage
        yield _damage(
            f"{which} of {size}",
            damage.joint_nats,
            damage.ci95,
            damage.single_nats,
            damage.leave_one_out_nats,
            one.controls,
            one.vital,
            one.criteria,
        )
        yield _entries(one, which, size)
    if result.chained:
        yield _chained(result.chained)
    if result.measured:
        yield _measured(result.measured)
    if result.rejected:
        yield _rejected(result.rejected, result.detection.bar)


def _sets(result: FindResult) -> Picture:
    """Every set on a line of its own."""
    rows = [
        (
            number,
            ", ".join(map(str, one.parts[:3])),
            one.severity,
            one.damage.joint_nats,
            one.controls.max_nats,
        )
        for number, one in enumerate(result.sets, 1)
    ]
    fatal = sum(one.severity == "fatal" for one in result.sets)
    return Picture(
        "Every set",
        f"{many(len(rows), 'set')}, of which {fatal} fatal",
        f"Damage in nats per token. By the lower end of its 95% interval a vital set is {GRADES}.",
        shown=Table(("set", "weights", "grade", "damage, nats", "worst control, nats"), rows),
    )


def _chained(links: Sequence[Link]) -> Picture:
    rows = [
        (one.first, one.then, one.channel, *one.nats, one.together_nats, one.restored_nats)
        for one in links
    ]
    columns = (
        "set",
        "feeds set",
        "channel",
        "alone, nats",
        "the other alone, nats",
        "together, nats",
        "left with the other's channel put back, nats",
    )
    return Picture(
        "Which set feeds which",
        f"{many(len(rows), 'pair')} of sets do the same work",
        "Two sets that share a channel are links of one chain if both together cost little more"
        " than the dearer alone, or if most of the first one's damage goes away once the channel"
        " behind the second is put back at its intact values. Measured on a sample.",
        shown=Table(columns, rows),
    )


def _measured(suspects: Sequence[Suspect]) -> Picture:
    rows = [(str(one.part), one.kind, one.first, one.bend, one.nats) for one in suspects]
    table = Table(
        ("weights", "kind", "first order, nats", "bend, nats", "measured, nats"), rows, len(rows)
    )
    return Picture(
        "Estimated everywhere, then measured",
        f"{many(len(rows), 'place')} with the largest estimates",
        "One pass forward and back estimates what zeroing each weight, row and column of the model"
        " would cost: to first order, and the bend by the empirical Fisher information. The"
        " largest of each kind are measured on a sample.",
        shown=Table(table.columns, rows[:8], len(rows)),
        table=table,
    )


def detect_headline(result: Detection) -> Headline:
    model = model_name(result.provenance.model)
    return Headline(f"Channels of {model} that rise and stay; no damage was measured")


def detect_pictures(result: Detection) -> Iterator[Picture]:
    """Where channels rise, and what writes them."""
    searched = result.detection
    series = [(f"channel {one.channel}", one.heights) for one in result.candidates]
    yield _heights(
        f"{many(len(result.candidates), 'channel')} above the bar of {searched.bar:.3g}",
        searched.heights,
        searched.bar,
        series,
    )
    if result.candidates:
        rows = [
            (
                one.layer,
                one.channel,
                one.height,
                str(one.contributions[0].entry),
                one.contributions[0].share,
            )
            for one in result.candidates
        ]
        yield Picture(
            "Candidates",
            f"{many(len(rows), 'channel')} that a critical set may write",
            "Detection names candidates; only damage decides whether one is vital, and none was"
            " measured here.",
            shown=Table(
                ("layer", "channel", "height, times the median", "strongest entry", "its share"),
                rows,
            ),
        )
    if result.rejected:
        yield _rejected(result.rejected, searched.bar)


def verify_headline(result: Verification) -> Headline:
    return Headline(f"What {model_name(result.provenance.model)} loses without the given weights")


def verify_pictures(result: Verification) -> Iterator[Picture]:
    """Damage of the given weights beside that of the controls."""
    yield _damage(
        "the entries given",
        result.joint_nats,
        result.ci95,
        result.single_nats,
        result.leave_one_out_nats,
        result.controls,
        result.vital,
        result.criteria,
    )


def _entries(one: CriticalSet, which: str, size: str) -> Picture:
    table = Table(
        ("entry", "weight", "share of the channel's write", "rank by |w| in its matrix"),
        [(str(e.entry), e.weight, e.share, e.rank_abs) for e in one.entries[:LISTED]],
        one.size,
    )
    shape = "one entry" if one.geometry == "single" else f"a {one.geometry} of {size}"
    return Picture(
        "The entries",
        f"{which.capitalize()} is {shape}",
        "Row = output channel, column = input neuron. The share is that of what the layer writes to"
        " the channel at its peaks or on average. The largest |w| of the matrix has rank 1.",
        shown=Table(table.columns, table.rows[:5], table.of),
        table=table,
    )


def _rejected(rejected: Sequence[Rejection], bar: float) -> Picture:
    columns = {
        "height": [one.height for one in rejected],
        "damage, nats": [one.joint_nats for one in rejected],
        "worst control, nats": [one.control_max_nats for one in rejected],
    }
    known = {name: values for name, values in columns.items() if any(v is not None for v in values)}
    numbers = list(zip(*known.values(), strict=True)) or [()] * len(rejected)
    return Picture(
        "Looked at and rejected",
        f"{many(len(rejected), 'other candidate')} did not hold up",
        f"Channels that stood above the bar, {bar:.3g} times the median, and why they are not"
        " called vital. Damage: of zeroing every entry that writes the channel, in nats per token.",
        shown=Table(
            ("where", "why", *known),
            [(one.entry, one.reason, *row) for one, row in zip(rejected, numbers, strict=True)],
        ),
    )


def _rise(result: FindResult) -> Picture:
    searched = result.detection
    series = [
        (f"channel {channel}, written by the {'vital ' if one.vital else ''}set", heights)
        for one in result.sets
        for channel, heights in zip(one.channels, one.heights, strict=True)
    ]
    return _heights(_rise_headline(result), searched.heights, searched.bar, series)


def _rise_headline(result: FindResult) -> str:
    if result.verdict == "none":
        heights = result.detection.heights
        top = max(heights)
        return (
            f"None found: the tallest channel is {top:.1f} times the median (layer"
            f" {heights.index(top)}), and nothing that writes such a channel is vital"
        )
    first = next((one for one in result.sets if one.vital and one.channels), None)
    if first is None:
        return "No channel that rises and stays is written by a vital set"
    strongest = max(first.entries, key=lambda one: abs(one.share))
    peak = max(height for heights in first.heights for height in heights)
    return (
        f"Layer {strongest.layer} writes channel {', '.join(map(str, first.channels))}, which rises"
        f" to {peak:.1f} times the height of the median channel"
    )


def _heights(
    headline: str,
    tallest: Sequence[float],
    bar: float,
    channels: Sequence[tuple[str, Sequence[float]]],
) -> Picture:
    """The height of channels by layer, beside that of the tallest channel of each layer."""
    everyone = "tallest channel of the layer"
    series: dict[str, str] = {}
    rows: list[Row] = [{"x": i, "y": h, "series": everyone} for i, h in enumerate(tallest)]
    for name, heights in channels[: MOST_SERIES - 1]:
        series[name] = "patched" if series else "broken"
        rows += [{"x": i, "y": h, "series": name} for i, h in enumerate(heights)]
    series[everyone] = "control"
    return Picture(
        "Where the channel rises",
        headline,
        "Height of a residual channel after each layer: its peak over tokens, or its RMS, over the"
        f" median channel's. Above the bar ({bar:.3g}) a channel is looked into; but the tallest"
        " need not be vital: only damage decides, below.",
        chart=_height_chart(rows, series, bar, tallest),
        table=Table(
            ("layer", "channel", "height, times the median"),
            [(row["x"], row["series"], row["y"]) for row in rows],
        ),
    )


def _height_chart(
    rows: list[Row], series: dict[str, str], bar: float, tallest: Sequence[float]
) -> Chart:
    return lines(
        rows,
        series,
        "layer",
        "height, times the median channel",
        bar,
        f"bar {bar:.3g}",
        log_y=max(tallest) > 30 * bar,
        ticks=range(len(tallest)),
    )


def _damage(
    what: str,
    joint: float,
    ci95: tuple[float, float],
    single: Sequence[float],
    leave_one_out: Sequence[float],
    controls: Controls,
    vital: bool,
    criteria: str,
) -> Picture:
    """Damage together, alone, all but one, and of the matched controls, on one axis."""
    beside = f"{controls.n} matched controls"
    low, high = ci95
    rows: list[Row] = [
        {
            "row": TOGETHER,
            "x": joint,
            "low": low,
            "high": high,
            "colour": "broken",
            "says": nats(joint),
        }
    ]
    order = [TOGETHER, beside]
    if len(single) > 1:  # a single entry is what is taken out together
        rows += [{"row": ALONE, "x": v, "colour": "broken", "says": ""} for v in single]
        rows += [
            {"row": ALL_BUT_ONE, "x": v, "colour": "broken", "says": ""} for v in leave_one_out
        ]
        order += [ALONE, ALL_BUT_ONE]
    worst = controls.nats.index(controls.max_nats)
    for number, value in enumerate(controls.nats):
        says = f"worst {nats(value)}" if number == worst else ""
        rows.append({"row": beside, "x": value, "colour": "control", "says": says})
    listed = ""
    if len(single) > 1:
        listed = f" (each one alone and all but one: of the {len(single)} strongest)"
    names = {TOGETHER: "joint", beside: "control", ALONE: "single", ALL_BUT_ONE: "leave one out"}
    return Picture(
        "Damage beside its controls",
        f"Zeroing {what} costs {nats(joint)} nats per token; the worst of {controls.n} matched"
        f" controls {nats(controls.max_nats)}",
        "Damage: NLL after minus NLL before, on the same tokens. Each dot is one"
        f" measurement{listed}; the bar is the 95% interval over windows. Controls:"
        f" {controls.matched}. Verdict: {'vital' if vital else 'not vital'}. To be vital takes"
        f" {criteria}.",
        chart=strip(rows, order, "damage, nats per token"),
        table=Table(
            ("what was zeroed", "damage, nats per token", "95% from", "to"),
            [(names[row["row"]], row["x"], row.get("low"), row.get("high")) for row in rows],
        ),
    )
