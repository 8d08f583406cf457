"""Operations for tests of sweeps that do no work but keep a log, and a crew that works in this
process. Workers import it by name.
"""

from __future__ import annotations

import os
import signal
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgeon.anatomy import load_model
from surgeon.errors import BadInput, SurgeonError
from surgeon.result import Result, result
from surgeon.settings import configured, setting
from surgeon.sweep.schedule import Crew, Event
from surgeon.sweep.worker import Worker

LOG = "SURGEON_SWEEP_LOG"


def log(*words: object) -> None:
    """One line, written at once, also by several processes."""
    descriptor = os.open(os.environ[LOG], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, (" ".join(map(str, (os.getpid(), *words))) + "\n").encode())
    os.close(descriptor)


def read_log() -> list[list[str]]:
    path = Path(os.environ[LOG])
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def finished() -> list[str]:
    return sorted(words[2] for words in read_log() if words[1] == "done")


class Lab:
    """As much of one as a worker needs; it leaves the map unproved."""

    def __init__(self, name: str, dtype: str, device: str) -> None:
        loaded = load_model(name, dtype, device)
        self.fingerprint, self.tokenizer = loaded.fingerprint, loaded.tokenizer


def open_lab(name: str, dtype: str, device: str) -> Lab:
    log("open", name)
    return Lab(name, dtype, device)


@result("answer")
class Answer(Result):
    """What an operation here gives: its one row."""

    row: dict[str, Any]

    def rows(self) -> list[dict[str, Any]]:
        return [self.row]


@dataclass(frozen=True)
class Operation:
    """An operation of a function; a sweep asks for nothing else of one."""

    settings: type[Any]
    function: Callable[[Any], dict[str, Any]]
    seeded: bool = True

    def run(self, lab: Any, given: Mapping[str, Any]) -> Answer:
        return Answer(self.function(configured(self.settings, given)))


@dataclass(frozen=True)
class Count:
    value: int = setting(help="what is counted")
    seconds: float = setting(0.0, "how long it takes")
    names: tuple[str, ...] = setting((), "names")
    file: str | None = setting(None, "a name that is no file's")
    seed: int = setting(0, "seed")

    def __post_init__(self) -> None:
        if self.value < 0:
            raise BadInput(f"a value of {self.value} cannot be counted.")


def count(settings: Count) -> dict[str, Any]:
    log("start", f"{settings.value}.{settings.seed}")
    time.sleep(settings.seconds)
    log("done", f"{settings.value}.{settings.seed}")
    return {"answer": settings.value * 10 + settings.seed, "odd": bool(settings.value % 2)}


@dataclass(frozen=True)
class Until:
    """Goes wrong until the file is there."""

    file: str = setting(help="the file")
    how: str = setting("refuses", "how it goes wrong")


def until(settings: Until) -> dict[str, Any]:
    log("start", settings.how)
    if not Path(settings.file).exists():
        if settings.how == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if settings.how == "breaks":
            raise ZeroDivisionError("nothing to divide by")
        raise SurgeonError("the file is not there.")
    log("done", settings.how)
    return {"answer": 1}


@dataclass(frozen=True)
class Files:
    at: Any = setting(help="what names weights")
    paths: tuple[str, ...] = setting((), "files", is_file=True)
    one: str | None = setting(None, "a file", is_file=True)
    text: str | None = setting(None, "the text", is_file=True)
    window: int = setting(256, "its windows")


def see(settings: Files) -> dict[str, Any]:
    """What it was called with, so that a test sees it."""
    return {"answer": 0, "read": settings.text, "of": settings.window, "where": settings.at}


@dataclass(frozen=True)
class Wordless:
    window: int = setting(1, "of layers, not of a text")
    bos: str = setting("auto", "whether prompts begin with BOS")


OPERATIONS = {
    "count": Operation(Count, count),
    "until": Operation(Until, until, seeded=False),
    "files": Operation(Files, see, seeded=False),
    "wordless": Operation(Wordless, lambda settings: {"answer": settings.window}, seeded=False),
}


class InlineCrew(Crew):
    """Workers in this process, which take turns; with `registry` the real operations."""

    def __init__(
        self, registry: str, most: int, workers: int | None = None, threads: int | None = None
    ) -> None:
        self.registry, self.size = registry, min(most, workers or 1)
        self.workers: list[Worker] = []
        self.events: deque[Event] = deque()

    def hire(self) -> int:
        self.workers.append(Worker(self.registry, 1))
        self.events.append(Event("ready", len(self.workers) - 1, "ready"))
        return len(self.workers) - 1

    def give(self, worker: int, job: str) -> None:
        self.events.append(Event("answer", worker, self.workers[worker].run(job)))

    def next(self, timeout: float) -> Event | None:
        return self.events.popleft()

    def close(self) -> None:
        self.workers.clear()
