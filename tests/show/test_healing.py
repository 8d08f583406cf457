"""Repairs, explanations and the demo as text and as a page."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from html import unescape
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from made_results import demo, explanation, made_results, repair_result, word_group

from surgeon.errors import BadInput
from surgeon.repair import ControlRepair
from surgeon.result import Result
from surgeon.show.page import write_report
from surgeon.show.text import print_result

HOSTILE = " ".join(
    (
        "<script>document.title='x'</script>",
        '"><img src=x onerror=document.title=1>',
        "</svg></style></title><script>document.title=3</script>",
        "{{7*7}}{% raw %} [/red] [link=file:///x]",
        "javascript:alert(1) \u202e\ud800\x00\x1b[31m",
    )
)
FIND = [
    "Where the channel rises",
    "Every set",
    *["Damage beside its controls", "The entries"] * 2,
    "Which set feeds which",
    "Estimated everywhere, then measured",
    "Looked at and rejected",
]
REPAIR = ["Before, broken, repaired", "Training"]
EDIT = ["An edit and its forecast", "Control prompts", "What it writes"]
EXPLAIN = [
    "How many entries it takes",
    "Where the patch points",
    "What the patch writes",
    "Where attention goes",
    "The influence null",
    "Influence by document",
    "Influence by class of frequency",
    "Tokens that change most",
]


def read(folder: Path, *results: Result) -> str:
    """The report of a folder that holds these results."""
    folder.mkdir(exist_ok=True)
    for result in results:
        (folder / f"{result.kind}.json").write_text(json.dumps(result.to_json()))
    return write_report(folder).read_text(encoding="utf-8")


def headlines(page: str) -> list[str]:
    return [unescape(h) for h in re.findall(r"<h2>(.*?)</h2>", page, re.DOTALL)]


def head(page: str) -> str:
    return re.sub(r"<[^>]*>|\s+", " ", page.partition("</header>")[0])


@pytest.mark.parametrize(
    ("result", "sections"),
    [
        (repair_result(), REPAIR),
        (explanation(), [*EXPLAIN, "What it writes"]),
        (
            explanation(tokens={"kl_broken": [0.1, 0.2]}),
            [*EXPLAIN, "How the KL is spread", "What it writes"],
        ),
        (demo(), [*FIND, "The states", "What it writes", *REPAIR, *EDIT]),
    ],
)
def test_a_section_is_there_if_its_data_are(
    tmp_path: Path, result: Result, sections: list[str]
) -> None:
    if "tokens.parquet" in result.attachments():
        pyarrow.parquet.write_table(
            pyarrow.table(result.attachments()["tokens.parquet"]), tmp_path / "tokens.parquet"
        )
    page = read(tmp_path, result)
    assert [unescape(k) for k in re.findall(r'<p class="kind">(.*?)</p>', page)][1:] == sections
    for section in page.split("<section>")[1:]:
        assert "<svg" not in section or section.count("<table>") >= 1
    commands = re.findall(r"<pre>(.*?)</pre>", page)
    assert [unescape(command) for command in commands] == (
        [result.provenance.command] * len(sections)
    )


def test_the_headline_holds_damage_and_recovery_beside_their_controls(tmp_path: Path) -> None:
    said = head(read(tmp_path, demo("patient")))
    assert "2 weights in one row are vital to patient" in said
    assert "+0.750 nats" in said
    assert "20 matched random sets: +0.0100 at worst" in said
    assert "86%" in said
    assert "of the damage undone by a patch of 5.6 kB" in said
    assert "the same on a random row: 5.0%" in said
    assert "1 of 1 control prompt changed" in said
    assert "patient was broken and repaired" in head(
        read(tmp_path / "one", repair_result("patient"))
    )


def test_a_repair_is_told_with_its_control(tmp_path: Path) -> None:
    repair = repair_result()
    said = "A patch of 5.6 kB undoes 86% of the damage"
    for number, (control, beside) in enumerate(
        (
            (repair.control, "the same on a random row: 5.0%"),
            (None, "no control was run, so how much any row would have undone is not known"),
            (ControlRepair(None, why="few rows"), "there was no other row for a control"),
        )
    ):
        page = read(tmp_path / str(number), replace(repair, control=control))
        assert headlines(page)[:2] == [
            f"{said}; {beside}",
            "Of 50 steps, step 25 is kept: it recovers 85%, from 50% at the start",
        ]


def test_a_training_without_damage_is_told_by_its_loss(tmp_path: Path) -> None:
    repair = repair_result()
    curve = [replace(look, recovered=None) for look in repair.curve]
    page = read(tmp_path, replace(repair, curve=curve))
    assert headlines(page)[1].endswith("it has a loss of 0.1000, from 0.2000 at the start")


@pytest.mark.parametrize(
    ("p", "says"),
    [
        (0.29, "Not shown to be hit harder than other words of their documents: text (p 0.29)"),
        (0.01, "Hit harder than other words of their documents: text (p 0.01)"),
    ],
)
def test_a_story_is_told_as_its_test_has_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], p: float, says: str
) -> None:
    result = explanation(story=word_group(p_corrected=p))
    assert says in headlines(read(tmp_path, result))
    print_result(result)
    verdict = "are hit harder" if p < 0.05 else "are not shown to be hit harder"
    assert f"these words {verdict} than other words" in capsys.readouterr().out


def test_words_that_differ_are_marked(tmp_path: Path) -> None:
    page = read(tmp_path, replace(demo(), edit=None))
    assert re.findall(r"<mark>(.*?)</mark>", page) == ["c "]
    said = "Texts that differ from the intact model's: without the set 1 of 1, put back 0 of 1"
    assert said in headlines(page)
    assert (
        "Perplexity goes from 2.01 to 4.48; once put back, the model is bit for bit as before"
        in headlines(page)
    )


def test_a_value_above_the_naive_band_and_within_the_other_is_drawn_so(tmp_path: Path) -> None:
    """What the picture is for: the observed value beside two bands, of which only one is misled."""
    story = replace(
        word_group(),
        mean_kl=1.7,
        excess_kl=0.2,
        null={"q05": -0.3, "q50": 0.0, "q95": 0.3},
        null_naive={"q05": 1.2, "q50": 1.3, "q95": 1.4},
    )
    page = read(tmp_path, explanation(story=story))
    (section,) = [s for s in page.split("<section>") if "The influence null" in s]
    cells = re.findall(r"<td[^>]*>(.*?)</td>", section)
    assert cells[2:9] == ["1.700", "1.200", "1.300", "1.400", "1.200", "1.500", "1.800"]
    wide = section.partition('class="narrow"')[0]
    hollow, filled = re.findall(
        r'<path[^>]*aria-roledescription="bar"[^>]*>|<path[^>]*d="M[^"]*h[^"]*v9h[^"]*"[^>]*>', wide
    )[:2]
    (x,) = re.findall(r'transform="translate\(([\d.]+),[\d.]+\)"[^>]*fill="var\(--broken\)"', wide)

    def span(bar: str) -> tuple[float, float]:
        start, width = re.findall(r'd="M([\d.]+),[\d.]+h([\d.]+)', bar)[0]
        return float(start), float(start) + float(width)

    assert span(hollow)[1] < float(x)
    assert span(filled)[0] < float(x) < span(filled)[1]


def test_the_tokens_are_counted_in_bins_that_double(tmp_path: Path) -> None:
    columns = {
        "token": ["a"] * 10,
        "kl_broken": [0.0, *[0.3] * 4, *[0.6] * 4, 6.0],
        "kl_patched": [-1e-9, *[0.01] * 9],
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "tokens.parquet")
    page = read(tmp_path, explanation())
    (section,) = [s for s in page.split("<section>") if "How the KL is spread" in s]
    assert "Half of the 10 tokens are under 0.45 nats broken, 0.01 nats repaired" in section
    assert "the tenth that changes most holds 62% of the KL when broken" in section  # 6.0 of 9.6
    rows = [
        re.findall(r"<td[^>]*>(.*?)</td>", row)
        for row in re.findall(r"<tr>(.*?)</tr>", section)[1:]
    ]
    assert sum(int(row[2]) for row in rows) == sum(int(row[3]) for row in rows) == 10
    assert [row[2] for row in rows if row[:1] == ["0.250"]] == ["4"]
    assert '<a href="./tokens.parquet">' in page.partition("In this folder")[2]


@pytest.mark.parametrize(
    "content", [b"PAR1", b"", {"token": ["a"]}, {"kl_broken": ["a"]}, {"kl_broken": [None]}]
)
def test_tokens_that_are_damaged_are_said_so(
    tmp_path: Path, content: bytes | dict[str, list[object]]
) -> None:
    if isinstance(content, bytes):
        (tmp_path / "tokens.parquet").write_bytes(content)
    else:
        pyarrow.parquet.write_table(pyarrow.table(content), tmp_path / "tokens.parquet")
    with pytest.raises(BadInput, match=r"tokens\.parquet is damaged or is not as"):
        read(tmp_path, explanation())


def test_without_pyarrow_there_is_no_picture_of_the_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokens.parquet").write_bytes(b"damaged")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    page = read(tmp_path, explanation())
    assert "How the KL is spread" not in page
    assert "tokens.parquet" in page


@pytest.mark.parametrize("kind", made_results())
def test_hostile_text_is_printed_and_not_obeyed(
    capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    print_result(made_results(HOSTILE.replace("\ud800", ""))[kind])
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "[/red] [link=file:///x]" in shown
