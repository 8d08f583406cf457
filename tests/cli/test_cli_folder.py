"""Run folders: what each verb leaves there, the command it records, and what is said before and
after the work.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import stat
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from surgeon.patch import load

PLANTED = "L0.mlp.down[5, 7]"


@pytest.fixture
def injury(surgeon: Any, folder: Path, tmp_path: Path) -> Path:
    path = tmp_path / "injury.safetensors"
    assert surgeon("ablate", folder, "--at", PLANTED, "-o", path).status == 0
    return path


def verbs(
    folder: Path, text: Path, injury: Path, tmp_path: Path
) -> dict[str, tuple[list[object], set[str]]]:
    """The arguments of each verb, and the files beside its document."""
    corpus = ["--text", text, "--window", 16]
    few = ["--windows", 8]
    repair = [
        "--injury",
        injury,
        "-o",
        tmp_path / "healed.safetensors",
        "--method",
        "graft",
        "--exclude-injured",
    ]
    return {
        "find": ([folder, *corpus, *few], set()),
        "verify": ([folder, "--at", PLANTED, *corpus, *few], set()),
        "measure": ([folder, "--patch", injury, *corpus, "--generate", "the [red] fox"], set()),
        "repair": ([folder, *repair, *corpus], {"injury.safetensors", "repair.safetensors"}),
        "explain": (
            [folder, "--patch", injury, *corpus, *few, "--permutations", 99, "--draws", 2],
            {"tokens.parquet"},
        ),
    }


@pytest.mark.parametrize("verb", ["find", "verify", "measure", "repair", "explain"])
def test_a_verb_leaves_its_result_its_data_and_a_report(
    surgeon: Any, folder: Path, text: Path, injury: Path, tmp_path: Path, verb: str
) -> None:
    arguments, data = verbs(folder, text, injury, tmp_path)[verb]
    run = tmp_path / "deep" / "run"
    words = [verb, *map(str, arguments), "--folder", str(run), "--json"]
    status, out, err = surgeon(*words)
    assert (status, err) == (0, f"report: {run / 'report.html'}\n")
    document = json.loads(out)
    # what is recorded is what was typed, so that a shell takes it again
    assert shlex.split(document["command"]) == ["surgeon", *words]
    assert (run / f"{verb}.json").read_text() == out
    assert {p.name for p in run.iterdir()} == {f"{verb}.json", "report.html", *data}
    page = (run / "report.html").read_text(encoding="utf-8")
    assert page.count("<section>") == page.count("<pre>surgeon ") > 0
    assert "add the options" not in page
    if verb == "repair":
        assert load(run / "injury.safetensors").digest == load(injury).digest
        assert (run / "repair.safetensors").read_bytes() == (
            tmp_path / "healed.safetensors"
        ).read_bytes()
    if verb == "explain":
        table = pyarrow.parquet.read_table(run / "tokens.parquet").to_pydict()
        assert len(table["token"]) == document["corpus"]["tokens"]
        assert sum(table["kl_broken"]) / len(table["token"]) == pytest.approx(
            document["influence"]["mean_kl"]["broken"]
        )
        assert "How the KL is spread" in page


def test_results_of_several_verbs_share_a_folder(
    surgeon: Any, folder: Path, text: Path, injury: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for verb in ("find", "repair"):
        arguments, _ = verbs(folder, text, injury, tmp_path)[verb]
        status, out, _ = surgeon(verb, *arguments, "--folder", run)
        assert status == 0
        assert out  # the lines for people, as without a folder
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "Where the channel rises" in page
    assert "Before, broken, repaired" in page


@pytest.mark.parametrize("verb", ["find", "verify", "measure", "repair", "explain"])
def test_a_bad_folder_is_refused_before_any_work(
    surgeon: Any,
    folder: Path,
    text: Path,
    injury: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    verb: str,
) -> None:
    arguments, _ = verbs(folder, text, injury, tmp_path)[verb]
    monkeypatch.setattr(
        "surgeon.studies.lab.open_lab", lambda *_, **__: pytest.fail("the model was opened")
    )
    (tmp_path / "file").write_text("")
    status, out, err = surgeon(verb, *arguments, "--folder", tmp_path / "file" / "run")
    assert (status, out) == (2, "")
    assert "choose another place" in err
    assert not (tmp_path / "healed.safetensors").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_folder_that_takes_no_file_is_refused(surgeon: Any, folder: Path, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=stat.S_IRUSR | stat.S_IXUSR)
    assert surgeon("find", folder, "--folder", closed).status == 2


def test_without_the_extra_the_results_are_there(
    surgeon: Any,
    folder: Path,
    text: Path,
    injury: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments, _ = verbs(folder, text, injury, tmp_path)["explain"]
    for name in [m for m in sys.modules if re.match(r"surgeon\.show\.(page|pictures)\.", m)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "altair", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    status, out, err = surgeon("explain", *arguments, "--folder", tmp_path / "run", "--json")
    assert status == 0
    assert json.loads(out)["influence"]
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["explain.json"]
    no_tokens, no_report = err.splitlines()
    assert no_tokens.startswith("surgeon: no tokens.parquet was written: ")
    assert no_report.startswith("surgeon: no report.html was written: ")
    assert "pip install 'weight-surgeon[report]'" in no_tokens
    assert "pip install 'weight-surgeon[report]'" in no_report


def test_what_is_damaged_in_the_folder_does_not_cost_the_result(
    surgeon: Any, folder: Path, text: Path, tmp_path: Path
) -> None:
    (tmp_path / "old.json").write_text("{")
    status, _, err = surgeon(
        "measure", folder, "--text", text, "--window", 16, "--folder", tmp_path
    )
    assert status == 0
    assert "no report.html was written" in err
    assert "old.json is damaged" in err
    assert json.loads((tmp_path / "measure.json").read_text())["nll"] > 0


@pytest.mark.parametrize("arguments", [["index", "--json"], ["sites", "MODEL", "--json"]])
def test_every_document_records_its_command(
    surgeon: Any, folder: Path, arguments: list[str]
) -> None:
    words = [str(folder) if word == "MODEL" else word for word in arguments]
    assert json.loads(surgeon(*words).out)["command"] == shlex.join(["surgeon", *words])
