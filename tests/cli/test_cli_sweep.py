"""`surgeon sweep`: its rows against the single verbs, resuming, refusing, tables; and as a process
that is interrupted.
"""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sweep_work import InlineCrew

from surgeon.sweep import Store, query

PLANTED = "L0.mlp.down[5, 7]"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    """The local engine works in this process; the pool itself has its tests in tests/sweep."""
    monkeypatch.setattr("surgeon.studies.sweep.LocalCrew", InlineCrew)


@pytest.fixture
def plan(folder: Path, text: Path, tmp_path: Path) -> Any:
    """A plan file with the tiny checkpoint and its text."""

    def write(operations: str, more: str = "") -> Path:
        path = tmp_path / "plan.yaml"
        path.write_text(
            f"models: ['{folder}']\ntext: {text}\nwindow: 16\nwindows:"
            f" null\n{more}operations:\n{operations}"
        )
        return path

    return write


MEASURE = "  - measure\n"


def rows(folder: Path, operation: str) -> list[dict[str, Any]]:
    found = query(
        Store(folder), f"SELECT * FROM results WHERE operation = '{operation}' ORDER BY ALL"
    )
    return [
        {k: v for k, v in zip(found.columns, row, strict=True) if v is not None}
        for row in found.rows
    ]


def test_an_operation_gives_what_its_verb_gives(
    surgeon: Any, plan: Any, folder: Path, text: Path, tmp_path: Path
) -> None:
    """The injury of a measurement, by hand; tests/studies/test_faces.py does the same for all."""
    injury, out = tmp_path / "injury.safetensors", tmp_path / "out"
    reading = ("--text", text, "--window", 16, "--json")

    def says(*arguments: object) -> dict[str, Any]:
        status, stdout, _ = surgeon(*arguments)
        assert status == 0
        return dict(json.loads(stdout))

    written = surgeon("ablate", folder, "--at", PLANTED, "--mode", "scale:0.5", "-o", injury)
    assert written.status == 0
    status, stdout, _ = surgeon(
        "sweep",
        plan(
            "  - measure\n  - {name: measure, params: {patches: [injury.safetensors]}}\n"
            "  - {name: find, params: {only: mlp.down}}\n"
            f"  - {{name: verify, grid: {{at: [vital, ['{PLANTED}',"
            f" '{PLANTED.replace('7', '8')}']]}}}}\n"
            "  - {name: measure, params: {at: vital}, grid: {mode: [zero, 'scale:0.5']}}\n",
            "seeds: [1]\n",
        ),
        "-o",
        out,
        "--json",
    )
    document = json.loads(stdout)
    assert (status, document["tasks"], document["done"], document["failed"]) == (0, 7, 7, [])
    assert (document["kind"], document["missing"]) == ("sweep", [])

    verify = says("verify", folder, "--at", PLANTED, "--seed", 1, *reading)
    base = says("measure", folder, *reading)
    halved = says("measure", folder, "--patch", injury, *reading)
    measured = {(r["patches"], r["at"], r["mode"]): r for r in rows(out, "measure")}
    plain = measured["[]", "[]", "zero"]
    assert (plain["nll"], plain["ppl"]) == (base["nll"], base["ppl"])
    assert "damage_nats" not in plain
    patched = measured[f'["{injury}"]', "[]", "zero"]
    assert (patched["nll"], patched["kl_from_base"]) == (halved["nll"], halved["kl_from_base"])
    assert patched["base_nll"] == base["nll"]
    assert (patched["tokens"], patched["text"], patched["model"]) == (
        halved["tokens"],
        text.name,
        str(folder),
    )
    zeroed, scaled = measured["[]", "vital", "zero"], measured["[]", "vital", "scale:0.5"]
    assert zeroed["damage_nats"] == pytest.approx(verify["joint_nats"], rel=1e-9)
    assert (scaled["nll"], scaled["damage_nats"]) == (halved["nll"], halved["damage_nats"])
    assert zeroed.get("seed") is None

    [found] = rows(out, "find")
    [one] = says("find", folder, "--only", "mlp.down", "--seed", 1, *reading)["sets"]
    assert (found["strongest"], found["geometry"], found["entries"]) == (PLANTED, "single", 1)
    assert (found["verdict"], found["vital"]) == ("found", True)
    assert found["joint_nats"] == one["damage"]["joint_nats"]
    assert found["controls_max_nats"] == one["controls"]["max_nats"]

    single, double = sorted(rows(out, "verify"), key=lambda r: "8" in r["at"])
    assert single["joint_nats"] == verify["joint_nats"]
    assert (single["ci95_low"], single["ci95_high"]) == tuple(verify["ci95"])
    assert single["controls_median_nats"] == verify["controls"]["median_nats"]
    assert (single["seed"], single["vital"], single["parts"]) == (1, True, 1)
    assert json.loads(double["at"]) == [PLANTED, PLANTED.replace("7", "8")]


