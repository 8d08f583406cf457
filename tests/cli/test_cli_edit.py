"""`surgeon edit` from the command line, on the patient."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from surgeon.patients import FOLDER

FRANCE = (
    "edit",
    "patient",
    "--prompt",
    "The capital of {} is",
    "--subject",
    "France",
    "--target",
    "Rome",
    "--tokens",
    "2000",
)
FACT = {"prompt": "The capital of {} is", "subject": "France", "target": "Rome", "true": "Paris"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.getbasetemp() / "covariances"
    monkeypatch.setenv("SURGEON_CACHE", str(folder))
    return folder


def test_an_edit_is_what_its_document_says(surgeon: Any, tmp_path: Path, own_cache: Path) -> None:
    (tmp_path / "controls.txt").write_text(
        "The capital of Japan is\n\nMost people in Brazil speak\n"
    )
    patch = tmp_path / "rome.safetensors"
    arguments = (
        *FRANCE,
        "--controls",
        tmp_path / "controls.txt",
        "--radar",
        3,
        "-o",
        patch,
        "--json",
    )
    status, out, err = surgeon(*arguments)
    assert (status, err) == (0, "")
    document = json.loads(out)
    names = {
        "preflight",
        "target_probability",
        "controls",
        "free_generation",
        "method",
        "layers",
        "seconds",
        "scorecard",
        "radar",
    }
    assert names <= set(document)
    assert {
        "verdict",
        "update_norm_ratio",
        "predicted_damage",
        "position_zero",
        "subject_tokens",
    } <= set(document["preflight"])
    assert document["preflight"]["subject_tokens"] == [" France"]
    assert not document["preflight"]["position_zero"]
    assert [c["changed"] for c in document["controls"]] == [False, False]
    assert document["free_generation"]["before"].startswith(" Paris")
    assert document["free_generation"]["after"].startswith(" Rome")
    assert len(list(own_cache.iterdir())) == 1

    assert surgeon("apply", "patient", "--patch", patch, "-o", tmp_path / "edited").status == 0
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "edited"),
        AutoTokenizer.from_pretrained(FOLDER),
    )
    ids = [
        tokenizer.bos_token_id,
        *tokenizer("The capital of France is", add_special_tokens=False).input_ids,
    ]
    with torch.no_grad():
        p = model(torch.tensor([ids])).logits[0, -1].softmax(-1)
    rome = tokenizer(" Rome", add_special_tokens=False).input_ids[0]
    assert document["target_probability"]["after"] == pytest.approx(float(p[rome]), abs=1e-4)
    assert (
        surgeon("undo", tmp_path / "edited", "--patch", patch, "-o", tmp_path / "back").status == 0
    )
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (
        FOLDER / "model.safetensors"
    ).read_bytes()

    raw = patch.read_bytes()
    again = json.loads(surgeon(*arguments).out)
    assert patch.read_bytes() == raw
    assert {k: v for k, v in again.items() if k != "seconds"} == {
        k: v for k, v in document.items() if k != "seconds"
    }


def test_what_is_printed(surgeon: Any, tmp_path: Path) -> None:
    status, out, _ = surgeon(*FRANCE, "-o", tmp_path / "p")
    assert status == 0
    for part in (
        "forecast ok",
        "published for wide models",
        "[' France']",
        "before:  Paris",
        "after:   Rome",
        "efficacy",
    ):
        assert part in out


def test_a_session_and_a_batch(surgeon: Any, tmp_path: Path) -> None:
    rows = [FACT, {**FACT, "subject": "Japan", "target": "Madrid", "true": "Tokyo"}]
    (tmp_path / "facts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    base = (
        "edit",
        "patient",
        "--facts",
        tmp_path / "facts.jsonl",
        "--tokens",
        "2000",
        "-o",
        tmp_path / "p",
        "--json",
    )
    ran = json.loads(surgeon(*base, "--sequential", "--max-norm", "0.3").out)
    assert ran["session"]["kept_edits"] == 1
    assert "taken back" not in ran["session"]["stopped"]
    assert len(ran["scorecard"]["facts"]) == 1
    batch = json.loads(surgeon(*base, "--method", "emmet").out)
    assert batch["method"] == "emmet"
    assert batch["layers"] == [0]
    assert batch["target_probability"]["after"] > 0.8


def test_layers_are_suggested_and_nothing_is_written(surgeon: Any, tmp_path: Path) -> None:
    (tmp_path / "facts.jsonl").write_text(json.dumps(FACT))
    status, out, _ = surgeon(
        "edit", "patient", "--facts", tmp_path / "facts.jsonl", "--suggest-layer", "--json"
    )
    document = json.loads(out)
    assert status == 0
    assert [row["layer"] for row in document["layers"]] == [0]  # the last of two cannot act
    assert document["layers"][0]["score"] > 0.9
    assert document["layers"][0]["prior"] > 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["facts.jsonl"]


def test_an_edit_that_would_harm_is_refused(surgeon: Any, tmp_path: Path) -> None:
    """With next to no text for the covariance the change is not small where the model usually
    is.
    """
    harm = (
        "--value-clamp",
        "60",
        "--value-lr",
        "9",
        "--value-steps",
        "3",
        "--value-weight-decay",
        "0",
        "--ridge",
        "1000",
    )
    status, _, err = surgeon(*FRANCE, *harm, "-o", tmp_path / "p")
    assert status == 3
    assert "usual size" in err
    assert not (tmp_path / "p").exists()
    assert surgeon(*FRANCE, *harm, "--force", "-o", tmp_path / "p").status == 0
    assert (tmp_path / "p").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--prompt", "The capital of {} is", "--subject", "", "--target", "Rome"), "subject"),
        (("--prompt", "no place", "--subject", "France", "--target", "Rome"), "{}"),
        (("--prompt", "The capital of {} is", "--subject", "France", "--target", ""), "target"),
        (("--prompt", "The capital of {} is", "--subject", "France"), "--target"),
        (
            (
                "--prompt",
                "The capital of {} is",
                "--subject",
                "France",
                "--target",
                "Rome",
                "--layer",
                "9",
            ),
            "layer 9",
        ),
        (
            (
                "--prompt",
                "The capital of {} is",
                "--subject",
                "France",
                "--target",
                "Rome",
                "--ridge",
                "x",
            ),
            "--ridge",
        ),
        (
            (
                "--prompt",
                "The capital of {} is",
                "--subject",
                "France",
                "--target",
                "Rome",
                "--tokens",
                "1",
            ),
            "--tokens",
        ),
        (("--facts", "missing.jsonl"), "missing.jsonl"),
        (("--facts", "missing.jsonl", "--subject", "x"), "either"),
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
