"""The folder: whole files or none, one writer, and only what the manifest names."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from surgeon.errors import BadInput, MissingExtra, SurgeonError
from surgeon.sweep import Store, averages, expand, query

PLAN = (
    "seeds: [0, 1]\noperations:\n  - {name: count, grid: {value: [1, 2]}}\n  - {name: until,"
    " params: {file: x}}\n"
)


def test_results_and_errors(plan: Any, tmp_path: Path) -> None:
    tasks, store = expand(plan(PLAN)), Store(tmp_path / "deep" / "results")
    first = tasks[0]
    with store.writing({"a": 1}, tasks):
        assert store.missing(tasks) == tasks
        store.fail(first, "it went wrong.", None)
        assert store.missing(tasks) == tasks
        assert json.loads(store.error(first.id).read_text())["error"] == "it went wrong."
        store.keep(first, [{"x": 1, "y": None, "z": float("nan")}, {"x": 2, "y": None, "w": "a"}])
        assert store.missing(tasks) == tasks[1:]
    assert not store.error(first.id).exists()
    table = pyarrow.parquet.read_table(store.result(first.id))
    rows = table.to_pylist()
    assert [(r["x"], r["w"], r["value"], r["seed"], r["task"]) for r in rows] == [
        (1, None, 1, 0, first.id),
        (2, "a", 1, 0, first.id),
    ]
    assert "y" not in rows[0]
    assert json.loads(table.schema.metadata[b"surgeon"]) == first.to_json()
    assert store.tasks() == tasks
    before = store.result(first.id).read_bytes()
    store.keep(first, [{"x": 1, "y": None, "z": float("nan")}, {"x": 2, "y": None, "w": "a"}])
    assert store.result(first.id).read_bytes() == before  # the same result, the same bytes
    assert {p.name for p in store.folder.iterdir()} == {
        "manifest.json",
        "results",
        "errors",
    }


def test_half_a_file_is_never_a_result(
    plan: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks, store = expand(plan(PLAN)), Store(tmp_path / "results")

    def dies_while_writing(table: Any, path: Path) -> None:
        Path(path).write_bytes(b"PAR1")
        raise KeyboardInterrupt

    with store.writing({}, tasks):
        monkeypatch.setattr(pyarrow.parquet, "write_table", dies_while_writing)
        with pytest.raises(KeyboardInterrupt):
            store.keep(tasks[0], [{"x": 1}])
        assert store.missing(tasks) == tasks
    with store.writing({}, tasks):
        assert list((store.folder / "results").iterdir()) == []


def test_one_writer(plan: Any, tmp_path: Path) -> None:
    tasks, store = expand(plan(PLAN)), Store(tmp_path / "results")
    with (
        store.writing({}, tasks),
        pytest.raises(SurgeonError, match="another process is writing"),
        Store(store.folder).writing({}, tasks),
    ):
        pass
    with store.writing({}, tasks):  # and when the first is over, the next may
        pass


def test_folders_that_are_not_ours(plan: Any, tmp_path: Path) -> None:
    tasks = expand(plan(PLAN))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    for name, said in (
        ("other", "is no folder of a sweep and is not empty"),
        ("plan.yaml", "cannot make the folder"),
    ):
        with pytest.raises(BadInput, match=said), Store(tmp_path / name).writing({}, tasks):
            pass
    assert [p.name for p in (tmp_path / "other").iterdir()] == ["thesis.tex"]
    with pytest.raises(BadInput, match=r"its manifest\.json cannot be read"):
        query(Store(tmp_path / "other"))
    (tmp_path / "other" / "manifest.json").write_text("{}")
    with pytest.raises(BadInput, match="is damaged; run the sweep again"):
        query(Store(tmp_path / "other"))


def test_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(MissingExtra, match=r"weight-surgeon\[sweep\]"):
        Store(tmp_path)


@pytest.fixture
def filled(plan: Any, tmp_path: Path) -> Store:
    tasks, store = expand(plan(PLAN)), Store(tmp_path / "results")
    with store.writing({}, tasks):
        for number, task in enumerate(tasks[:4]):
            store.keep(task, [{"answer": 10.0 * number, "vital": number > 1, "layer": 3}])
        store.keep(tasks[4], [{"note": "it's"}])
    return store


def test_a_query_sees_all_rows_and_nothing_else(filled: Store, tmp_path: Path) -> None:
    found = query(filled, "SELECT value, seed, answer, note FROM results ORDER BY answer")
    assert found.columns == ["value", "seed", "answer", "note"]
    assert found.rows == [
        (1, 0, 0.0, None),
        (1, 1, 10.0, None),
        (2, 0, 20.0, None),
        (2, 1, 30.0, None),
        (None, None, None, "it's"),
    ]
    secret = tmp_path / "secret.csv"
    secret.write_text("a\n1\n")
    for sql in (
        f"SELECT * FROM read_csv('{secret}')",
        f"SELECT * FROM '{secret}'",
        f"COPY results TO '{tmp_path / 'out.csv'}'",
        f"ATTACH '{tmp_path / 'new.db'}'",
        "SET enable_external_access = true",
        "SELECT nothing FROM results",
        "banana",
        "",
    ):
        with pytest.raises(BadInput):
            query(filled, sql)
    assert not (tmp_path / "out.csv").exists()
    assert not (tmp_path / "new.db").exists()


def test_averages_beside_plain_arithmetic(filled: Store) -> None:
    found = averages(filled, ["operation", "value"])
    assert found.columns == [
        "operation",
        "value",
        "n",
        "answer",
        "answer_sd",
        "vital",
        "vital_sd",
        "layer",
        "layer_sd",
    ]
    assert found.rows == [
        ("count", 1, 2, 5.0, pytest.approx(50**0.5), 0.0, 0.0, 3.0, 0.0),
        ("count", 2, 2, 25.0, pytest.approx(50**0.5), 1.0, 0.0, 3.0, 0.0),
        ("until", None, 1, None, None, None, None, None, None),
    ]
    with pytest.raises(BadInput, match="no column colour; they have task, model"):
        averages(filled, ["colour"])


def test_infinite_numbers_are_averaged_too(plan: Any, tmp_path: Path) -> None:
    tasks, store = expand(plan(PLAN)), Store(tmp_path / "results")
    with store.writing({}, tasks):
        for task, answer in zip(tasks, (float("inf"), 1.0, float("nan"), 2.0), strict=False):
            store.keep(task, [{"answer": answer}])
    first, second = averages(store, ["value"]).rows
    assert first[:3] == (1, 2, float("inf"))
    assert second[:2] == (2, 2)
    assert second[2] != second[2]


def test_results_of_earlier_plans_are_left_out(filled: Store, plan: Any) -> None:
    tasks = expand(plan(PLAN.replace("[1, 2]", "[2, 3]")))
    with filled.writing({}, tasks):
        pass
    found = query(filled, "SELECT DISTINCT value FROM results WHERE operation = 'count'")
    assert (found.rows, found.missing) == ([(2,)], 2)


def test_a_damaged_result_is_named(filled: Store) -> None:
    task = filled.tasks()[0]
    filled.result(task.id).write_bytes(b"PAR1 and no more")
    with pytest.raises(SurgeonError, match=r"cannot be read.*delete that file"):
        query(filled)
