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
    monkeypatch.setattr("surgeon.cli.sweep.LocalCrew", InlineCrew)


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


def test_every_operation_gives_what_its_verb_gives(
    surgeon: Any, plan: Any, folder: Path, text: Path, tmp_path: Path
) -> None:
    injury, out = tmp_path / "injury.safetensors", tmp_path / "out"
    reading = ("--text", text, "--window", 16, "--json")

    def says(*arguments: object) -> dict[str, Any]:
        status, stdout, _ = surgeon(*arguments)
        assert status == 0
        return dict(json.loads(stdout))

    assert (
        surgeon("ablate", folder, "--at", PLANTED, "--mode", "scale:0.5", "-o", injury).status == 0
    )
    fact = {"prompt": "the red {} saw the", "subject": "cat", "target": "road"}
    status, stdout, _ = surgeon(
        "sweep",
        plan(
            "  - measure\n  - {name: measure, params: {patches: [injury.safetensors]}}\n  -"
            f" find\n  - {{name: verify, grid: {{at: [vital, ['{PLANTED}',"
            f" '{PLANTED.replace('7', '8')}']]}}}}\n  - {{name: ablate-damage, grid: {{mode: [zero,"
            " 'scale:0.5']}}\n  - {name: repair, params: {method: graft}}\n  - {name:"
            " quantize, params: {bits: 3, block: channel}, grid: {method: [rtn, holdout]}}\n  -"
            f" {{name: edit, params: {json.dumps(fact)}}}\n",
            "seeds: [1]\n",
        ),
        "-o",
        out,
        "--json",
    )
    document = json.loads(stdout)
    assert (status, document["tasks"], document["done"], document["failed"]) == (0, 11, 11, [])

    verify = says("verify", folder, "--at", PLANTED, "--seed", 1, *reading)
    base, halved = (
        says("measure", folder, *patch, *reading) for patch in ((), ("--patch", injury))
    )
    plain, patched = sorted(rows(out, "measure"), key=lambda r: r["kl"])
    assert (plain["nll"], plain["damage_nats"], plain["kl"], plain["top1_agreement"]) == (
        base["nll"],
        0.0,
        0.0,
        1.0,
    )
    assert (patched["nll"], patched["kl"], patched["base_nll"]) == (
        halved["nll"],
        halved["kl_from_base"],
        base["nll"],
    )
    assert (patched["tokens"], patched["text"], patched["model"]) == (
        halved["tokens"],
        text.name,
        str(folder),
    )

    [found] = rows(out, "find")
    document = says("find", folder, "--seed", 1, *reading)
    [one] = document["sets"]
    assert (found["strongest"], found["geometry"], found["entries"], found["vital"]) == (
        PLANTED,
        "single",
        1,
        True,
    )
    assert (found["joint_nats"], found["controls_max_nats"]) == (
        one["damage"]["joint_nats"],
        one["controls"]["max_nats"],
    )

    single, double = sorted(rows(out, "verify"), key=lambda r: "8" in r["at"])
    assert single["joint_nats"] == verify["joint_nats"]
    assert (single["ci95_low"], single["ci95_high"]) == tuple(verify["ci95"])
    assert (single["controls_median_nats"], single["seed"], single["vital"]) == (
        verify["controls"]["median_nats"],
        1,
        True,
    )
    assert json.loads(double["at"]) == [PLANTED, PLANTED.replace("7", "8")]

    damage = {r["mode"]: r for r in rows(out, "ablate-damage")}
    assert damage["zero"]["damage_nats"] == pytest.approx(verify["joint_nats"], rel=1e-9)
    assert damage["scale:0.5"]["nll"] == halved["nll"]
    assert damage["zero"].get("seed") is None

    assert surgeon("ablate", folder, "--at", PLANTED, "-o", injury).status == 0
    healed = says(
        "repair",
        folder,
        "--injury",
        injury,
        "-o",
        tmp_path / "p",
        "--method",
        "graft",
        "--seed",
        1,
        *reading,
    )
    [repair] = rows(out, "repair")
    assert (repair["recovered"], repair["nll_patched"], repair["kl_broken"]) == (
        healed["recovered"],
        healed["nll"]["patched"],
        healed["kl"]["broken"],
    )
    assert repair.get("control_recovered") == healed["control"]["recovered"]

    by_hand = {method: quantized_by_hand(folder, text, method) for method in ("rtn", "holdout")}
    swept = {r["method"]: r for r in rows(out, "quantize")}
    assert {method: r["nll"] for method, r in swept.items()} == pytest.approx(by_hand, abs=1e-6)
    assert {method: r["held"] for method, r in swept.items()} == {"rtn": 0, "holdout": 1}

    edited = says(
        *(
            "edit",
            folder,
            *(w for k, v in fact.items() for w in (f"--{k}", v)),
            "--seed",
            1,
            "-o",
            tmp_path / "e",
            "--no-cache",
            "--force",
        ),
        *("--windows", 1000, *reading),
    )
    [edit] = rows(out, "edit")
    assert edit["target_after"] == pytest.approx(edited["target_probability"]["after"], abs=1e-6)
    assert edit["verdict"] == edited["preflight"]["verdict"]
    assert (edit["base_nll"], edit["nll"]) == pytest.approx(
        tuple(edited["scorecard"]["nll"].values()), abs=1e-6
    )


