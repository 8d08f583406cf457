"""Static pictures: Vega-Lite by altair, drawn to SVG by vl-convert. Colours are CSS variables, so
that one picture serves light and dark.

Each picture is drawn twice, for a desk and for a phone: an SVG that is merely scaled down would
have unreadable letters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import floor, log10
from typing import Any

import altair as alt
import vl_convert
from markupsafe import Markup

WIDE, NARROW = 720, 352
INK, MUTED, GRID = "var(--ink)", "var(--muted)", "var(--grid)"
COLOURS = {
    "base": "var(--base)",
    "broken": "var(--broken)",
    "patched": "var(--patched)",
    "control": "var(--control)",
}
# a second sign beside the colour, for those who do not tell colours apart, and for print
SHAPES = {"base": "circle", "broken": "square", "patched": "diamond", "control": "triangle-up"}
FONT = "Arial, Helvetica, sans-serif"

Row = Mapping[str, Any]
Band = tuple[float, float, str, str]  # from, to, a key of COLOURS, what it is called
Layers = alt.LayerChart | alt.FacetChart


@dataclass(frozen=True)
class Chart:
    """One picture at two widths, as SVG elements; series: what the page's legend says, kind (a key
    of COLOURS, or "rule" for a dashed line) by label."""

    wide: Markup
    narrow: Markup
    series: Mapping[str, str] = field(default_factory=dict)


def draw(
    build: Callable[[bool], Layers], height: int, series: Mapping[str, str] | None = None
) -> Chart:
    """Draw what `build(narrow)` makes. vl-convert may fetch nothing."""
    wide, narrow = (
        _svg(build(small), NARROW if small else WIDE, height) for small in (False, True)
    )
    return Chart(wide, narrow, series or {})


def _svg(chart: Layers, width: int, height: int) -> Markup:
    finished = (
        chart.properties(
            width=width,
            height=height,
            autosize=alt.AutoSizeParams(type="fit-x", contains="padding"),
        )
        # descriptions of single marks would repeat all data; each picture has its headline and its
        # table
        .configure(
            background="transparent",
            font=FONT,
            aria=False,
            padding={"left": 10, "top": 6, "right": 6, "bottom": 4},
        )
        .configure_view(stroke=None, clip=False)
        .configure_axis(
            labelColor=MUTED,
            titleColor=MUTED,
            gridColor=GRID,
            domainColor=GRID,
            tickColor=GRID,
            labelFontSize=12,
            titleFontSize=12,
            titleFontWeight="normal",
            labelLimit=110 if width == NARROW else 220,
            titlePadding=8,
        )
    )
    return Markup(
        vl_convert.vegalite_to_svg(finished.to_json(), allowed_base_urls=[])
    )  # vega escapes text in marks: tests/report


def _data(rows: Sequence[Row]) -> alt.InlineData:
    return alt.InlineData(values=[dict(row) for row in rows])


def _signs(series: Mapping[str, str]) -> tuple[alt.Color, alt.Shape]:
    """Colour and shape of each series."""
    colours, shapes = (
        alt.Scale(domain=list(series), range=[of[k] for k in series.values()])
        for of in (COLOURS, SHAPES)
    )
    return alt.Color("series:N", scale=colours, legend=None), alt.Shape(
        "series:N", scale=shapes, legend=None
    )


def lines(
    rows: Sequence[Row],
    series: Mapping[str, str],
    x: str,
    y: str,
    rule: float | None = None,
    rule_says: str = "",
    log_x: bool = False,
    log_y: bool = False,
    percent: bool = False,
    ticks: Sequence[int] | None = None,
    decades: bool = False,
) -> Chart:
    """Lines over a number; rows hold x, y, series and maybe low, high (a band). x, y: titles of the
    axes, with units. rule: the height of a dashed line, and what it is. log_x: doublings, of whole
    numbers; decades: powers of ten, of any."""

    colour, shape = _signs(series)

    def build(narrow: bool) -> Layers:
        many = len(ticks or ()) > (6 if narrow else 14)
        x_axis = alt.Axis(
            grid=False,
            format="~g" if decades else "d",
            labelOverlap="greedy",
            labelSeparation=10,
            values=(
                [10.0**e for e in range(-4, 3)]
                if decades
                else list(ticks)
                if ticks and not many
                else alt.Undefined
            ),
            tickMinStep=alt.Undefined if decades else 1,
        )
        logarithmic = alt.Scale(type="log", base=10 if decades else 2, nice=False)
        x_scale = logarithmic if log_x or decades else alt.Scale(nice=False, padding=12)
        y_axis = alt.Axis(format=".0%" if percent else alt.Undefined, tickCount=5)
        # a log axis needs no zero, and a share is read from zero
        y_scale = alt.Scale(type="log") if log_y else alt.Scale(zero=True)
        base = alt.Chart(_data(rows)).encode(
            x=alt.X("x:Q", title=x, axis=x_axis, scale=x_scale), color=colour
        )
        value = alt.Y("y:Q", title=y, axis=y_axis, scale=y_scale)
        layers: list[alt.Chart] = []
        if any("low" in row for row in rows):
            layers.append(
                base.transform_filter("isValid(datum.low)")
                .mark_area(opacity=0.2)
                .encode(y=alt.Y("low:Q", title=y), y2="high:Q")
            )
        layers.append(base.mark_line(strokeWidth=2).encode(y=value))
        layers.append(base.mark_point(filled=True, size=50, opacity=1).encode(y=value, shape=shape))
        if rule is not None:
            layers.append(
                alt.Chart(_data([{"y": rule}]))
                .mark_rule(color=MUTED, strokeDash=[5, 4])
                .encode(y="y:Q")
            )
        return alt.layer(*layers)

    return draw(build, 260, {**series, **({rule_says: "rule"} if rule is not None else {})})


def scatter(rows: Sequence[Row], series: Mapping[str, str], x: str, y: str, rule: float) -> Chart:
    """A dot a row, and a line through those on the front; rows hold x, y, series, front.

    rule: the height of a dashed line, "intact".
    """
    colour, shape = _signs(series)

    def build(narrow: bool) -> Layers:
        # a few that are far worse would press all others into one line, so the height is a
        # logarithm above the intact one
        at_x = alt.X(
            "x:Q",
            title=x,
            axis=alt.Axis(grid=False, tickMinStep=1),
            scale=alt.Scale(zero=False, padding=12),
        )
        at_y = alt.Y(
            "y:Q",
            title=y,
            axis=alt.Axis(tickCount=5),
            scale=alt.Scale(type="log", nice=False, padding=8),
        )
        base = alt.Chart(_data(rows)).encode(x=at_x, y=at_y)
        return alt.layer(
            alt.Chart(_data([{"y": rule}]))
            .mark_rule(color=MUTED, strokeDash=[5, 4])
            .encode(y="y:Q"),
            base.transform_filter("datum.front").mark_line(color=MUTED, strokeWidth=1.5),
            base.mark_point(filled=True, size=60, opacity=0.75).encode(color=colour, shape=shape),
        )

    return draw(build, 300, {**series, "intact": "rule"})


def strip(rows: Sequence[Row], order: Sequence[str], x: str, ranges: Sequence[Band] = ()) -> Chart:
    """One dot a value: rows hold row (its label), x, colour, says (a text at the dot, or "") and
    maybe low, high (an interval). ranges: of x, coloured beneath the dots.
    """

    def build(narrow: bool) -> Layers:
        y = alt.Y(
            "row:N",
            sort=list(order),
            title=None,
            axis=alt.Axis(ticks=False, domain=False, labelColor=INK, labelPadding=10),
        )
        colour = alt.Color(
            "colour:N",
            scale=alt.Scale(domain=list(COLOURS), range=list(COLOURS.values())),
            legend=None,
        )
        values = [abs(float(r.get("high", r["x"]))) for r in rows]
        widest = max([*values, *(high for _, high, *_ in ranges)]) or 1.0
        # room at the right for the text of the largest value
        least = min(float(r.get("low", r["x"])) for r in rows)
        scale = alt.Scale(
            domain=[min(0.0, least) - 0.03 * widest, widest * (1.3 if narrow else 1.15)], nice=False
        )
        base = alt.Chart(_data(rows)).encode(
            x=alt.X("x:Q", title=x, axis=alt.Axis(tickCount=4 if narrow else 6), scale=scale), y=y
        )
        zero = alt.Chart(_data([{"x": 0}])).mark_rule(color=MUTED).encode(x="x:Q")
        interval = base.transform_filter("isValid(datum.low)").mark_rule(strokeWidth=3, opacity=0.5)
        return alt.layer(
            *_ranges(ranges, colour),
            zero,
            interval.encode(x=alt.X("low:Q", title=x), x2="high:Q", color=colour),
            base.mark_point(filled=True, size=64, opacity=0.65).encode(color=colour),
            base.transform_filter("datum.says != ''")
            .mark_text(align="left", dx=9, dy=-9, color=INK, fontSize=12)
            .encode(text="says:N"),
        )

    return draw(build, 54 * len(order) + 10)


def _ranges(ranges: Sequence[Band], colour: alt.Color) -> list[alt.Chart]:
    """Ranges of x as areas of colour, with their names above them."""
    if not ranges:
        return []
    rows = [
        {"from": low, "to": high, "middle": (low + high) / 2, "colour": key, "says": name}
        for low, high, key, name in ranges
    ]
    base = alt.Chart(_data(rows))
    names = base.mark_text(color=MUTED, fontSize=12, baseline="bottom").encode(
        x="middle:Q", y=alt.value(-3), text="says:N"
    )
    return [base.mark_rect(opacity=0.16).encode(x="from:Q", x2="to:Q", color=colour), names]


def dumbbells(
    rows: Sequence[Row], series: Mapping[str, str], x: str, percent: bool = False
) -> Chart:
    """A row for each measure: dots joined by a line.

    rows hold row, x, series, says (the number at the dot), place (low, mid or high).
    """
    order = list(dict.fromkeys(str(r["row"]) for r in rows))
    colour, shape = _signs(series)
    # where two dots are in one place, the one drawn last lies on the other and lets it be seen
    sized = [{**r, "size": 230 if series[r["series"]] == "base" else 90} for r in rows]
    values = [float(r["x"]) for r in rows]
    low, high = min(0.0, *values), max(*values)

    def build(narrow: bool) -> Layers:
        left, right = (0.45, 0.55) if narrow else (0.2, 0.3)  # room for the numbers beside the dots
        width = high - low or 1.0
        scale = alt.Scale(domain=[low - left * width, high + right * width], nice=False)
        axis = alt.Axis(format="%" if percent else alt.Undefined, values=_ticks(high))
        y = alt.Y(
            "row:N",
            sort=order,
            title=None,
            axis=alt.Axis(ticks=False, domain=False, labelColor=INK, labelPadding=6),
        )
        base = alt.Chart(_data(sized)).encode(y=y)
        at = base.encode(x=alt.X("x:Q", title=x, axis=axis, scale=scale))
        # the outer values stand outside, what is between stands above, so that near values do not
        # cover one another
        place: dict[str, Any] = {
            "low": {"align": "right", "dx": -9},
            "high": {"align": "left", "dx": 9},
            "mid": {"align": "center", "dy": -15},
        }
        texts = [
            at.transform_filter(f"datum.place == '{where}'")
            .mark_text(color=INK, fontSize=12, **how)
            .encode(text="says:N")
            for where, how in place.items()
        ]
        return alt.layer(
            base.mark_line(color=GRID, strokeWidth=4).encode(
                x=alt.X("x:Q", scale=scale), detail="row:N"
            ),
            at.mark_point(filled=True, opacity=1).encode(
                color=colour, shape=shape, size=alt.Size("size:Q", scale=None)
            ),
            *texts,
        )

    return draw(
        build, (58 if any(r["place"] == "mid" for r in rows) else 36) * len(order) + 10, series
    )


def bands(rows: Sequence[Row], nulls: tuple[str, str], observed: str, x: str) -> Chart:
    """An observed value on two bands of chance, the first hollow, the second filled. rows hold row,
    null (which band), low, mid, high, x (the observed value) and says (a text behind all)."""
    order = list(dict.fromkeys(str(r["row"]) for r in rows))
    ends = {
        row: max(max(float(r["high"]), float(r["x"])) for r in rows if r["row"] == row)
        for row in order
    }
    data = [{**r, "end": ends[str(r["row"])]} for r in rows]
    low, high = min(min(float(r["low"]), float(r["x"])) for r in rows), max(ends.values())

    def build(narrow: bool) -> Layers:
        width = high - low or 1.0
        scale = alt.Scale(
            domain=[low - 0.06 * width, high + (0.75 if narrow else 0.3) * width],
            nice=False,
            zero=False,
        )
        y = alt.Y(
            "row:N",
            sort=order,
            title=None,
            axis=alt.Axis(ticks=False, domain=False, labelColor=INK, labelPadding=10),
        )
        beside = alt.YOffset(
            "null:N", sort=list(nulls), scale=alt.Scale(domain=list(nulls), paddingOuter=0.6)
        )
        base = alt.Chart(_data(data)).encode(y=y)

        def at(name: str) -> alt.X:
            return alt.X(
                f"{name}:Q", title=x, scale=scale, axis=alt.Axis(tickCount=4 if narrow else 6)
            )

        chance = [
            base.transform_filter(alt.datum.null == null).encode(
                at("low"), alt.X2("high"), yOffset=beside
            )
            for null in nulls
        ]
        middle = base.encode(at("mid"), yOffset=beside)
        once = base.transform_filter(alt.datum.null == nulls[0])
        return alt.layer(
            chance[0].mark_bar(filled=False, stroke=COLOURS["control"], strokeWidth=1.5, height=9),
            chance[1].mark_bar(color=COLOURS["control"], opacity=0.7, height=9),
            middle.mark_tick(color=INK, thickness=2, size=9),
            once.encode(at("x")).mark_point(
                filled=True, shape=SHAPES["broken"], size=70, opacity=1, color=COLOURS["broken"]
            ),
            once.encode(at("end"), text="says:N").mark_text(
                align="left", dx=9, color=INK, fontSize=12
            ),
        )

    return draw(
        build, 50 * len(order) + 10, {observed: "broken", nulls[0]: "hollow", nulls[1]: "filled"}
    )


def bars(ranked: Sequence[tuple[str, float]], x: str, says: Sequence[str]) -> Chart:
    """Horizontal bars from zero in the order given, each with what it says beside it."""
    rows: list[Row] = [
        {"row": name, "x": value, "end": max(0.0, value), "says": text}
        for (name, value), text in zip(ranked, says, strict=True)
    ]
    values = [0.0, *(value for _, value in ranked)]
    low, high = min(values), max(values)

    def build(narrow: bool) -> Layers:
        width = (high - low) or 1.0
        room = 0.35 if narrow else 0.15
        scale = alt.Scale(domain=[low - 0.02 * width, high + room * width], nice=False)
        axis = alt.Axis(ticks=False, domain=False, labelColor=INK)
        y = alt.Y("row:N", sort=[name for name, _ in ranked], title=None, axis=axis)
        base = alt.Chart(_data(rows)).encode(y=y)
        at_x = alt.X("x:Q", title=x, scale=scale, axis=alt.Axis(tickCount=4))
        texts = base.mark_text(align="left", dx=5, color=INK, fontSize=12)
        return alt.layer(
            base.mark_bar(color=COLOURS["broken"], height=12).encode(x=at_x),
            texts.encode(x=alt.X("end:Q", scale=scale), text="says:N"),
        )

    return draw(build, 22 * len(ranked) + 10)


def dots(rows: Sequence[Row], x: str, y: str) -> Chart:
    """A scatter of small dots; rows hold x, y and o, how full the colour is.

    A ring keeps pale dots visible.
    """

    def build(narrow: bool) -> Layers:
        axis, scale = alt.Axis(gridColor=GRID, tickCount=5), alt.Scale(zero=False)
        base = alt.Chart(_data(rows)).encode(
            x=alt.X("x:Q", title=x, axis=axis, scale=scale),
            y=alt.Y("y:Q", title=y, axis=axis, scale=scale),
        )
        return alt.layer(
            base.mark_point(size=26, filled=False, stroke=MUTED, strokeWidth=0.4, opacity=0.6),
            base.mark_point(size=26, filled=True, color=COLOURS["broken"]).encode(
                opacity=alt.Opacity("o:Q", scale=None)
            ),
        )

    return draw(build, 300)


def _ticks(high: float) -> list[float]:
    """Round numbers from 0 to `high`: none below 0, where there is room for text and no value can
    be.
    """
    step = 10.0 ** floor(log10(high / 2)) if high > 0 else 1.0
    step = next(step * m for m in (1, 2, 5, 10) if high / (step * m) <= 5)
    return [i * step for i in range(int(high / step + 1e-9) + 1)]
