"""An audit as pictures, text and annotations, from results made here."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from surgeon.anatomy import Entry, Site
from surgeon.audit import Audit, Curve, EntryAudit, MatrixAudit, SetAudit, SuperActivation
from surgeon.show.github import annotate
from surgeon.show.pictures import headline_of, pictures_of
from surgeon.show.text import print_result

DOWN = Site(0, "mlp.down")


def entry(col: int, ratio: float | None, share: float) -> EntryAudit:
    other = None if ratio is None else 2.0 * ratio
    return EntryAudit(Entry(DOWN, 5, col), 2.0, other, ratio, None, 1, share, Curve().grade(ratio))


def made_of(*sets: SetAudit) -> Audit:
    return Audit("patient", "./mine", list(sets), [MatrixAudit(DOWN, 0.9)], Curve(), 100)


ROW = SetAudit("amber", 0.7, [entry(col, 0.3 + 0.1 * col, 0.1) for col in range(10)])
LOST = SetAudit("red", None, [entry(77, None, 1.0)])
LARGE = SetAudit("red", 40.0, [entry(78, 40.0, 1.0)])


def dots(audit: Audit) -> list[tuple[str, float]]:
    """Colour and place of each dot of the wide picture, in the units of the axis."""
    chart = pictures_of(audit)[0].chart
    assert chart is not None
    svg = str(chart.wide)
    at = r'translate\(([\d.]+),[\d.]+\)"[^>]*'
    labels = re.findall(at + r">([01])(?:\.0)?</text>", svg)
    place = {label: float(x) for x, label in labels}
    unit = place["1"] - place["0"]
    marks = re.findall(at + r'd="M[^"]*A[^>]*fill="var\(--(\w+)\)"', svg)
    return [(colour, (float(x) - place["0"]) / unit) for x, colour in marks]


def test_every_entry_and_set_is_a_dot_at_its_ratio_in_the_colour_of_its_grade() -> None:
    colours = {"ok": "patched", "amber": "control", "red": "broken"}
    expected = [("control", 0.7)]  # the sum of the row
    expected += [(colours[e.verdict], e.ratio or 0.0) for e in ROW.entries]
    expected += [("broken", 0.0), ("broken", 4.0)]  # nothing finite; beyond the edge
    drawn = dots(made_of(ROW, LOST, LARGE))
    assert [colour for colour, _ in drawn] == [colour for colour, _ in expected]
    assert [x for _, x in drawn] == pytest.approx([x for _, x in expected], abs=0.02)


def test_the_ranges_of_the_grades_lie_beneath() -> None:
    chart = pictures_of(made_of(ROW))[0].chart
    assert chart is not None
    for svg in (str(chart.wide), str(chart.narrow)):
        assert re.findall(r">(ok|amber|red)</text>", svg) == ["amber", "ok", "amber"]
        assert len(re.findall(r'fill="var\(--(?:control|patched)\)"[^>]*opacity="0.16"', svg)) == 3


def test_the_page_has_the_numbers() -> None:
    audit = made_of(ROW, LOST)
    headline = headline_of(audit)
    assert headline.sentence == "The critical weights of patient in mine: red"
    assert [claim.value for claim in headline.claims] == ["× 0.70", "no finite ratio"]
    (picture,) = pictures_of(audit)
    assert picture.headline == (
        "The verdict is red; of 11 entries, each taken alone, 5 ok, 3 amber, 3 red"
    )
    assert picture.table is not None
    assert len(picture.table.rows) == 11
    assert Curve().criteria in picture.about


def test_super_activations_have_a_section_where_they_were_compared() -> None:
    ran = replace(made_of(LARGE), activations=[SuperActivation(DOWN, 5, 800.0, 400.0)])
    _, picture = pictures_of(ran)
    assert picture.headline == "The channel that changes most peaks at 0.50 times its height"
    assert picture.shown is not None
    assert list(picture.shown.rows) == [("L0.mlp.down", 5, 800.0, 400.0, 0.5)]


def test_text(capsys: pytest.CaptureFixture[str]) -> None:
    audit = replace(
        made_of(LARGE, LOST), source="found in BASE", other="a\n[red]b", not_run="it lacks weights."
    )
    print_result(audit)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        r"Verdict: red. a\n[red]b against patient; the entries were found in BASE.",
        "  red: L0.mlp.down[5, 78] 2 -> 80, ratio 40.00, rank 1 -> none",
        "  red: L0.mlp.down[5, 77] 2 -> none, ratio none, rank 1 -> none",
        "  Super activations were not compared: it lacks weights.",
        f"The rule: {Curve().criteria}.",
    ]


def test_annotations_are_one_for_each_set_and_for_the_worst_of_its_entries() -> None:
    many = SetAudit("red", 0.1, [entry(col, 0.1, 1 / 12) for col in range(12)])
    lines = annotate(made_of(many, LARGE)).splitlines()
    assert len(lines) == 1 + 8 + 1
    assert all(line.startswith("::error title=surgeon audit::red: ") for line in lines)
