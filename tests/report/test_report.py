"""Each section, from small documents; the file; the command."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from html import unescape
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from report_documents import documents

from surgeon.errors import BadInput, MissingExtra
from surgeon.show.page import write_report

Folder = Callable[..., Path]
FIND = [
    "Where the channel rises",
    "Damage beside its controls",
    "The entries",
    "Looked at and rejected",
]


def read(folder: Path) -> str:
    return write_report(folder).read_text(encoding="utf-8")


def headlines(page: str) -> list[str]:
    return [unescape(h) for h in re.findall(r"<h2>(.*?)</h2>", page, re.DOTALL)]


def kinds(page: str) -> list[str]:
    return [unescape(k) for k in re.findall(r'<p class="kind">(.*?)</p>', page)][1:]


@pytest.mark.parametrize(
    ("kind", "sections"),
    [
        ("find", FIND),
        ("verify", ["Damage beside its controls"]),
        ("repair", ["Before, broken, repaired", "Training"]),
        ("recipe", ["Published and measured", "Before, broken, repaired", "Training"]),
        ("measure", ["Measured", "What it writes"]),
        ("demo", [*FIND, "The states", "What it writes"]),
        ("edit", ["An edit and its forecast", "Control prompts", "What it writes"]),
        ("edits", ["The edits", "An edit and its forecast", "Control prompts", "What it writes"]),
        ("conditioning", ["What conditions an edit"]),
        ("trace", ["Causal trace, state", "Causal trace, severed"]),
        ("average", ["Mean causal trace, mlp"]),
        (
            "explain",
            [
                "How many entries it takes",
                "Where the patch points",
                "What the patch writes",
                "Where attention goes",
                "The influence null",
                "Influence by document",
                "Influence by class of frequency",
                "Tokens that change most",
                "What it writes",
            ],
        ),
    ],
)
def test_a_section_is_there_if_its_data_are(run_folder: Folder, kind: str, sections: list[str]):
    assert kinds(read(run_folder(result=documents()[kind]))) == sections


def test_the_headline_holds_damage_and_recovery_beside_their_controls(run_folder: Folder):
    page = read(
        run_folder(demo=documents("patient")["demo"], repair=documents("patient")["repair"])
    )
    head = re.sub(r"<[^>]*>|\s+", " ", page.partition("</header>")[0])
    assert "2 weights in one row are vital to patient" in head
    assert "+0.750 nats" in head
    assert "20 matched random sets: +0.0100 at worst" in head
    assert "86%" in head
    assert "the same on a random row: 5.0%" in head


def test_none_found_is_a_result(run_folder: Folder):
    find = documents("the model")["find"]
    page = read(run_folder(find={**find, "verdict": "none", "sets": []}))
    assert headlines(page)[0].startswith(
        "None found: the tallest channel is 12.0 times the median (layer 1)"
    )
    assert "<h1>Nothing that the model cannot live without was found</h1>" in page


def test_a_set_that_is_not_vital_is_not_called_so(run_folder: Folder):
    find = documents()["find"]
    sets = [{**find["sets"][0], "vital": False}]
    page = read(run_folder(find={**find, "verdict": "none", "sets": sets}))
    assert "Verdict: not vital." in page
    assert "are vital to" not in page


def test_a_recovery_without_control_says_so(run_folder: Folder):
    repair = documents()["repair"]
    assert (
        "no control was run" in headlines(read(run_folder(repair={**repair, "control": None})))[0]
    )


def test_controls_are_drawn_one_by_one_where_they_are_known(run_folder: Folder):
    find = documents()["find"]
    dots = read(run_folder(find=find)).count('fill="var(--control)"')
    bare = {k: v for k, v in find["sets"][0]["controls"].items() if k != "nats"}
    assert (
        dots
        - read(run_folder(find={**find, "sets": [{**find["sets"][0], "controls": bare}]})).count(
            'fill="var(--control)"'
        )
        == 2 * 18
    )


@pytest.mark.parametrize(
    ("holds", "says"),
    [
        (False, "Not shown to be hit harder than other words of their documents: text (p 0.29)"),
        (True, "Hit harder than other words of their documents: text (p 0.29)"),
    ],
)
def test_a_story_is_told_as_its_test_has_it(run_folder: Folder, holds: bool, says: str):
    explain = documents()["explain"]
    explain["influence"]["groups"][0]["holds"] = holds
    assert says in headlines(read(run_folder(explain=explain)))


def test_words_that_differ_are_marked(run_folder: Folder):
    page = read(run_folder(demo=documents()["demo"]))
    assert re.findall(r"<mark>(.*?)</mark>", page) == ["c "]
    assert (
        "Texts that differ from the intact model's: without the set 1 of 1, put back 0 of 1"
        in headlines(page)
    )


def test_every_picture_has_its_data_and_a_command(run_folder: Folder):
    page = read(run_folder(**documents("a b")))
    assert len(re.findall("<section>", page)) == len(re.findall("<pre>surgeon ", page))
    assert (
        "<pre>surgeon find &#39;a b&#39; --text &#39;a b&#39; --window 250 --windows 2</pre>"
        in page
    )
    assert set(re.findall(r'From <a href="\./(\w+)\.json">', page)) == set(documents())
    for section in page.split("<section>")[1:]:
        assert "<svg" not in section or section.count("<table>") >= 1


def test_the_command_that_was_recorded_is_the_one_shown(run_folder: Folder):
    demo = {**documents()["demo"], "command": "surgeon demo -o 'my run' --json"}
    page = read(run_folder(demo=demo))
    assert set(re.findall(r"<pre>(.*?)</pre>", page)) == {"surgeon demo -o &#39;my run&#39; --json"}
    assert "add the options" not in page
    assert "add the options" in read(run_folder(demo=documents()["demo"]))


def test_a_value_above_the_naive_band_and_within_the_other_is_drawn_so(run_folder: Folder):
    """What the picture is for: the observed value beside two bands, of which only one is misled."""
    explain = documents()["explain"]
    group = explain["influence"]["groups"][0]
    group |= {"mean_kl": 1.7, "excess_kl": 0.2, "null": {"q05": -0.3, "q50": 0.0, "q95": 0.3}}
    group |= {"null_naive": {"q05": 1.2, "q50": 1.3, "q95": 1.4}}
    page = read(run_folder(explain=explain))
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


def test_the_tokens_are_counted_in_bins_that_double(run_folder: Folder):
    folder = run_folder(
        explain={**documents()["explain"], "command": "surgeon explain M --folder D"}
    )
    columns = {
        "token": ["a"] * 10,
        "kl_broken": [0.0, *[0.3] * 4, *[0.6] * 4, 6.0],
        "kl_patched": [-1e-9, *[0.01] * 9],
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "tokens.parquet")
    page = read(folder)
    (section,) = [s for s in page.split("<section>") if "How the KL is spread" in s]
    assert "Half of the 10 tokens are under 0.45 nats broken, 0.01 nats repaired" in section
    assert "the tenth that changes most holds 62% of the KL when broken" in section  # 6.0 of 9.6
    assert "<pre>surgeon explain M --folder D</pre>" in section
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
    run_folder: Folder, content: bytes | dict[str, list[object]]
):
    folder = run_folder(explain=documents()["explain"])
    if isinstance(content, bytes):
        (folder / "tokens.parquet").write_bytes(content)
    else:
        pyarrow.parquet.write_table(pyarrow.table(content), folder / "tokens.parquet")
    with pytest.raises(BadInput, match=r"tokens\.parquet is damaged or is not as"):
        write_report(folder)


def test_without_pyarrow_there_is_no_picture_of_the_tokens(
    run_folder: Folder, monkeypatch: pytest.MonkeyPatch
):
    folder = run_folder(explain=documents()["explain"])
    (folder / "tokens.parquet").write_bytes(b"damaged")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    page = read(folder)
    assert "How the KL is spread" not in page
    assert "tokens.parquet" in page


def test_the_same_folder_gives_the_same_bytes(run_folder: Folder):
    folder = run_folder(**documents())
    assert write_report(folder).read_bytes() == write_report(folder).read_bytes()
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("find.json", "{", "damaged"),
        ("find.json", '{"verdict": NaN}', "holds NaN"),
        ("find.json", "[" * 100_000, "damaged"),
        ("other.json", '{"what": 1}', "no result"),
        ("other.json", "[1]", "no result"),
        (
            "find.json",
            '{"verdict": "found", "sets": [{}], "detection": {}, "corpus": {}}',
            "find.json",
        ),
        ("measure.json", '{"nll": "x", "kl_from_base": {}, "generations": []}', "measure.json"),
    ],
)
def test_what_cannot_be_shown_is_said_in_a_sentence(
    tmp_path: Path, name: str, content: str, says: str
):
    (tmp_path / name).write_text(content)
    with pytest.raises(BadInput, match=says):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_no_folder_is_said_in_a_sentence(tmp_path: Path):
    with pytest.raises(BadInput, match="there is no folder"):
        write_report(tmp_path / "none")


def test_the_missing_extra_is_named(run_folder: Folder, monkeypatch: pytest.MonkeyPatch):
    for name in [m for m in sys.modules if m.startswith("surgeon.report.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "altair", None)
    with pytest.raises(MissingExtra, match=r"weight-surgeon\[report\]"):
        write_report(run_folder(find=documents()["find"]))


def test_the_command_writes_the_report(run_folder: Folder, capsys: pytest.CaptureFixture[str]):
    from surgeon.cli import run

    folder = run_folder(find=documents()["find"])
    assert run(["report", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder / 'report.html'}\n"
    assert run(["report", str(folder / "none")]) == 2
