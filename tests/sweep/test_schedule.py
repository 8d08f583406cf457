"""Who does what: model by model, lost tasks again, failures recorded, nothing twice."""

from __future__ import annotations

import json
import shutil
from collections import deque
from pathlib import Path
from typing import Any

import pytest
from sweep_work import InlineCrew, finished, read_log

from surgeon.anatomy.load import locate
from surgeon.errors import SurgeonError
from surgeon.sweep import Task, expand, query
from surgeon.sweep.schedule import Event
from surgeon.sweep.worker import Worker

FOUR = "seeds: [0, 1]\noperations:\n  - {name: count, grid: {value: [1, 2]}}\n"


def inline(workers: int) -> Any:
    return lambda most: InlineCrew("sweep_work", most, workers)


class Clumsy(InlineCrew):
    """Loses its worker at given tasks, each as often as it says, before or after the work is
    done.
    """

    losses: dict[int, int]

    def give(self, worker: int, job: str) -> None:
        value = Task.from_json(json.loads(job)).params["value"]
        if self.losses.get(value, 0):
            self.losses[value] -= 1
            self.events.append(Event("lost", worker, "it fell."))
        else:
            super().give(worker, job)


def clumsy(workers: int, **losses: int) -> Any:
    def make(most: int) -> Clumsy:
        crew = Clumsy("sweep_work", most, workers)
        crew.losses = {int(name.removeprefix("v")): n for name, n in losses.items()}
        return crew

    return make


def test_a_model_is_opened_once_by_a_worker(sweep: Any, tmp_path: Path) -> None:
    """Two models, tasks of both in one plan, one worker and two: as many openings as there are
    models.
    """
    shutil.copytree(locate("patient"), tmp_path / "other")
    config = tmp_path / "other" / "config.json"
    config.write_text(config.read_text() + "\n")
    plan = "models: [patient, other]\ntext: story.txt\nwindow: 64\n" + FOUR
    summary, _ = sweep(plan, inline(1))
    assert (summary.tasks, summary.done) == (8, 8)
    assert [w[2] for w in read_log() if w[1] == "open"] == ["patient", str(tmp_path / "other")]
    shutil.rmtree(tmp_path / "results")
    sweep(plan, inline(2))
    assert len([w for w in read_log() if w[1] == "open"]) == 4


def test_resume_does_what_is_missing(sweep: Any) -> None:
    first, _ = sweep("operations: [{name: count, grid: {value: [1, 2]}}]", inline(2))
    assert (first.before, first.done) == (0, 2)
    second, store = sweep("operations: [{name: count, grid: {value: [1, 2, 3]}}]", inline(2))
    assert (second.tasks, second.before, second.done) == (3, 2, 1)
    third, _ = sweep(
        "operations: [{name: count, grid: {value: [1, 2, 3]}}]",
        lambda _: pytest.fail("a crew was hired"),
    )
    assert (third.before, third.done) == (3, 0)
    assert finished() == ["1.0", "2.0", "3.0"]
    assert query(store, "SELECT answer FROM results ORDER BY 1").rows == [(10,), (20,), (30,)]


def test_failures_are_recorded_and_tried_again(sweep: Any, tmp_path: Path) -> None:
    plan = "operations:\n" + "".join(
        f"  - {{name: until, params: {{file: {tmp_path}/flag, how: {how}}}}}\n"
        for how in ("refuses", "breaks")
    )
    summary, store = sweep(plan + "  - {name: count, params: {value: 1}}\n", inline(1))
    assert (summary.done, [f.error for f in summary.failures]) == (
        1,
        ["the file is not there.", "ZeroDivisionError: nothing to divide by"],
    )
    refused, broken = (json.loads(store.error(f.task.id).read_text()) for f in summary.failures)
    assert refused["details"] is None
    assert "Traceback" in broken["details"]
    (tmp_path / "flag").write_text("")
    again, _ = sweep(plan + "  - {name: count, params: {value: 1}}\n", inline(1))
    assert (again.before, again.done, again.failures) == (1, 2, [])
    assert not list((store.folder / "errors").iterdir())


def test_a_lost_task_is_done_by_another_worker(sweep: Any) -> None:
    summary, _ = sweep(FOUR, clumsy(2, v1=2))
    assert (summary.done, summary.failures) == (4, [])
    assert finished() == ["1.0", "1.1", "2.0", "2.1"]


def test_a_task_that_kills_its_workers_is_given_up(sweep: Any) -> None:
    summary, _ = sweep(FOUR, clumsy(2, v2=100))
    assert summary.done == 2
    assert {f.task.params["value"] for f in summary.failures} == {2}
    assert (
        "the worker died 3 times at this task, the last time because it fell."
        in summary.failures[0].error
    )
    assert finished() == ["1.0", "1.1"]


class Stillborn(InlineCrew):
    def hire(self) -> int:
        worker = super().hire()
        self.events = deque(
            Event("lost", e.worker, "there is no surgeon.") if e.worker == worker else e
            for e in self.events
        )
        return worker


def test_workers_that_do_not_start(sweep: Any) -> None:
    for workers in (1, 4):
        with pytest.raises(SurgeonError, match="workers do not start: there is no surgeon"):
            sweep(FOUR, lambda most, n=workers: Stillborn("sweep_work", most, n))


def test_an_interrupt_keeps_what_is_done(sweep: Any) -> None:
    class Interrupted(InlineCrew):
        closed = False

        def next(self, timeout: float) -> Event | None:
            if len(finished()) == 2:
                raise KeyboardInterrupt
            return super().next(timeout)

        def close(self) -> None:
            Interrupted.closed = True

    with pytest.raises(KeyboardInterrupt):
        sweep(FOUR, lambda most: Interrupted("sweep_work", most))
    assert Interrupted.closed
    summary, _ = sweep(FOUR, inline(1))
    assert summary.before == 1  # the answer of the second was on its way
    assert summary.done == 3


def test_what_changed_since_the_plan_was_made(sweep: Any, plan: Any, tmp_path: Path) -> None:
    """A worker that meets other weights, or another text, than were hashed says so instead of
    computing.
    """
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a little girl. " * 60)
    shutil.copytree(locate("patient"), tmp_path / "copy")
    source = (
        "models: [copy]\nwindow: 64\ntext: text.txt\noperations: [{name: count, grid: {value: [1,"
        " 2]}}]"
    )

    def changing(path: Path, content: str) -> Any:
        """A crew that comes when the file has just been written."""

        def make(most: int) -> InlineCrew:
            path.write_text(content)
            return InlineCrew("sweep_work", most)

        return make

    summary, _ = sweep(source, changing(text, "Once upon a time there was a little boy. " * 60))
    assert {f.error for f in summary.failures} == {
        "the text text.txt, or the tokenizer of copy, changed after the sweep was planned; run it"
        " again."
    }
    config = tmp_path / "copy" / "config.json"
    summary, _ = sweep(source, changing(config, config.read_text() + "\n"))
    assert {f.error for f in summary.failures} == {
        "the weights of copy changed after the sweep was planned; run it again."
    }
    assert finished() == []


def test_a_worker_of_another_release_refuses(plan: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task that was planned under other rules would be filed as if it had been done under
    those.
    """
    job = json.dumps(expand(plan(FOUR))[0].to_json())
    monkeypatch.setattr("surgeon.sweep.task.version", lambda _: "another")
    assert "another release of Surgeon" in json.loads(Worker("sweep_work", 1).run(job))["error"]
    assert finished() == []
