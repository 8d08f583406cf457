"""`surgeon trace` from the command line, and the same from Python."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import surgeon as package
from surgeon.result import Provenance, fields_of
from surgeon.trace import TraceAverage, TraceResult

FRANCE = ("trace", "patient", "--prompt", "The capital of France is", "--subject", "France")


def provenance_of(document: dict[str, Any]) -> dict[str, Any]:
    return {name: document[name] for name in fields_of(Provenance) if name in document}


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
    called = package.open("patient").trace(
        "The capital of France is", subject="France", samples=3, sever="mlp"
    )
    for name in ("state", "mlp", "attn", "severed", "ci", "best", "p_corrupt"):
        assert called.to_json()[name] == document[name]
    assert TraceResult.from_json(document) == called.made(**provenance_of(document))
    assert len(repr(called).splitlines()) <= 40
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
    assert out.index("state restored") < out.index("mlp, 1 layer restored")
    assert "attn" not in out
    assert "the subject (*): ' France'" in out
    last = next(
        line for line in out[out.index("state restored") :].splitlines() if line.startswith("   is")
    )
    assert last.rstrip().endswith("██")
    assert "most comes back at layer 1 at ' is' 0.99" in out
    _, out, _ = surgeon(*FRANCE, "--corrupt", "noise:0.001", "--samples", 2, "--kinds", "state")
    assert "Note: corrupting the subject leaves ' Paris' at" in out
    assert "little that a restored state could bring back" in out


def test_facts(surgeon: Any, tmp_path: Path) -> None:
    rows = [("France", "Paris"), ("Japan", "Tokyo"), ("Peru", "Paris"), ("Spain", "Madrid")]
    file = tmp_path / "facts.jsonl"
    file.write_text(
        "\n".join(
            json.dumps({"prompt": "The capital of {} is", "subject": s, "true": t}) for s, t in rows
        )
    )
    arguments = ("trace", "patient", "--facts", file, "--limit", 3, "--samples", 2)
    average = json.loads(surgeon(*arguments, "--json").out)
    assert average["kind"] == "trace average"
    assert (average["facts"], average["skipped"]) == (2, 1)
    place = average["places"].index("last subject token")
    assert average["layers_by_mlp"][0]["effect"] == max(row[place] for row in average["mlp"])
    status, out, _ = surgeon(*arguments)
    assert status == 0
    assert "2 facts (1 that it does not know are left out)" in out
    assert "layers by the effect of their MLP at the subject's last token: 0 (+" in out
    listed = [{"prompt": "The capital of {} is", "subject": s, "true": t} for s, t in rows]
    called = package.open("patient").trace(facts=listed, limit=3, samples=2)
    assert called.to_json()["mlp"] == average["mlp"]
    assert called.provenance.settings["facts"] == listed
    assert TraceAverage.from_json(called.to_json()) == called


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prompt", "The capital of France is"), "needs --prompt and --subject, or --facts"),
        (("--prompt", "The capital of France is", "--subject", "Peru"), "is not in the prompt"),
        (("--prompt", "The capital of France is", "--subject", ""), "subject is empty"),
        ((*FRANCE[2:], "--answer", ""), "target is empty"),
        ((*FRANCE[2:], "--window", 0), "--window is 0; it must be at least 1"),
        ((*FRANCE[2:], "--samples", 0), "--samples is 0; it must be at least 1"),
        ((*FRANCE[2:], "--kinds", "state,head"), "--kinds head is not known; use state, mlp, attn"),
        ((*FRANCE[2:], "--kinds", ","), "--kinds names nothing to restore"),
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
