"""A plan is checked to the last parameter before anything runs, and the id of a task is its
content.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from sweep_work import InlineCrew

from surgeon.anatomy.load import locate
from surgeon.errors import BadCheckpoint, BadInput, BadText
from surgeon.sweep import Task, expand, query

HEAD = "models: [patient]\ntext: story.txt\nwindow: 64\nwindows: 4\n"
COPY = HEAD.replace("patient", "copy")
COUNT = "operations:\n  - {name: count, params: {value: 1}}\n"


def ids(plan: Any, text: str) -> list[str]:
    return [task.id for task in expand(plan(text))]


def test_the_product(plan: Any) -> None:
    tasks = expand(
        plan(
            "seeds: [3, 4]\noperations:\n"
            "  - {name: count, params: {names: [a, b]}, grid: {value: [1, 2], seconds: [0, 0.5]}}\n"
            "  - {name: until, params: {file: x}}\n"
        )
    )
    seen = [(t.operation, t.params.get("value"), t.params.get("seconds"), t.seed) for t in tasks]
    assert seen == [
        *[
            ("count", value, seconds, seed)
            for value in (1, 2)
            for seconds in (0.0, 0.5)
            for seed in (3, 4)
        ],
        ("until", None, None, None),  # nothing random in it: once
    ]
    assert tasks[0].params == {"value": 1, "seconds": 0.0, "names": ["a", "b"], "file": None}
    assert len({t.id for t in tasks}) == 9
    assert [Task.from_json(t.to_json()) for t in tasks] == tasks


def test_an_id_is_the_content(plan: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [base] = ids(plan, COUNT)
    # what is written out, where things lie and on which device they run change nothing
    assert ids(
        plan, "operations:\n  - {name: count, params: {seconds: 0, value: 1, names: []}}\n"
    ) == [base]
    shutil.copy(tmp_path / "story.txt", tmp_path / "again.txt")
    twice = HEAD.replace("story.txt", f"[story.txt, {tmp_path}/again.txt]")
    assert ids(plan, f"{twice}device: cpu\nseeds: [0, 0]\n{COUNT}") == [base]
    shutil.copytree(locate("patient"), tmp_path / "copy")
    assert ids(plan, HEAD.replace("text: story.txt\n", "") + COUNT) == [
        base
    ]  # the story is how the held-out text begins
    assert ids(plan, COPY + COUNT) == [base]  # the copy is looked for beside the plan
    # and everything that decides the result changes it
    others = [
        f"{HEAD}seeds: [1]\n{COUNT}",
        f"{HEAD}dtype: float64\n{COUNT}",
        f"{HEAD}bos: 'no'\n{COUNT}",
        f"{HEAD.replace('64', '65')}{COUNT}",
        f"{HEAD.replace(': 4', ': 5')}{COUNT}",
        COUNT.replace("1}", "2}"),
    ]
    config = tmp_path / "copy" / "config.json"
    config.write_text(config.read_text() + "\n")
    others.append(COPY + COUNT)
    changed = [one for other in others for one in ids(plan, other)]
    (tmp_path / "again.txt").write_text("Once upon a time there was another text. " * 100)
    changed += ids(plan, HEAD.replace("story", "again") + COUNT)
    monkeypatch.setattr("surgeon.sweep.task.version", lambda _: "next")
    changed += ids(plan, COUNT)
    assert len({base, *changed}) == 1 + len(others) + 2


def test_files_count_by_what_they_hold(plan: Any, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_text("a")
    two.write_text("a")
    text = "operations:\n  - {name: files, grid: {paths: [[one], [two]]}}\n"
    # of two files with the same content one task is left
    [task] = expand(plan(text))
    assert task.params["paths"] == [str(one)]
    two.write_text("b")
    assert len(ids(plan, text)) == 2
    one.unlink()
    with pytest.raises(
        BadInput,
        match=r"operation 1 \(files\): the file .*one of paths cannot be read: No such file",
    ):
        plan(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- 1", "is not a plan: it should be a mapping with models and operations"),
        ("models: [patient]", "is not a plan"),
        ("{", "is not YAML"),
        (
            HEAD + "seed: [1]\n" + COUNT,
            "seed is not a key of a plan; did you mean seeds? It can be bos, ",
        ),
        (
            HEAD + "operations: []",
            (
                "operations should be a list with at least one item; it is [], so there would be"
                " nothing to run"
            ),
        ),
        (HEAD.replace("[patient]", "[]") + COUNT, "models should be a list with at least one item"),
        (HEAD.replace("[patient]", "[1]") + COUNT, "models should be a list of texts; it holds 1."),
        (HEAD + "seeds: []\n" + COUNT, "seeds should be a list"),
        (HEAD + "seeds: [-1]\n" + COUNT, "a seed is a whole number from 0"),
        (
            HEAD + "seeds: [true]\n" + COUNT,
            "should be a list of whole numbers; it holds True.",
        ),
        (HEAD + "dtype: float3\n" + COUNT, "dtype float3 is not known; use auto, float32"),
        (HEAD + "bos: maybe\n" + COUNT, "bos maybe is not known"),
        (
            HEAD + "operations: [conut]",
            (
                "operation 1: conut is not an operation; did you mean count? It can be count,"
                " files, until"
            ),
        ),
        (
            HEAD + "operations: [3]",
            "operation 1, should be a name, or a mapping with name, params and grid; it is 3",
        ),
        (
            HEAD + "operations: [{name: count, parms: {}}]",
            "parms is not a key of an operation; did you mean params?",
        ),
        (
            HEAD + "operations: [{name: count, params: {valu: 1}}]",
            "(count): valu is not a parameter; did you mean value? It can be file, names, ",
        ),
        (
            HEAD + "operations: [{name: count, params: [1]}]",
            "params should be a mapping of parameters; it is [1]",
        ),
        (
            HEAD + "operations: [{name: count, grid: {value: []}}]",
            "the grid's value should be a list with at least one item",
        ),
        (
            HEAD + "operations: [{name: count, grid: {value: 3}}]",
            "the grid's value should be a list with at least one item; it is 3",
        ),
        (
            HEAD + "operations: [{name: count, grid: {value: [1]}, params: {value: 1}}]",
            "value is in params and in grid",
        ),
        (
            HEAD + "operations: [{name: count, params: {value: 1.5}}]",
            "value is 1.5; it should be a whole number.",
        ),
        (
            HEAD + "operations: [{name: count, params: {value: 1, seconds: x}}]",
            "seconds is 'x'; it should be a number.",
        ),
        (
            HEAD + "operations: [{name: count, params: {value: 1, names: x}}]",
            "names is 'x'; it should be a list.",
        ),
        (
            HEAD + "operations: [{name: count, params: {value: 1, file: 2}}]",
            "file is 2; it should be text or nothing.",
        ),
        (HEAD + "operations: [count]", "operation 1 (count): count needs value."),
        (
            HEAD + "operations: [{name: count, params: {value: -1}}]",
            "operation 1 (count): a value of -1 cannot be counted.",
        ),
    ],
)
def test_what_cannot_be_used_is_named(plan: Any, text: str, said: str) -> None:
    with pytest.raises(BadInput) as raised:
        plan(text)
    assert said in str(raised.value)


def test_models_and_texts_are_looked_at_before_the_sweep(plan: Any, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no model folder at "):
        expand(plan(f"models: [./nowhere]\n{COUNT}"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadCheckpoint, match=r"has no config\.json"):
        expand(plan(f"models: [empty]\n{COUNT}"))
    with pytest.raises(BadText, match=r"missing\.txt cannot be read"):
        expand(plan(HEAD.replace("story", "missing") + COUNT))
    with pytest.raises(
        BadInput, match=r"a window of 100000 is longer than the \d+ positions that patient reads"
    ):
        expand(plan(HEAD.replace("64", "100000") + COUNT))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            HEAD + "operations: [{name: count, params: {value: 1, seed: 3}}]",
            "seed is said once for the whole plan, not in an operation's params.",
        ),
        (
            HEAD + "operations: [{name: files, grid: {window: [3]}}]",
            "window is said once for the whole plan, not in an operation's grid.",
        ),
        (HEAD + "title: 2024-01-01\n" + COUNT, "a date; write it in quotes, if a text is meant."),
        (HEAD + "title: 2024-99-01\n" + COUNT, "is not YAML"),
        (HEAD + 'title: "a\\0b"\n' + COUNT, "holds a NUL character"),
        (HEAD + "1: 2\n" + COUNT, "the key 1 is no text; write it in quotes."),
        ("models: &a [*a]\noperations: *a\n", "is nested too deeply, or holds itself."),
        ("models: " + "[" * 5000 + "]" * 5000, "is nested too deeply"),
        ("!!python/object/apply:os.system [id]", "is not YAML"),
        (HEAD + "title: [a]\n" + COUNT, "title is ['a']; it should be text."),
        (HEAD + "windows: many\n" + COUNT, "windows is 'many'; it should be a whole number or"),
        (HEAD + "operations: [{name: files, params: {at: 5}}]", "at is 5; it should be text or a"),
        (HEAD + "operations: [{name: files, params: {at: [{}]}}]", "at is [{}]; it should be text"),
        (
            HEAD + "operations: [{name: files, params: {one: nowhere.txt}}]",
            "nowhere.txt of one cannot be read: No such file",
        ),
        (HEAD + "operations: [{name: files, params: {one: 3}}]", "one is 3; it should be text or"),
        (HEAD + "operations: [{name: files, params: {paths: 3}}]", "paths is 3; it should be a"),
        (
            HEAD + f"operations: [{{name: count, grid: {{value: {[*range(400)]}, seconds:"
            f" {[*range(400)]}}}}}]",
            "its grid multiplies out to 160,000 tasks; use a smaller one.",
        ),
    ],
)
def test_what_no_plan_can_mean_is_refused(plan: Any, text: str, said: str) -> None:
    with pytest.raises(BadInput) as raised:
        plan(text)
    assert said in str(raised.value)


def test_a_bomb_of_aliases_is_refused(plan: Any) -> None:
    """Ten lines that stand for ten billion values."""
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    with pytest.raises(BadInput, match="holds more than 100000 values, aliases multiplied out"):
        plan("\n".join(lines) + "\n")


def test_weights_that_are_not_named_are_the_vital_ones(plan: Any) -> None:
    [task] = expand(plan("operations: [files]"))
    assert task.params["at"] == "vital"
    [task] = expand(plan("operations: [{name: files, params: {at: ['L0.mlp.down[1, 2]']}}]"))
    assert task.params["at"] == ["L0.mlp.down[1, 2]"]


def test_the_plans_text_goes_to_the_operation_as_its_own(plan: Any, sweep: Any) -> None:
    """And no parameter of the text or the seed stands in the task."""
    [task] = expand(plan("operations: [files]"))
    assert set(task.params) == {"at", "paths", "one"}
    assert task.given({"text", "window", "other"}) == {
        **task.params,
        "text": task.text.path,
        "window": 64,
    }
    _, store = sweep("operations: [files]", lambda most: InlineCrew("sweep_work", most))
    found = query(store, 'SELECT read, "of", "where", "text" FROM results')
    assert found.rows == [(task.text.path, 64, "vital", "story.txt")]


def test_what_is_the_texts_where_there_is_one_is_a_parameter_where_there_is_none(plan: Any) -> None:
    """Like the window of a trace, which is of layers."""
    [task] = expand(plan("operations: [{name: wordless, params: {window: 3}}]"))
    assert (task.params, task.named) == ({"window": 3}, ["window"])
    assert task.given({"window", "bos"}) == {"window": 3, "bos": "auto"}


def test_a_task_says_what_the_plan_says(plan: Any) -> None:
    [task] = expand(plan("operations: [{name: count, params: {value: 1}}]"))
    assert task.says == "count(value 1) on patient, seed 0"
    assert set(task.columns()) >= {"value", "seconds", "names", "file"}
