"""The page of a run folder: its sections, its headline, its data and commands; the folder; the
command.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from html import unescape
from pathlib import Path

import pytest
from made_results import (
    detection,
    edit_result,
    find_result,
    made_results,
    measurement,
    trace_average,
    trace_result,
    verification,
)

from surgeon.errors import BadInput, MissingExtra
from surgeon.show.page import write_report
from surgeon.show.pictures import KINDS
from surgeon.show.pictures.editing import beside_one_another

Folder = Callable[..., Path]
SECTIONS = {
    "find": [
        "Where the channel rises",
        "Every set",
        "Damage beside its controls",
        "The entries",
        "Damage beside its controls",
        "The entries",
        "Which set feeds which",
        "Estimated everywhere, then measured",
        "Looked at and rejected",
    ],
    "detect": ["Where the channel rises", "Candidates", "Looked at and rejected"],
    "verify": ["Damage beside its controls"],
    "ablate": ["The injury"],
    "quantize": [
        "Quantized, four ways",
        "Matrix by matrix",
        "Activations rounded, too",
        "Written",
    ],
    "measure": ["Measured", "Tasks", "What it writes"],
    "sites": ["Sites"],
    "edit": ["An edit and its forecast", "Control prompts", "What it writes"],
    "edit many": [
        "Edit by edit",
        "An edit and its forecast",
        "Control prompts",
        "What it writes",
    ],
    "edit layers": ["The layers, by trial edits"],
    "trace": ["Causal trace, state", "Causal trace, severed"],
    "trace average": ["Mean causal trace, mlp"],
    "recipe repair": ["Published and measured", "Before, broken, repaired", "Training"],
    "recipe edits": [
        "The edits",
        "An edit and its forecast",
        "Control prompts",
        "What it writes",
    ],
    "recipe conditioning": ["What conditions an edit"],
    "cells train": ["Training"],
    "cells screen": [
        "The screen",
        "Candidates pruned one by one",
        "Damage by cell type",
        "Cell types from the embeddings",
        "The screen's own controls",
    ],
    "cells map": [
        "Genes by damage",
        "Damage and difficulty",
        "Cells by damage",
        "Damage by cell type",
        "Pathways beside the equal-damage null",
        "Heads and MLP blocks",
        "By condition",
    ],
    "cells sentences": ["Cells as sentences"],
    "cells geneformer": ["Damage beside its controls"],
    # by their fields: one section for the values, one for each table
    "sweep": ["Sweep", "Sweep", "Sweep"],
    "sweep table": ["Sweep table", "Sweep table"],
    "apply": ["Apply"],
    "undo": ["Undo"],
    "export": ["Export"],
    "index": ["Index", "Index"],
    "index verify": ["Index verify"],
}
HEALING = {"repair", "explain", "demo"}  # in test_healing.py


def read(folder: Path) -> str:
    return write_report(folder).read_text(encoding="utf-8")


def headlines(page: str) -> list[str]:
    return [unescape(h) for h in re.findall(r"<h2>(.*?)</h2>", page, re.DOTALL)]


def kinds(page: str) -> list[str]:
    return [unescape(k) for k in re.findall(r'<p class="kind">(.*?)</p>', page)][1:]


def title(page: str) -> str:
    return unescape(re.findall(r"<h1>(.*?)</h1>", page, re.DOTALL)[0])


@pytest.mark.parametrize("kind", SECTIONS)
def test_a_section_is_there_if_its_data_are(run_folder: Folder, kind: str):
    page = read(run_folder(result=made_results()[kind]))
    assert kinds(page) == SECTIONS[kind]
    assert len(title(page)) > 10


def test_every_kind_is_told_from_the_others_by_its_headline(run_folder: Folder, tmp_path: Path):
    """One page each, the same model: no two of them begin with the same sentence."""
    results = made_results("model")
    assert set(results) == {*SECTIONS, *HEALING}
    titles = {title(read(run_folder(result=results[kind]))) for kind in SECTIONS}
    assert len(titles) == len(SECTIONS)


def test_sections_stand_in_the_order_of_the_story(run_folder: Folder):
    """Not in that of the files' names."""
    results = made_results()
    page = read(run_folder(z=results["find"], y=results["verify"], a=results["measure"]))
    assert kinds(page) == [s for k in ("find", "verify", "measure") for s in SECTIONS[k]]
    assert list(KINDS).index("find") < list(KINDS).index("measure")


