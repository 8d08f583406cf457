"""What runs in a worker: it keeps one model open, and answers a task, as JSON, with rows or with
what went wrong.
"""

from __future__ import annotations

import gc
import importlib
import json
import traceback
from dataclasses import fields
from typing import Any

import torch

from ..errors import SurgeonError
from .task import Bench, Operation, Row, Task, Text, corpus_digest


class Worker:
    """A worker.

    registry: the module that has OPERATIONS (by name) and `open_model(name, dtype, device)`;
    imported here, by its name.
    """

    def __init__(self, registry: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self.registry: Any = importlib.import_module(registry)
        self.held: tuple[str, str, str, str] | None = None
        self.opened: Any = None
        self.benches: dict[Text, Bench] = {}

    def ready(self) -> str:
        return "ready"

    def run(self, job: str) -> str:
        """A task as JSON in; {"rows"} or {"error", "details"} out. Interrupts pass."""
        try:
            source = json.loads(job)
            task = Task.from_json(source)
            if task.id != source["id"]:
                raise SurgeonError(
                    "this worker runs another release of Surgeon than the one that planned the"
                    " sweep; install the same on all."
                )
            return json.dumps({"rows": self._rows(task)})
        except SurgeonError as error:
            return json.dumps({"error": str(error), "details": None})
        except (MemoryError, torch.OutOfMemoryError):
            said, details = (
                "out of memory; try fewer --workers, fewer or shorter windows, or a smaller dtype.",
                None,
            )
        except (
            Exception
        ) as error:  # one task of many: what went wrong is recorded, and the others go on
            said, details = f"{type(error).__name__}: {error}", traceback.format_exc()
        self._drop()  # in what state the model is, nobody knows
        return json.dumps({"error": said, "details": details})

    def _rows(self, task: Task) -> list[Row]:
        bench = self._bench(task)
        operation: Operation = self.registry.OPERATIONS[task.operation]
        given = {k: tuple(v) if isinstance(v, list) else v for k, v in task.params.items()}
        settings = operation.settings(**{f.name: given[f.name] for f in fields(operation.settings)})
        torch.manual_seed(task.seed or 0)
        rows = operation.run(bench, settings, task.seed or 0)
        if not rows:
            raise SurgeonError(f"{task.operation} gave no row; an operation gives at least one.")
        if taken := {name for row in rows for name in row} & set(task.columns()):
            raise SurgeonError(
                f"{task.operation} gives a column {min(taken)}, which the task has already."
            )
        return rows

    def _bench(self, task: Task) -> Bench:
        """The model and the text of the task, opened if they are not.

        Raises: SurgeonError if either is not what was planned.
        """
        wanted = (task.where, task.dtype, task.device, task.fingerprint)
        if self.held != wanted:
            self._drop()
            self.opened = self.registry.open_model(task.where, task.dtype, task.device)
            if self.opened[0].fingerprint != task.fingerprint:
                raise SurgeonError(
                    f"the weights of {task.model} changed after the sweep was planned; run it"
                    " again."
                )
            self.held = wanted
        if task.text not in self.benches:
            loaded, anatomy = self.opened
            self.benches[task.text] = Bench(
                loaded, anatomy, task.text.read(loaded.tokenizer), task.text.bos
            )
        bench = self.benches[task.text]
        if corpus_digest(bench.corpus) != task.corpus:
            raise SurgeonError(
                f"the text {task.text.name}, or the tokenizer of {task.model}, changed after the"
                " sweep was planned; run it again."
            )
        return bench

    def _drop(self) -> None:
        self.held, self.opened = None, None
        self.benches.clear()
        gc.collect()  # a map and its model point at each other
