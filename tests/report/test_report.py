"""Each section, from small documents; the file; the command."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from html import unescape
from pathlib import Path

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
        ("recipe", ["Published and measured", "Before, broken, repaired", "Training"]),
        ("measure", ["Measured", "What it writes"]),
        ("edits", ["The edits", "An edit and its forecast", "Control prompts", "What it writes"]),
        ("conditioning", ["What conditions an edit"]),
        ("quantize", ["Quantized, four ways", "Matrix by matrix"]),
        ("sweep", ["Quantized: size and damage"]),
    ],
)
def test_a_section_is_there_if_its_data_are(run_folder: Folder, kind: str, sections: list[str]):
    assert kinds(read(run_folder(result=documents()[kind]))) == sections


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