def test_the_headline_holds_damage_beside_its_controls(run_folder: Folder):
    page = read(run_folder(find=find_result("patient")))
    head = re.sub(r"<[^>]*>|\s+", " ", page.partition("</header>")[0])
    assert "2 weights in one row are vital to patient" in head
    assert "+0.750 nats" in head
    assert "20 matched random sets: +0.0100 at worst" in head


def test_none_found_is_a_result(run_folder: Folder):
    page = read(run_folder(find=replace(find_result("the model"), sets=[])))
    assert headlines(page)[0].startswith(
        "None found: the tallest channel is 12.0 times the median (layer 1)"
    )
    assert title(page) == "Nothing that the model cannot live without was found"


def test_a_set_that_is_not_vital_is_not_called_so(run_folder: Folder):
    result = find_result()
    page = read(run_folder(find=replace(result, sets=[replace(result.sets[0], vital=False)])))
    assert "Verdict: not vital." in page
    assert "are vital to" not in page


def test_one_weight_is_not_called_two(run_folder: Folder):
    result = find_result("patient")
    critical = result.sets[0]
    one = replace(critical, parts=critical.parts[:1], size=1, entries=critical.entries[:1])
    assert title(read(run_folder(find=replace(result, sets=[one])))) == (
        "One weight is vital to patient"
    )


def test_controls_are_drawn_one_by_one(run_folder: Folder):
    """Each has its dot, on both of the chart's widths."""
    result = verification()
    dots = read(run_folder(verify=result)).count('fill="var(--control)"')
    fewer = replace(result, controls=replace(result.controls, nats=result.controls.nats[-2:]))
    assert dots - read(run_folder(verify=fewer)).count('fill="var(--control)"') == 2 * 18


def test_detection_names_its_candidates_and_calls_nothing_vital(run_folder: Folder):
    page = read(run_folder(detect=detection("patient")))
    assert "L0.mlp.down[3, 5]" in page
    assert "no damage was measured" in title(page)
    assert "Verdict" not in page


def test_an_edit_stands_beside_its_controls(run_folder: Folder):
    page = read(run_folder(edit=edit_result("patient")))
    assert title(page) == "patient says something else"
    head = re.sub(r"<[^>]*>|\s+", " ", page.partition("</header>")[0])
    assert "0.990" in head
    assert "1 of 1 control prompt changed" in head
    assert "the layer's output changes by 9.0% on ordinary text" in unescape(page)
    bare = read(run_folder(edit=replace(edit_result("patient"), controls=[])))
    assert "no control prompts were given" in bare


def test_several_edits_beside_one_another():
    named = [("one", edit_result("rome")), ("two", edit_result("memit"))]
    picture = beside_one_another(named, ["23%"])
    assert picture.headline == "2 of 2 control prompts changed their answer over 2 edits"
    assert picture.about.endswith("Published: 23%.")
    assert picture.shown is not None
    assert [row[0] for row in picture.shown.rows] == ["one", "two"]
    assert list(picture.shown.rows[0][2:6]) == [0.99, "23%", "9.0%", "ok"]


def test_a_trace_names_its_best_site_with_its_place(run_folder: Folder):
    page = read(run_folder(trace=trace_result("Rome"), average=trace_average("Rome")))
    assert "With the state of layer 1 restored at 'Rome' it is 0.900, of 0.900 clean" in headlines(
        page
    )
    assert (
        "The MLPs around of layer 0 at the last subject token: +0.400 comes back (+0.300 to +0.500)"
        in headlines(page)
    )


