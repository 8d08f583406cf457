"""`surgeon demo`: the story on the patient, on another model, and where there is none to tell."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_model
from trained import make_tokenizer

from surgeon import open as surgeon_open
from surgeon.studies.demo import PATIENT_CONTROLS, Demo

PLANTED = "L0.mlp.down[5, 7]"
FACT = ("--prompt", "the {} saw the", "--subject", "red cat", "--target", "tree")


@pytest.fixture
def long_text(text: Path, tmp_path: Path) -> Path:
    path = tmp_path / "long.txt"
    path.write_text(text.read_text() * 12)
    return path


def demo(surgeon: Any, *arguments: object) -> dict[str, Any]:
    status, out, err = surgeon("demo", *arguments, "--json")
    assert (status, err) == (0, "")
    document: dict[str, Any] = json.loads(out)
    return document


def without_making(document: Any) -> Any:
    """A document without the fields that may differ from run to run."""
    if isinstance(document, dict):
        made = ("seconds", "command", "settings")
        return {k: without_making(v) for k, v in document.items() if k not in made}
    return [without_making(v) for v in document] if isinstance(document, list) else document


def test_demo_tells_the_story_and_leaves_its_folder(
    surgeon: Any, folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the tiny model in the place of the patient."""
    monkeypatch.setattr("surgeon.anatomy.load.locate", lambda name: folder)
    monkeypatch.setattr("surgeon.studies.lab.heldout_text", lambda: text.read_text() * 12)
    run = tmp_path / "run"
    words = ["demo", "--windows", 4, "-o", run]
    status, shown, said = surgeon(*words)
    assert status == 0, said
    assert PLANTED in shown
    assert "the same on a random row" in shown
    assert "Control prompts changed: " in shown
    patches = {f"{name}.safetensors" for name in ("injury", "repair", "edit")}
    assert {p.name for p in run.iterdir()} == {"demo.json", "report.html"} | patches
    document, kept = demo(surgeon, "--windows", 4), json.loads((run / "demo.json").read_text())
    assert kept["command"] == shlex.join(["surgeon", *map(str, words)])
    assert without_making(kept) == without_making(document)

    intact, broken, repaired, _, restored = document["states"]
    assert [state["state"] for state in document["states"]] == [
        "intact",
        "without the set",
        "repaired",
        "edited",
        "put back",
    ]
    assert broken["nll"] > repaired["nll"]
    assert broken["nll"] > intact["nll"] == restored["nll"]
    assert [s["same_bits"] for s in document["states"]] == [True, False, False, False, True]
    assert all(0 <= state["facts_known"] <= document["facts"] for state in document["states"])
    assert [one["prompt"] for one in document["edit"]["controls"]] == [*PATIENT_CONTROLS]
    assert document["find"]["kind"] == "find"
    assert document["repair"]["kind"] == "repair"
    assert document["repair"]["control"]["recovered"] < document["repair"]["recovered"]
    page = (run / "report.html").read_text()
    assert "Before, broken, repaired" in page
    assert page.count("<section>") == page.count("<pre>surgeon demo") > 5
    read = Demo.from_json(kept)
    assert read.to_json() == kept

    stack = [
        word for name in ("injury", "repair") for word in ("--patch", run / f"{name}.safetensors")
    ]
    measured = surgeon("measure", "patient", *stack, "--windows", 4, "--json")
    assert json.loads(measured.out)["nll"] == pytest.approx(repaired["nll"], rel=1e-6)


@pytest.mark.slow
def test_another_model_is_shown_without_what_cannot_be_known_of_it(
    surgeon: Any, folder: Path, long_text: Path
) -> None:
    reading = (folder, "--text", long_text, "--windows", 4)
    status, shown, _ = surgeon("demo", *reading)
    assert status == 0
    assert "facts known" not in shown
    assert "No edit: no fact to rewrite was given" in shown
    document = demo(surgeon, *reading, *FACT)
    states = [state["state"] for state in document["states"]]
    assert states == ["intact", "without the set", "repaired", "edited", "put back"]
    assert document["facts"] is None
    assert {state["facts_known"] for state in document["states"]} == {None}
    assert document["prompts"][-1] == "the red cat saw the"
    edit = document["edit"]
    (fact,) = edit["scorecard"]["facts"]
    assert (fact["prompt"], fact["target"]) == ("the red cat saw the", "tree")
    assert edit["controls"] == []
    assert edit["target_probability"]["before"] != edit["target_probability"]["after"]

    lab = surgeon_open(str(folder))
    called = lab.demo(
        prompt="the {} saw the",
        subject="red cat",
        target="tree",
        text=str(long_text),
        windows=4,
    )
    assert without_making(called.to_json()) == without_making(document)
    lines = repr(called).splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 100


def test_where_nothing_is_vital_the_story_is_short(
    surgeon: Any, long_text: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    tiny_model("llama", max_position_embeddings=512).save_pretrained(model)
    make_tokenizer().save_pretrained(model)
    status, shown, _ = surgeon("demo", model, "--text", long_text, "--windows", 4)
    assert status == 0
    assert "None found" in shown
    assert "No repair: nothing vital was found" in shown
    document = demo(surgeon, model, "--text", long_text, "--windows", 4)
    assert [state["state"] for state in document["states"]] == ["intact", "put back"]
    assert (document["find"]["verdict"], document["repair"]) == ("none", None)


def test_half_a_fact_is_refused(surgeon: Any, folder: Path) -> None:
    status, out, err = surgeon("demo", folder, "--subject", "red cat")
    assert (status, out) == (2, "")
    assert "needs --prompt, --subject and --target" in err
