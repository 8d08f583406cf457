"""Operations for tests of sweeps that do no work but keep a log, and a crew that works in this
process. Workers import it by name.
"""

from __future__ import annotations

import os
import signal
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgeon.anatomy import Anatomy, load_model
from surgeon.errors import BadInput, SurgeonError
from surgeon.sweep import Operation
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


def open_model(name: str, dtype: str, device: str) -> Any:
    log("open", name)
    loaded = load_model(name, dtype, device)
    return loaded, Anatomy.of(loaded.model)


@dataclass(frozen=True)
class Count:
    value: int
    seconds: float = 0.0
    names: tuple[str, ...] = ()
    file: str | None = None

    def __post_init__(self) -> None:
        if self.value < 0:
            raise BadInput(f"a value of {self.value} cannot be counted.")


def count(bench: Any, settings: Count, seed: int) -> list[dict[str, Any]]:
    log("start", f"{settings.value}.{seed}")
    time.sleep(settings.seconds)
    log("done", f"{settings.value}.{seed}")
    return [{"answer": settings.value * 10 + seed, "odd": bool(settings.value % 2)}]


@dataclass(frozen=True)
class Until:
    """Goes wrong until the file is there."""

    file: str
    how: str = "refuses"


def until(bench: Any, settings: Until, seed: int) -> list[dict[str, Any]]:
    log("start", settings.how)
    if not Path(settings.file).exists():
        if settings.how == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if settings.how == "breaks":
            raise ZeroDivisionError("nothing to divide by")
        raise SurgeonError("the file is not there.")
    log("done", settings.how)
    return [{"answer": 1}]


@dataclass(frozen=True)
class Files:
    paths: tuple[str, ...] = field(default=(), metadata={"file": True})


OPERATIONS = {
    "count": Operation(Count, count),
    "until": Operation(Until, until, seeded=False),
    "files": Operation(Files, count),
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
