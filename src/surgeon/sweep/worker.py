"""What runs in a worker: it keeps one model open, and answers a task, as JSON, with rows or with
what went wrong.
"""

from __future__ import annotations

import gc
import importlib
import json
import traceback
from typing import Any

import torch

from ..errors import SurgeonError
from ..settings import settings_of
from .task import Operation, Row, Task, Text, corpus_digest, plain

THREADS = 4  # of a worker, where nothing is said: more help a small model little


class Worker:
    """A worker.

    registry: the module that has OPERATIONS (by name) and `open_lab(name, dtype=, device=)`, whose
    lab has a `fingerprint` and a `tokenizer`; imported here, by its name.
    """

    def __init__(self, registry: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self.registry: Any = importlib.import_module(registry)
        self.opened: tuple[str, str, str, str] | None = None
        self.lab: Any = None
        self.texts: dict[Text, str] = {}  # the digest of each that was read

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
                "out of memory; try fewer workers, fewer or shorter windows, or a smaller dtype.",
                None,
            )
        # one task of many: what went wrong is recorded, and the others go on
        except Exception as error:
            said, details = f"{type(error).__name__}: {error}", traceback.format_exc()
        self._drop()  # in what state the model is, nobody knows
        return json.dumps({"error": said, "details": details})

    def _rows(self, task: Task) -> list[Row]:
        """The rows of a task's result. A column that is a setting too says what was done, and
        stands in its place.
        """
        self._open(task)
        operation: Operation = self.registry.OPERATIONS[task.operation]
        # a task gives the same rows whatever this worker did before it
        torch.manual_seed(task.seed or 0)
        known = {one.name for one in settings_of(operation.settings)}
        result = operation.run(self.lab, task.given(known))
        rows = [{name: plain(value) for name, value in row.items()} for row in result.rows()]
        if not rows:
            raise SurgeonError(f"{task.operation} gave no row; an operation gives at least one.")
        if taken := {name for row in rows for name in row} & set(task.head()):
            raise SurgeonError(
                f"{task.operation} gives a column {min(taken)}, which every task has already."
            )
        return rows

    def _open(self, task: Task) -> None:
        """Open the task's model if it is not, and read its text.

        Raises: SurgeonError if either is not what was planned.
        """
        wanted = (task.where, task.dtype, task.device, task.fingerprint)
        if self.opened != wanted:
            self._drop()
            self.lab = self.registry.open_lab(task.where, dtype=task.dtype, device=task.device)
            if self.lab.fingerprint != task.fingerprint:
                raise SurgeonError(
                    f"the weights of {task.model} changed after the sweep was planned; run it"
                    " again."
                )
            self.opened = wanted
        if task.text not in self.texts:
            self.texts[task.text] = corpus_digest(task.text.read(self.lab.tokenizer))
        if self.texts[task.text] != task.corpus:
            raise SurgeonError(
                f"the text {task.text.name}, or the tokenizer of {task.model}, changed after the"
                " sweep was planned; run it again."
            )

    def _drop(self) -> None:
        self.opened, self.lab = None, None
        self.texts.clear()
        gc.collect()  # a map and its model point at each other