def quantized_by_hand(folder: Path, text: Path, method: str) -> float:
    from surgeon import Anatomy, load_model
    from surgeon.anatomy import Entry
    from surgeon.corpus import load_corpus
    from surgeon.measure import mean_nll
    from surgeon.quantize import Block, Grid, QuantizeConfig, quantize_

    loaded = load_model(str(folder))
    anatomy = Anatomy.of(loaded.model)
    assert loaded.tokenizer is not None
    quantize_(
        anatomy, QuantizeConfig(Grid(3, block=Block("channel")), method), [Entry.parse(PLANTED)]
    )
    return mean_nll(
        loaded.model, load_corpus(loaded.tokenizer, text.read_text(), "text", 16).windows
    )


def test_resume_and_failures(surgeon: Any, plan: Any, tmp_path: Path) -> None:
    """A task that fails costs its own result alone, is named, and is tried again."""
    out = tmp_path / "out"
    bad = "  - {name: ablate-damage, params: {at: 'L9.mlp.down[0, 0]'}}\n"
    status, stdout, err = surgeon("sweep", plan(MEASURE + bad), "-o", out)
    assert status == 1
    assert "plan: 2 tasks, 1 done now, 1 failed; results in" in stdout
    assert "failed: ablate-damage(at L9.mlp.down[0, 0], mode zero) on" in stdout
    assert "this model has no" in stdout or "L9" in stdout
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
        ("  - quantise\n", "quantise is not an operation; did you mean quantize?"),
        ("  - {name: quantize, grid: {bits: [4, 9]}}\n", "9 bits cannot be used"),
        ("  - {name: quantize, params: {block: group}}\n", "group is no block"),
        ("  - {name: quantize, params: {method: hqq}}\n", "method hqq is not known"),
        (
            "  - {name: repair, params: {method: prayer}}\n",
            "the method 'prayer' of repair is not known",
        ),
        ("  - {name: find, params: {controls: 3}}\n", "3 controls cannot show anything"),
        (
            "  - {name: edit, params: {prompt: 'the {} is', subject: cat}}\n",
            "an edit needs prompt, subject and target, or facts",
        ),
        (
            "  - {name: edit, params: {prompt: 'the cat', subject: cat, target: dog}}\n",
            "should hold {} once",
        ),
        (
            "  - {name: edit, params: {facts: nowhere.jsonl}}\n",
            "nowhere.jsonl of facts cannot be read",
        ),
        ("  - {name: verify, params: {at: 5}}\n", "at is 5; it should be text or a list."),
        (
            "  - {name: ablate-damage, params: {mode: halve}}\n",
            "the mode halve is not known; use zero, mean, scale:F",
        ),
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
        "  - find\n  - {name: ablate-damage, grid: {mode: [zero, flip]}}\n", "seeds: [0, 1]\n"
    )
    assert surgeon("sweep", swept, "-o", out).status == 0
    status, stdout, err = surgeon("sweep", "table", out)
    assert (status, err) == (0, "")
    assert all(
        word in stdout for word in ("operation", "damage_nats", "strongest", "L0.mlp.down[5, 7]")
    )
    sql = "SELECT mode, damage_nats FROM results WHERE operation = 'ablate-damage' ORDER BY mode"
    document = json.loads(surgeon("sweep", "table", out, "--sql", sql, "--json").out)
    assert [r["mode"] for r in document["rows"]] == ["flip", "zero"]
    assert document["columns"] == ["mode", "damage_nats"]
    table = list(csv.reader(io.StringIO(surgeon("sweep", "table", out, "--sql", sql, "--csv").out)))
    assert table[0] == ["mode", "damage_nats"]
    assert [float(r[1]) for r in table[1:]] == [r["damage_nats"] for r in document["rows"]]
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
    assert [(r["operation"], r["n"]) for r in document["rows"]] == [
        ("ablate-damage", 2),
        ("find", 2),
    ]
    joint = [
        r[0]
        for r in query(Store(out), "SELECT joint_nats FROM results WHERE operation = 'find'").rows
    ]
    assert document["rows"][1]["joint_nats"] == pytest.approx(sum(joint) / 2)
    assert document["rows"][1]["vital"] == 1.0
    for arguments, said in {
        ("--sql", sql, "--by", "mode"): "give --sql, or --by",
        ("--show", "vital"): "give --sql, or --by",
        ("--csv", "--json"): "--csv or --json",
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
    path = plan("  - measure\n  - {name: ablate-damage, grid: {mode: [zero, flip]}}\n  - find\n")
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