def test_nothing_found_is_a_row_too(surgeon: Any, plan: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    path = plan("  - {name: find, params: {min_nats: 50}}\n")
    assert surgeon("sweep", path, "-o", out).status == 0
    [row] = rows(out, "find")
    assert (row["verdict"], row["sets"], row["min_nats"]) == ("none", 0, 50.0)
    assert row["base_nll"] > 0
    assert "joint_nats" not in row


def test_resume_and_failures(surgeon: Any, plan: Any, tmp_path: Path) -> None:
    """A task that fails costs its own result alone, is named, and is tried again."""
    out = tmp_path / "out"
    bad = "  - {name: measure, params: {at: 'L9.mlp.down[0, 0]'}}\n"
    status, stdout, err = surgeon("sweep", plan(MEASURE + bad), "-o", out)
    assert status == 1
    assert "plan: 2 tasks, 1 done now, 1 failed; results in" in stdout
    assert "failed: measure(at L9.mlp.down[0, 0]) on" in stdout
    assert "this model has 3 layers" in stdout
    assert err == "surgeon: 1 of 2 tasks failed; the same command tries them again.\n"
    status, stdout, _ = surgeon("sweep", plan(MEASURE + bad), "-o", out, "--json")
    document = json.loads(stdout)
    assert (status, document["done_before"], document["done"], len(document["failed"])) == (
        1,
        1,
        0,
        1,
    )
    before = {p.name: p.read_bytes() for p in (out / "results").iterdir()}
    status, stdout, err = surgeon("sweep", plan(MEASURE), "-o", out)
    assert (status, err) == (0, "")
    assert "1 tasks, 1 were done before, 0 done now" in stdout
    assert {p.name: p.read_bytes() for p in (out / "results").iterdir()} == before


def test_dry_run(surgeon: Any, plan: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    status, stdout, err = surgeon(
        "sweep", plan(MEASURE + "  - find\n", "seeds: [0, 1]\n"), "-o", out, "--dry-run"
    )
    assert (status, err) == (0, "")
    assert "3 of 3 tasks are to be run" in stdout
    assert not out.exists()
    assert (
        len(
            json.loads(surgeon("sweep", plan(MEASURE), "-o", out, "--dry-run", "--json").out)[
                "missing"
            ]
        )
        == 1
    )


@pytest.mark.parametrize(
    ("operations", "said"),
    [
        ("  - mesure\n", "mesure is not an operation; did you mean measure?"),
        ("  - {name: find, grid: {rounds: [4, 0]}}\n", "rounds is 0; it must be at least 1."),
        ("  - {name: find, params: {layers: 3}}\n", "layers is 3; it should be a list or nothing."),
        ("  - {name: find, params: {layers: '3'}}\n", "layers 3 is no range of layers"),
        ("  - {name: find, params: {controls: 3}}\n", "controls is 3; it must be at least 20."),
        (
            "  - {name: measure, params: {patches: [nowhere.safetensors]}}\n",
            "nowhere.safetensors of patches cannot be read",
        ),
        ("  - {name: verify, params: {at: 5}}\n", "at is 5; it should be text or a list of texts."),
        ("  - {name: measure, params: {mode: halve}}\n", "'halve' is not a way to ablate"),
    ],
)
def test_a_bad_plan_is_refused_before_any_work(
    surgeon: Any, plan: Any, tmp_path: Path, operations: str, said: str
) -> None:
    status, stdout, err = surgeon("sweep", plan(operations), "-o", tmp_path / "out")
    assert (status, stdout) == (2, "")
    assert said in err
    assert "operation 1" in err
    assert not (tmp_path / "out").exists()


def test_usage(surgeon: Any, plan: Any, tmp_path: Path) -> None:
    path = plan(MEASURE)
    assert "are for --engine ray" in surgeon("sweep", path, "--address", "auto").err
    assert "--engine" in surgeon("sweep", path, "--help").out
    assert "table" in surgeon("sweep", "--help").out
    assert (
        surgeon("sweep", "--engine", "local", path, "--dry-run").status == 0
    )  # options may stand first
    assert "cannot be read" in surgeon("sweep", tmp_path / "none.yaml").err
    assert (
        "cannot be read" in surgeon("sweep", "./table").err
    )  # a plan, for its name is not the bare word
    (tmp_path / "busy").mkdir()
    (tmp_path / "busy" / "x").write_text("")
    assert "is no folder of a sweep" in surgeon("sweep", path, "-o", tmp_path / "busy").err
    assert surgeon("sweep", path, "-o", tmp_path / "busy").status == 2


def test_tables(surgeon: Any, plan: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    swept = plan(
        "  - {name: find, params: {only: mlp.down}}\n"
        "  - {name: measure, params: {at: vital}, grid: {mode: [zero, flip]}}\n",
        "seeds: [0, 1]\n",
    )
    assert surgeon("sweep", swept, "-o", out).status == 0
    status, stdout, err = surgeon("sweep", "table", out)
    assert (status, err) == (0, "")
    assert all(
        word in stdout for word in ("operation", "damage_nats", "strongest", "L0.mlp.down[5, 7]")
    )
    sql = "SELECT mode, damage_nats FROM results WHERE operation = 'measure' ORDER BY mode"
    document = json.loads(surgeon("sweep", "table", out, "--sql", sql, "--json").out)
    assert [r["mode"] for r in document["table"]] == ["flip", "zero"]
    assert document["columns"] == ["mode", "damage_nats"]
    table = list(csv.reader(io.StringIO(surgeon("sweep", "table", out, "--sql", sql, "--csv").out)))
    assert table[0] == ["mode", "damage_nats"]
    assert [float(r[1]) for r in table[1:]] == [r["damage_nats"] for r in document["table"]]
    document = json.loads(
        surgeon(
            "sweep",
            "table",
            out,
            "--by",
            "operation",
            "--show",
            "joint_nats",
            "--show",
            "vital",
            "--json",
        ).out
    )
    assert [(r["operation"], r["n"]) for r in document["table"]] == [
        ("find", 2),
        ("measure", 2),
    ]
    joint = [
        r[0]
        for r in query(Store(out), "SELECT joint_nats FROM results WHERE operation = 'find'").rows
    ]
    assert document["table"][0]["joint_nats"] == pytest.approx(sum(joint) / 2)
    assert document["table"][0]["vital"] == 1.0
    for arguments, said in {
        ("--sql", sql, "--by", "mode"): "give --sql or --by",
        ("--show", "vital"): "give --sql or --by",
        ("--csv", "--json"): "give --csv or --json, not both.",
        ("--by", "colour"): "have no column colour",
        ("--by", "mode", "--show", "strongest"): "strongest holds no numbers",
        ("--sql", "COPY results TO 'x.csv'"): "DuckDB cannot run",
    }.items():
        status, stdout, err = surgeon("sweep", "table", out, *arguments)
        assert (status, stdout) == (2, ""), arguments
        assert said in err
    next((out / "results").iterdir()).unlink()
    assert "1 tasks of this sweep have no result yet" in surgeon("sweep", "table", out).err
    status, _, err = surgeon("sweep", "table", tmp_path)
    assert status == 2
    assert "is no folder of a sweep" in err


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["local", "ray"])
def test_engines_give_the_same_rows(
    surgeon: Any, process: Any, plan: Any, tmp_path: Path, engine: str
) -> None:
    """The real engines in a process of its own, against the tasks done here."""
    path = plan(
        "  - measure\n  - {name: measure, params: {at: vital}, grid: {mode: [zero, flip]}}\n"
        "  - find\n"
    )
    assert surgeon("sweep", path, "-o", tmp_path / "here").status == 0
    status, out, err = process(
        "sweep",
        path,
        "-o",
        tmp_path / "there",
        "--engine",
        engine,
        "--workers",
        2,
        "--threads",
        1,
        "--json",
    )
    assert status == 0, err
    assert json.loads(out)["done"] == 4
    here, there = (
        {p.name: p.read_bytes() for p in (tmp_path / w / "results").iterdir()}
        for w in ("here", "there")
    )
    assert here == there


def gone(group: int) -> bool:
    """Whether no process of the group is left; one that only watches over the others ends a moment
    after them.
    """
    for _ in range(200):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.slow
def test_interrupted_by_the_terminal(plan: Any, surgeon: Any, tmp_path: Path) -> None:
    """Ctrl-C goes to all processes of the terminal.

    What is finished stays, no process does, and the next run takes up the rest.
    """
    path, out = (
        plan("  - {name: find, params: {controls: 200}}\n", f"seeds: {list(range(40))}\n"),
        tmp_path / "out",
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    hear = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    command = [
        sys.executable,
        "-m",
        "surgeon",
        "sweep",
        str(path),
        "-o",
        str(out),
        "--workers",
        "2",
    ]
    running = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=hear,
    )
    try:
        for _ in range(2400):
            if list(out.glob("results/*.parquet")):
                break
            assert running.poll() is None, running.communicate()
            time.sleep(0.05)
        os.killpg(running.pid, signal.SIGINT)
        stdout, err = running.communicate(timeout=60)
    finally:
        running.kill()
    assert (running.returncode, stdout) == (1, "")
    done = len(list(out.glob("results/*.parquet")))
    assert f"surgeon: interrupted; {done} of 40 tasks are done and kept in {out}" in err
    assert "Traceback" not in err
    assert 0 < done < 40
    assert gone(running.pid)
    document = json.loads(surgeon("sweep", path, "-o", out, "--dry-run", "--json").out)
    assert len(document["missing"]) == 40 - done
