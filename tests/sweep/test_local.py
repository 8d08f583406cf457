"""The pool of processes, with real ones: killed in the middle, and interrupted."""

from __future__ import annotations

import os
import signal
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sweep_work import finished, read_log

from surgeon.sweep import query
from surgeon.sweep.local import LocalCrew, cores

SIX = (
    "seeds: [0, 1]\noperations:\n  - {name: count, params: {seconds: 0.3}, grid: {value: [1, 2,"
    " 3]}}\n"
)


def kill_one_at_work(after: int = 2) -> threading.Thread:
    """Once `after` tasks are done, end a process that has begun one and not done it."""

    def busy() -> list[int]:
        log = read_log()
        done = [w[2] for w in log if w[1] == "done"]
        at_work = [int(w[0]) for w in log if w[1] == "start" and w[2] not in done]
        return at_work if len(done) >= after else []

    def wait_and_kill() -> None:
        for _ in range(1200):
            for pid in busy()[:1]:
                os.kill(pid, signal.SIGSTOP)  # so that it cannot end its task meanwhile
                if pid in busy():
                    os.kill(pid, signal.SIGKILL)
                    return
                os.kill(pid, signal.SIGCONT)
            time.sleep(0.02)

    thread = threading.Thread(target=wait_and_kill)
    thread.start()
    return thread


@pytest.mark.slow
def test_a_worker_killed_in_the_middle(sweep: Any) -> None:
    killer = kill_one_at_work()
    summary, store = sweep(SIX, partial(LocalCrew, "sweep_work", workers=2, threads=1))
    killer.join()
    assert (summary.done, summary.failures) == (6, [])
    assert finished() == [
        "1.0",
        "1.1",
        "2.0",
        "2.1",
        "3.0",
        "3.1",
    ]  # nothing lost, nothing done twice
    assert len([w for w in read_log() if w[1] == "start"]) == 7  # one was begun again
    assert query(store, "SELECT sum(answer) FROM results").rows == [(123,)]


@pytest.mark.slow
def test_a_task_that_kills_its_workers(sweep: Any, tmp_path: Path) -> None:
    plan = (
        f"operations:\n  - {{name: until, params: {{file: {tmp_path}/flag, how: dies}}}}\n  -"
        " {name: count, params: {value: 1}}\n"
    )
    summary, _ = sweep(plan, partial(LocalCrew, "sweep_work", workers=1))
    assert summary.done == 1
    assert summary.failures[0].error.endswith(
        "its process was ended by SIGKILL, perhaps for want of memory."
    )


def test_the_size_of_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more workers than tasks, no more threads than cores, unless it is asked for; what the
    environment sets holds.
    """
    monkeypatch.setattr("surgeon.sweep.local.cores", lambda: 16)
    monkeypatch.setattr("torch.get_num_threads", lambda: 16)

    def size(most: int, **asked: int) -> tuple[int, int]:
        crew = LocalCrew("sweep_work", most, **asked)
        return crew.size, crew.threads

    assert size(100) == (4, 4)
    assert size(2) == (2, 4)
    assert size(100, workers=8) == (8, 2)
    assert size(100, workers=100) == (100, 1)
    assert size(100, threads=8) == (2, 8)
    monkeypatch.setattr("torch.get_num_threads", lambda: 1)
    assert size(100) == (16, 1)
    assert cores() >= 1
