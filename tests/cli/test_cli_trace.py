"""`surgeon trace` from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

FRANCE = ("trace", "patient", "--prompt", "The capital of France is", "--subject", "France")


def test_the_document(surgeon: Any) -> None:
    status, out, err = surgeon(*FRANCE, "--samples", 3, "--sever", "mlp", "--json")
    assert (status, err) == (0, "")
    document = json.loads(out)
    assert {
        "model",
        "fingerprint",
        "prompt",
        "tokens",
        "subject_range",
        "answer",
        "p_clean",
        "p_corrupt",
        "ci",
        "warnings",
    } <= set(document)
    a, b = document["subject_range"]
    assert document["tokens"][a:b] == [" France"]
    assert document["answer"] == " Paris"
    for kind in ("state", "mlp", "attn", "severed"):
        assert [len(row) for row in document[kind]] == [len(document["tokens"])] * 2
    assert document["state"][-1][-1] == pytest.approx(document["p_clean"], abs=1e-5)
    assert document["best"]["mlp"][0] == {
        "layer": 0,
        "position": a,
        "token": " France",
        "value": max(map(max, document["mlp"])),
    }
    assert document["corruption"]["noise"] == 3
    assert surgeon(*FRANCE, "--samples", 3, "--sever", "mlp", "--json").out == out


def test_a_run_folder(surgeon: Any, tmp_path: Path) -> None:
    result = surgeon(
        *FRANCE, "--samples", 2, "--kinds", "mlp", "--folder", tmp_path / "run", "--json"
    )
    assert result.status == 0, result.err
    assert json.loads((tmp_path / "run" / "trace.json").read_text()) == json.loads(result.out)


def test_the_map(surgeon: Any) -> None:
    status, out, _ = surgeon(*FRANCE, "--corrupt", "replace:Japan", "--kinds", "mlp,state")
    assert status == 0
    assert out.index("mlp, 1 layer restored") < out.index("state restored")
    assert "attn" not in out
    assert "the subject (*): ' France'" in out
    last = next(
        line for line in out[out.index("state restored") :].splitlines() if line.startswith("   is")
    )
    assert last.rstrip().endswith("██")
    assert "most comes back at layer 1 at ' is' 0.99" in out
    _, out, err = surgeon(*FRANCE, "--corrupt", "noise:0.001", "--samples", 2, "--kinds", "state")
    assert "little that a restored state could bring back" in " ".join(err.split())


def test_facts(surgeon: Any, tmp_path: Path) -> None:
    rows = [("France", "Paris"), ("Japan", "Tokyo"), ("Peru", "Paris"), ("Spain", "Madrid")]
    file = tmp_path / "facts.jsonl"
    file.write_text(
        "\n".join(
            json.dumps({"prompt": "The capital of {} is", "subject": s, "true": t}) for s, t in rows
        )
    )
    arguments = ("trace", "patient", "--facts", file, "--limit", 3, "--samples", 2)
    average = json.loads(surgeon(*arguments, "--json").out)["average"]
    assert (average["facts"], average["skipped"]) == (2, 1)
    place = average["places"].index("last subject token")
    assert average["layers_by_mlp"][0]["effect"] == max(row[place] for row in average["mlp"])
    status, out, _ = surgeon(*arguments)
    assert status == 0
    assert "2 facts (1 that it does not know are left out)" in out
    assert "layers by the effect of their MLP at the subject's last token: 0 (+" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prompt", "The capital of France is"), "needs --prompt and --subject"),
        (("--prompt", "The capital of France is", "--subject", "Peru"), "is not in the prompt"),
        (("--prompt", "The capital of France is", "--subject", ""), "subject is empty"),
        ((*FRANCE[2:], "--answer", ""), "target is empty"),
        ((*FRANCE[2:], "--window", 0), "--window 0"),
        ((*FRANCE[2:], "--samples", 0), "--samples 0"),
        ((*FRANCE[2:], "--kinds", "state,head"), "head cannot be restored"),
        ((*FRANCE[2:], "--kinds", ","), "nothing cannot be restored"),
        ((*FRANCE[2:], "--corrupt", "noise:much"), "--corrupt 'noise:much' is not known"),
        ((*FRANCE[2:], "--corrupt", "mask"), "--corrupt 'mask' is not known"),
        ((*FRANCE[2:], "--corrupt", "noise:-1"), "above 0"),
        (
            (*FRANCE[2:], "--corrupt", "replace:The Eiffel Tower"),
            "replace it with words of as many tokens",
        ),
        ((*FRANCE[2:], "--versus", "Rome"), "--metric logit"),
        ((*FRANCE[2:], "--facts", "facts.jsonl"), "give either --facts"),
        (("--facts", "no-such-file"), "cannot be read"),
        (("--facts", "facts.jsonl", "--corrupt", "replace:Japan"), "one subject only"),
    ],
)
def test_bad_input(surgeon: Any, arguments: tuple[object, ...], message: str) -> None:
    status, out, err = surgeon("trace", "patient", *arguments)
    assert (status, out) == (2, "")
    assert message in " ".join(err.split())
    assert "Traceback" not in err


def test_facts_that_the_model_does_not_know(surgeon: Any, tmp_path: Path) -> None:
    file = tmp_path / "facts.jsonl"
    file.write_text(
        json.dumps({"prompt": "The capital of {} is", "subject": "Peru", "true": "Paris"})
    )
    status, out, err = surgeon("trace", "patient", "--facts", file)
    assert (status, out) == (1, "")
    assert "answers none" in " ".join(err.split())