def test_words_that_differ_are_marked(run_folder: Folder):
    result = measurement()
    text = replace(result.generations[0], base="a b c", patched="a d c")
    page = read(run_folder(measure=replace(result, generations=[text])))
    assert re.findall(r"<mark>(.*?)</mark>", page) == ["d "]
    assert "Texts that differ from the base model's: patched 1 of 1" in headlines(page)


def test_without_patches_there_is_one_state(run_folder: Folder):
    result = replace(
        measurement(), patches=[], kl_from_base=None, top1_agreement=None, base_nll=None
    )
    page = read(run_folder(measure=result))
    assert "What the base model writes" in headlines(page)
    assert "KL from the unpatched model" not in headlines(page)[0]


def test_every_picture_has_its_data_and_a_command(run_folder: Folder):
    results = made_results("a b")
    files = {kind.replace(" ", "-"): results[kind] for kind in SECTIONS if kind in results}
    page = read(run_folder(**files))
    assert len(re.findall("<section>", page)) == len(re.findall("<pre>surgeon ", page))
    assert "<pre>surgeon verify &#39;a b&#39;</pre>" in page
    assert set(re.findall(r'From <a href="\./([\w-]+)\.json">', page)) == set(files)
    for section in page.split("<section>")[1:]:
        assert "<svg" not in section or section.count("<table>") >= 1


def test_what_else_lies_in_the_folder_is_listed(run_folder: Folder):
    folder = run_folder(find=find_result())
    (folder / "injury.safetensors").write_bytes(b"1234")
    (folder / ".hidden").write_text("")
    page = read(folder).partition("In this folder")[2]
    assert '<a href="./injury.safetensors">injury.safetensors</a>' in page
    assert "4 bytes" in page
    assert "hidden" not in page


@pytest.mark.slow
def test_the_same_folder_gives_the_same_bytes(run_folder: Folder):
    folder = run_folder(**made_results())
    assert write_report(folder).read_bytes() == write_report(folder).read_bytes()
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "damaged"),
        ('{"kind": NaN}', "holds NaN"),
        ("[" * 100_000, "damaged"),
        ('{"what": 1}', "no result"),
        ('{"kind": ["find"]}', "no result"),
        ("[1]", "no result"),
        ('{"kind": "find"}', "file.json cannot be shown: this is no result of the kind find"),
        ('{"kind": "find", "version": 1}', "file.json cannot be shown: find lacks sets"),
        ('{"kind": "find", "version": 1, "sets": 3}', r"find\.sets is damaged"),
        ('{"kind": "find", "version": 1, "sets": [{"parts": [3]}]}', r"parts"),
    ],
)
def test_what_cannot_be_shown_is_said_in_a_sentence(tmp_path: Path, content: str, says: str):
    (tmp_path / "file.json").write_text(content)
    with pytest.raises(BadInput, match=says):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_result_of_another_version_is_said_so(run_folder: Folder):
    folder = run_folder(find=find_result())
    document = json.loads((folder / "find.json").read_text())
    (folder / "find.json").write_text(json.dumps({**document, "version": 99}))
    with pytest.raises(BadInput, match="version 99"):
        write_report(folder)


def test_no_folder_is_said_in_a_sentence(tmp_path: Path):
    with pytest.raises(BadInput, match="there is no folder"):
        write_report(tmp_path / "none")


def test_the_missing_extra_is_named(run_folder: Folder, monkeypatch: pytest.MonkeyPatch):
    drawing = ("surgeon.show.page.page", "surgeon.show.pictures.")
    for name in [m for m in sys.modules if m.startswith(drawing)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "altair", None)
    with pytest.raises(MissingExtra, match=r"weight-surgeon\[report\]"):
        write_report(run_folder(find=find_result()))


def test_the_command_writes_the_report(run_folder: Folder, capsys: pytest.CaptureFixture[str]):
    from surgeon.cli import run

    folder = run_folder(find=find_result())
    assert run(["report", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder / 'report.html'}\n"
    assert run(["report", str(folder / "none")]) == 2
