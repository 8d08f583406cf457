"""The local engine: a pool of processes on this machine, each spawned afresh."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from .schedule import Crew, Event
from .worker import THREADS, Worker


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class LocalCrew(Crew):
    """Processes on this machine. workers, threads: None for as many as there are cores for.

    A worker that dies, of a kill or for want of memory, is one lost worker; the others go on.
    """

    def __init__(
        self, registry: str, most: int, workers: int | None = None, threads: int | None = None
    ) -> None:
        there = cores()
        most_threads = THREADS if workers is None else there // workers
        # what the environment allows torch, as OMP_NUM_THREADS does, is kept to
        self.threads = threads or max(1, min(torch.get_num_threads(), most_threads))
        self.size = min(most, workers or max(1, there // self.threads))
        self.registry = registry
        self._hired = 0
        self._workers: dict[int, tuple[Any, Connection]] = {}

    def hire(self) -> int:
        # not forked: torch's threads and locks do not survive a fork
        context = get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(
            target=serve, args=(theirs, self.registry, self.threads), daemon=True
        )
        with _no_interrupts():
            process.start()
        theirs.close()  # so that the end of the process is the end of the pipe
        self._hired += 1
        self._workers[self._hired] = (process, ours)
        return self._hired

    def give(self, worker: int, job: str) -> None:
        with suppress(OSError):  # it is dead, as `next` will see
            self._workers[worker][1].send_bytes(job.encode())

    def next(self, timeout: float) -> Event | None:
        pipes = {pipe: number for number, (_, pipe) in self._workers.items()}
        ready = wait(list(pipes), timeout)
        if not ready:
            return None
        pipe = ready[0]
        assert isinstance(pipe, Connection)
        number = pipes[pipe]
        try:
            text = pipe.recv_bytes().decode()
        except (EOFError, OSError):
            process, _ = self._workers.pop(number)
            pipe.close()
            process.join()
            return Event("lost", number, _how(process.exitcode))
        return Event("ready" if text == "ready" else "answer", number, text)

    def close(self) -> None:
        for process, pipe in self._workers.values():
            process.kill()
            pipe.close()
        for process, _ in self._workers.values():
            process.join()
        self._workers.clear()


def serve(pipe: Connection, registry: str, threads: int) -> None:
    """The life of a worker: tasks out of the pipe, answers into it, until the other end is
    closed.
    """
    worker = Worker(registry, threads)
    try:
        pipe.send_bytes(worker.ready().encode())
        while True:
            pipe.send_bytes(worker.run(pipe.recv_bytes().decode()).encode())
    except (EOFError, OSError):
        return


def _how(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        name = signal.Signals(-exitcode).name
        return f"its process was ended by {name}" + (
            ", perhaps for want of memory." if name == "SIGKILL" else "."
        )
    return f"its process ended with status {exitcode}; what it said is on stderr."


@contextmanager
def _no_interrupts() -> Iterator[None]:
    """A process started within never hears Ctrl-C, which the terminal sends to all: the parent ends
    it. The parent hears it after.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
