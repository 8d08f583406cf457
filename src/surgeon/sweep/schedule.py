"""Who does what: tasks handed to workers model by model, the lost ones again, results into the
store as they come.

How this works. An engine is a `Crew`: it hires workers, hands one task at a time to each, and tells
in events what became of them. One loop here owns all that is known: which tasks wait, who is at
which, who has which model open. A worker that is free gets a task of the model that it has open,
since opening one costs more than most tasks; else it goes to the model with most left to do for
those who are at it. A result goes into the store as soon as it is there, in this one process, so
nothing is lost that was finished.

A worker that dies takes its task down with it. The task waits again, in front, for the next worker;
one that has taken several down counts as failed, since it may be what kills them. Workers that die
before they have started say that none can be; then the run ends with what the last one said.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import SurgeonError
from ..progress import Tell, silent
from .store import Store
from .task import Task

ATTEMPTS = 3  # how often a task may take its worker down before it counts as failed
STARTS = 3  # how many workers in a row may die before one has started
PATIENCE = 600.0  # seconds without any worker, starting or at work, that says something
Group = tuple[str, str, str]  # folder or Hub id, dtype, device: what a worker has open


@dataclass(frozen=True)
class Event:
    """A worker is ready for its first task, has answered (`text`, JSON), or was lost (`text` says
    how).
    """

    kind: Literal["ready", "answer", "lost"]
    worker: int
    text: str


class Crew(ABC):
    """Workers, as an engine makes them, numbered as they are hired.

    A worker does one task at a time.
    """

    size: int

    @abstractmethod
    def hire(self) -> int:
        """Start one more worker; an event tells when it is ready."""

    @abstractmethod
    def give(self, worker: int, job: str) -> None:
        """Hand a ready worker its next task, as JSON."""

    @abstractmethod
    def next(self, timeout: float) -> Event | None:
        """What happens next; None if nothing did in `timeout` seconds."""

    @abstractmethod
    def close(self) -> None:
        """Send all workers away, whatever they are at."""


@dataclass(frozen=True)
class Failure:
    task: Task
    error: str


@dataclass(frozen=True)
class Summary:
    """What a run did. tasks: of the plan; before: those done already; done: in this run."""

    tasks: int
    before: int
    done: int
    failures: list[Failure]


def run_tasks(
    tasks: Sequence[Task],
    store: Store,
    make_crew: Callable[[int], Crew],
    progress: Tell = silent,
) -> Summary:
    """Do what is missing in the store, which the caller holds open for writing (`Store.writing`).

    make_crew: the engine, called with the most workers that can be of use. On any exit the workers
    are sent away; what is finished stays.
    Raises: SurgeonError if no worker can be started.
    """
    missing = store.missing(tasks)
    before = len(tasks) - len(missing)
    if not missing:
        return Summary(len(tasks), before, 0, [])
    shift = _Shift(store, missing, before, progress)
    crew = make_crew(len(missing))
    try:
        shift.work(crew)
    finally:
        crew.close()
    return Summary(len(tasks), before, shift.done, shift.failures)


class _Shift:
    """One run over the missing tasks."""

    def __init__(self, store: Store, tasks: Sequence[Task], before: int, progress: Tell) -> None:
        self.store, self.before, self.progress = store, before, progress
        self.total = before + len(tasks)
        self.waiting: dict[Group, deque[Task]] = {}
        for task in tasks:
            self.waiting.setdefault(_group(task), deque()).append(task)
        # every worker that has started, and the model that it has open
        self.holds: dict[int, Group | None] = {}
        self.busy: dict[int, Task] = {}
        self.losses: Counter[str] = Counter()
        self.done = 0
        self.failures: list[Failure] = []

    def work(self, crew: Crew) -> None:
        starting = {crew.hire() for _ in range(crew.size)}
        failed_starts = 0
        self._tell()
        while self.waiting or self.busy:
            for worker in [w for w in self.holds if w not in self.busy]:
                if self.waiting:
                    self.busy[worker] = task = self._choose(worker)
                    crew.give(worker, json.dumps(task.to_json()))
            event = crew.next(PATIENCE)
            if event is None:
                if not self.holds:
                    raise SurgeonError(
                        f"no worker could be started within {PATIENCE:.0f} seconds: the engine has"
                        " no room for one."
                    )
                continue
            if event.kind == "ready":
                starting.discard(event.worker)
                self.holds[event.worker] = None
                failed_starts = 0
            elif event.kind == "answer":
                self._answered(self.busy.pop(event.worker), json.loads(event.text))
            else:
                failed_starts += event.worker in starting
                starting.discard(event.worker)
                if failed_starts == STARTS and not self.holds:
                    raise SurgeonError(f"workers do not start: {event.text}")
                self._lost(event)
                room = len(self.holds) + len(starting) < crew.size
                if failed_starts < STARTS and self.waiting and room:
                    starting.add(crew.hire())

    def _choose(self, worker: int) -> Task:
        """The next task of the model that the worker has open; else of the model with most left to
        do for those who have it.
        """
        group = self.holds[worker]
        if group not in self.waiting:
            at_it = Counter(self.holds.values())
            group = max(self.waiting, key=lambda g: len(self.waiting[g]) / (1 + at_it[g]))
        self.holds[worker] = group
        task = self.waiting[group].popleft()
        if not self.waiting[group]:
            del self.waiting[group]
        return task

    def _answered(self, task: Task, answer: dict[str, Any]) -> None:
        if "rows" in answer:
            self.store.keep(task, answer["rows"])
            self.done += 1
        else:
            self._failed(task, answer["error"], answer["details"])
        self._tell()

    def _lost(self, event: Event) -> None:
        self.holds.pop(event.worker, None)
        task = self.busy.pop(event.worker, None)
        if task is None:
            return
        self.losses[task.id] += 1
        if self.losses[task.id] < ATTEMPTS:
            self.waiting.setdefault(_group(task), deque()).appendleft(task)
        else:
            self._failed(
                task,
                f"the worker died {ATTEMPTS} times at this task, the last time because"
                f" {event.text}",
                None,
            )
            self._tell()

    def _failed(self, task: Task, error: str, details: str | None) -> None:
        self.store.fail(task, error, details)
        self.failures.append(Failure(task, error))

    def _tell(self) -> None:
        self.progress("tasks", self.before + self.done + len(self.failures), self.total)


def _group(task: Task) -> Group:
    return task.where, task.dtype, task.device
