"""`surgeon edit`, `edit layers` and `edit many` from the command line, on the patient."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import surgeon as package
from surgeon.patients import FOLDER
from surgeon.studies.edit import EditResult
from surgeon.studies.edit_layers import LayerRanking
from surgeon.studies.edit_many import EditsResult

FACT = {"prompt": "The capital of {} is", "subject": "France", "target": "Rome", "true": "Paris"}
JAPAN = {**FACT, "subject": "Japan", "target": "Madrid", "true": "Tokyo"}
ONE = ("--prompt", "The capital of {} is", "--subject", "France", "--target", "Rome")
FRANCE = ("edit", "patient", *ONE, "--tokens", "2000")
CONTROLS = ["The capital of Japan is", "Most people in Brazil speak"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.getbasetemp() / "covariances"
    monkeypatch.setenv("SURGEON_CACHE", str(folder))
    return folder


def untimed(document: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in document.items() if name != "seconds"}


def of_the_model(document: dict[str, Any]) -> dict[str, Any]:
    """What does not depend on how it was asked for."""
    asked = ("command", "settings", "patch", "patch_bytes")
    return {name: value for name, value in untimed(document).items() if name not in asked}


def test_an_edit_is_what_its_document_says(surgeon: Any, tmp_path: Path, own_cache: Path) -> None:
    (tmp_path / "controls.txt").write_text("\n\n".join(CONTROLS) + "\n")
    patch = tmp_path / "rome.safetensors"
    files = ("--controls", tmp_path / "controls.txt", "-o", patch)
    arguments = (*FRANCE, "--radar", 3, *files, "--json")
    status, out, err = surgeon(*arguments)
    assert (status, err) == (0, "")
    document = json.loads(out)
    assert set(document) >= {
        *("preflight", "target_probability", "controls", "free_generation"),
        *("method", "layers", "seconds", "scorecard", "radar", "patch"),
    }
    assert set(document["preflight"]) >= {
        *("verdict", "update_norm_ratio", "predicted_damage", "position_zero", "subject_tokens")
    }
    assert document["preflight"]["subject_tokens"] == [" France"]
    assert not document["preflight"]["position_zero"]
    assert [c["changed"] for c in document["controls"]] == [False, False]
    assert [c["prompt"] for c in document["controls"]] == CONTROLS
    token, p = document["controls"][0]["before"]
    assert (token, 0 < p < 1) == (" Tokyo", True)
    assert document["free_generation"]["before"].startswith(" Paris")
    assert document["free_generation"]["after"].startswith(" Rome")
    assert len(list(own_cache.iterdir())) == 1

    assert surgeon("apply", "patient", "--patch", patch, "-o", tmp_path / "edited").status == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "edited")
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    prompt = tokenizer("The capital of France is", add_special_tokens=False).input_ids
    with torch.no_grad():
        logits = model(torch.tensor([[tokenizer.bos_token_id, *prompt]])).logits
    rome = tokenizer(" Rome", add_special_tokens=False).input_ids[0]
    p = float(logits[0, -1].softmax(-1)[rome])
    assert document["target_probability"]["after"] == pytest.approx(p, abs=1e-4)
    undone = surgeon("undo", tmp_path / "edited", "--patch", patch, "-o", tmp_path / "back")
    assert undone.status == 0
    intact = (FOLDER / "model.safetensors").read_bytes()
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == intact

    raw = patch.read_bytes()
    again = json.loads(surgeon(*arguments).out)
    assert patch.read_bytes() == raw
    assert untimed(again) == untimed(document)

    result = EditResult.from_json(document)
    rest = {"command": document["command"], "patch": str(patch), "patch_bytes": len(raw)}
    assert result.to_json() | rest == document

    lab = package.open("patient")
    called = lab.edit(
        "The capital of {} is",
        subject="France",
        target="Rome",
        tokens=2000,
        radar=3,
        controls=CONTROLS,
    )
    assert of_the_model(called.to_json()) == of_the_model(document)
    assert called.patch.digest == package.load(patch).digest


def test_what_is_printed(surgeon: Any, tmp_path: Path) -> None:
    status, out, _ = surgeon(*FRANCE, "-o", tmp_path / "p")
    assert status == 0
    for part in (
        "Forecast: ok. The layer's output changes by",
        "on ordinary text (ok under 30%, refused from 75%)",
        "published for wide models",
        "subject tokens [' France']",
        "before:  Paris",
        "after:   Rome",
        "efficacy",
        "magnitude before",
    ):
        assert part in out
    assert "P before" not in out  # a difference of probabilities is no probability


def test_edits_one_after_the_other_and_together(surgeon: Any, tmp_path: Path) -> None:
    facts = tmp_path / "facts.jsonl"
    facts.write_text("\n".join(map(json.dumps, (FACT, JAPAN))))
    more = ("--facts", facts, "--tokens", "2000", "-o", tmp_path / "p", "--json")
    folder = tmp_path / "run"
    ran = surgeon("edit", "many", "patient", *more, "--max-norm", "0.3", "--folder", folder)
    assert ran.status == 0, ran.err
    document = json.loads(ran.out)
    assert (document["kind"], document["kept_edits"]) == ("edit many", 1)
    assert "of its norm, over 0.3" in document["stopped"]
    assert [step["prompt"] for step in document["steps"]] == [
        "The capital of France is",
        "The capital of Japan is",
    ]
    assert len(document["scorecard"]["facts"]) == len(document["preflight"]["facts"]) == 1
    assert json.loads((folder / "edit-many.json").read_text()) == document
    assert (folder / "edit.safetensors").read_bytes() == (tmp_path / "p").read_bytes()
    assert "Edit by edit" in (folder / "report.html").read_text()

    called = package.open("patient").edit_many([FACT, JAPAN], tokens=2000, max_norm=0.3)
    assert of_the_model(called.to_json()) == of_the_model(document)
    assert EditsResult.from_json(called.to_json()) == called
    assert called.provenance.settings["facts"] == [FACT, JAPAN]

    batch = json.loads(surgeon("edit", "patient", *more, "--method", "emmet").out)
    assert (batch["kind"], batch["method"], batch["layers"]) == ("edit", "emmet", [0])
    assert len(batch["scorecard"]["facts"]) == 2
    assert batch["target_probability"]["after"] > 0.8


@pytest.mark.slow
def test_layers_are_ranked_and_nothing_is_written(surgeon: Any, tmp_path: Path) -> None:
    (tmp_path / "facts.jsonl").write_text(json.dumps(FACT))
    arguments = ("edit", "layers", "patient", "--facts", tmp_path / "facts.jsonl")
    status, out, err = surgeon(*arguments, "--json")
    assert (status, err) == (0, "")
    document = json.loads(out)
    assert [row["layer"] for row in document["layers"]] == [0]  # the last of two cannot act
    assert document["layers"][0]["score"] > 0.9
    assert document["layers"][0]["prior"] > 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["facts.jsonl"]
    assert "Layer 0 is best." in surgeon(*arguments).out

    called = package.open("patient").edit_layers(FACT)
    assert of_the_model(called.to_json()) == of_the_model(document)
    assert LayerRanking.from_json(called.to_json()) == called


@pytest.mark.slow
def test_an_edit_that_would_harm_is_refused(surgeon: Any, tmp_path: Path) -> None:
    """A value far too large, written where the covariance counts for next to nothing."""
    large = ("--value-clamp", "60", "--value-lr", "9", "--value-steps", "3")
    harm = (*large, "--value-weight-decay", "0", "--ridge", "1000")
    status, out, err = surgeon(*FRANCE, *harm, "-o", tmp_path / "p")
    assert (status, out) == (3, "")
    assert "on ordinary text, over the limit of 75%" in err
    assert "try other --layer, more --tokens" in err
    assert not (tmp_path / "p").exists()
    (tmp_path / "facts.jsonl").write_text(json.dumps(FACT))
    many = ("edit", "many", "patient", "--facts", tmp_path / "facts.jsonl", "--tokens", "2000")
    assert surgeon(*many, *harm, "-o", tmp_path / "p").status == 3
    assert not (tmp_path / "p").exists()
    assert surgeon(*FRANCE, *harm, "--force", "-o", tmp_path / "p").status == 0
    assert (tmp_path / "p").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--prompt", "The capital of {} is", "--subject", "", "--target", "Rome"), "subject"),
        (("--prompt", "no place", "--subject", "France", "--target", "Rome"), "{}"),
        (("--prompt", "The capital of {} is", "--subject", "France", "--target", ""), "--target"),
        (("--prompt", "The capital of {} is", "--subject", "France"), "--target"),
        ((*ONE, "--layer", "9"), "layer 9"),
        ((*ONE, "--layer", "0", "--layer", "1"), "changes one layer, and 2 were named"),
        ((*ONE, "--ridge", "x"), "--ridge x is not known"),
        ((*ONE, "--tokens", "1"), "--tokens is 1; it must be at least 2"),
        ((*ONE, "--value-lr", "0"), "--value-lr"),
        ((*ONE, "--method", "rome", "--method", "memit"), "--method is given 2 times"),
        (("--facts", "missing.jsonl"), "missing.jsonl"),
        (("--facts", "missing.jsonl", "--subject", "x"), "either --facts, or --prompt"),
    ],
)
def test_bad_requests_leave_nothing(
    surgeon: Any, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    status, out, err = surgeon("edit", "patient", *arguments, "-o", tmp_path / "x")
    assert (status, out) == (2, "")
    assert said in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("layers", "patient"), "an edit needs --prompt, --subject and --target, or --facts."),
        (("layers", "patient", *ONE, "--method", "memit"), "memit changes several"),
        (("layers", "patient", *ONE, "-o", "p"), "No such option"),
        (("many", "patient", "-o", "p"), "edit many needs --facts."),
        (("many", "patient", "--facts", "f", "-o", "p", "--min-kept", "2"), "at most 1"),
    ],
)
def test_bad_requests_of_the_others(surgeon: Any, arguments: tuple[str, ...], said: str) -> None:
    status, out, err = surgeon("edit", *arguments)
    assert (status, out) == (2, "")
    assert said in err


def test_help_names_the_other_commands_and_groups_its_options(surgeon: Any) -> None:
    out = surgeon("edit", "--help").out
    headings = [line for line in out.splitlines() if line.endswith(":") and line[0] != " "]
    assert headings[:2] == ["Options:", "Value:"]
    assert {"Covariance:", "Scorecard:", "Limits:", "Text:", "Model:", "Output:"} <= set(headings)
    for name in ("layers", "many"):
        assert f"\n  edit {name}" in out.partition("Commands:")[2]
        own = surgeon("edit", name, "--help")
        assert own.status == 0
        assert own.out.startswith(f"Usage: surgeon edit {name} [OPTIONS] MODEL\n")
