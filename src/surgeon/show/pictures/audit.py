"""Sections on what became of critical weights in a model made from another."""

from __future__ import annotations

from collections.abc import Iterator

from ...audit import AMBER, OK, RED, Audit, Curve, EntryAudit, SetAudit
from .charts import Band, Row, strip
from .picture import Claim, Headline, Picture, Table, many, model_name

LISTED = 300  # entries in the data of a table
MOST_SETS = 8  # rows of the picture
COLOURS = {OK: "patched", AMBER: "control", RED: "broken"}
LOWEST, HIGHEST = -1.0, 4.0  # ratios outside are drawn at the edge


def audit_headline(result: Audit) -> Headline:
    other, base = model_name(result.other), model_name(result.base)
    return Headline(
        f"The critical weights of {base} in {other}: {result.verdict}",
        [_claim(one, result.curve) for one in result.sets[:MOST_SETS]],
    )


def _claim(one: SetAudit, curve: Curve) -> Claim:
    kept = "no finite ratio" if one.ratio is None else f"× {one.ratio:.2f}"
    first = one.entries[0].entry
    what = f"is left of {first}"
    if len(one.entries) > 1:
        what = f"is left of the sum of {many(len(one.entries), 'entry')}, {first} and others"
    return Claim(
        COLOURS[one.verdict], kept, what, f"ok: from {curve.weak:g} to {curve.strong:g} times"
    )


def audit_pictures(result: Audit) -> Iterator[Picture]:
    """The ratio of every entry and set on the bands of the grades, and the super activations."""
    yield _ratios(result)
    if result.activations:
        yield _activations(result)


def _ratios(result: Audit) -> Picture:
    rows = [row for n, one in enumerate(result.sets[:MOST_SETS], 1) for row in _rows(n, one)]
    order = list(dict.fromkeys(str(row["row"]) for row in rows))
    left_out = len(result.sets) - MOST_SETS
    more = f" {many(left_out, 'set')} more: in the table." if left_out > 0 else ""
    return Picture(
        "What is left of the critical weights",
        _ratios_headline(result),
        "Ratio: the weight in the audited model over the weight in the model it was made from; of a"
        " set, what is left of the sum that its entries write, each with its share. Outside the"
        " coloured ranges the grade is red; a ratio beyond the picture stands at its edge."
        f" The rule: {result.curve.criteria}. The entries were {result.source}.{more}",
        chart=strip(rows, order, "ratio, audited over original", _bands(result.curve)),
        table=_table(result),
    )


def _ratios_headline(result: Audit) -> str:
    grades = [entry.verdict for entry in result.entries]
    counts = ", ".join(f"{grades.count(grade)} {grade}" for grade in (OK, AMBER, RED))
    alone = f"; of {many(len(grades), 'entry')}, each taken alone, {counts}"
    return f"The verdict is {result.verdict}{alone if len(grades) > 1 else ''}"


def _rows(number: int, one: SetAudit) -> Iterator[Row]:
    """A dot for each entry, above them one for the set; a single entry has its number beside it."""
    if len(one.entries) == 1:
        yield _dot(str(one.entries[0].entry), one.ratio, one.verdict, _says(one.ratio))
        return
    yield _dot(f"set {number}, its sum", one.ratio, one.verdict, _says(one.ratio))
    for entry in one.entries:
        yield _dot(f"set {number}, each entry", entry.ratio, entry.verdict, "")


def _says(ratio: float | None) -> str:
    return "no number" if ratio is None else f"{ratio:.2f}"


def _dot(row: str, ratio: float | None, verdict: str, says: str) -> Row:
    """No ratio at all stands at 0, where the weight is lost."""
    place = min(max(ratio or 0.0, LOWEST), HIGHEST)
    return {"row": row, "x": place, "colour": COLOURS[verdict], "says": says}


def _bands(curve: Curve) -> list[Band]:
    return [
        (curve.broken, curve.weak, COLOURS[AMBER], AMBER),
        (curve.weak, curve.strong, COLOURS[OK], OK),
        (curve.strong, curve.torn, COLOURS[AMBER], AMBER),
    ]


def _table(result: Audit) -> Table:
    listed = [(n, entry) for n, one in enumerate(result.sets, 1) for entry in one.entries]
    return Table(
        ("set", "entry", "before", "after", "ratio", "rank before", "rank after", "share", "grade"),
        [(number, *_cells(entry)) for number, entry in listed[:LISTED]],
        len(listed),
    )


def _cells(entry: EntryAudit) -> tuple[str | int | float | None, ...]:
    return (
        str(entry.entry),
        entry.base,
        entry.other,
        entry.ratio,
        entry.rank_base,
        entry.rank,
        entry.share,
        entry.verdict,
    )


def _activations(result: Audit) -> Picture:
    ratios = [one.ratio for one in result.activations if one.ratio is not None]
    furthest = max(ratios, key=lambda ratio: abs(ratio - 1), default=None)
    headline = "The channels do not rise in the model it was made from"
    if furthest is not None:
        headline = f"The channel that changes most peaks at {furthest:.2f} times its height"
    corpus = result.provenance.corpus
    return Picture(
        "Super activations",
        headline,
        "The largest |value| of each channel that the entries write, over all tokens"
        + ("." if corpus is None else f" of {corpus.name} ({many(corpus.tokens, 'token')})."),
        shown=Table(
            ("written by", "channel", "before", "after", "ratio"),
            [(str(a.site), a.row, a.base, a.other, a.ratio) for a in result.activations],
        ),
    )
