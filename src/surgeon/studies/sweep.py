"""`sweep`: many models, verbs and seeds as independent tasks. A verb that works on a model is an
operation of a plan, and its settings are the operation's parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import transformers

from ..errors import BadInput, SurgeonError
from ..result import Result, record, result
from ..settings import setting
from ..sweep.cluster import RayCrew
from ..sweep.local import LocalCrew
from ..sweep.plan import expand, read_plan
from ..sweep.schedule import Crew, Summary, run_tasks
from ..sweep.store import Store
from ..sweep.task import Operation, Row, Task
from . import edit
from .desk import Desk
from .lab import Lab, open_lab
from .registry import STUDIES

__all__ = ["OPERATIONS", "Settings", "SweepResult", "open_lab", "run"]


@dataclass(frozen=True)
class _Edits:
    """Edits that had nothing to do with one another, as one table."""

    edits: list[edit.EditResult]

    def rows(self) -> list[Row]:
        return [
            {**row, "verdict": one.preflight.verdict} for one in self.edits for row in one.rows()
        ]


class _EachEdit:
    """`edit` as an operation: each fact of a file is edited alone, on the intact model.

    A sweep asks what edits do and keeps no patch, so the forecast refuses none: it is a column.
    """

    settings = edit.Settings
    seeded = True

    def run(self, lab: Lab, given: Mapping[str, Any]) -> _Edits:
        settings = STUDIES["edit"].configured(given)
        # the file as a whole says who the neighbours of each fact are
        facts = edit.completed(
            lab, edit.asked(settings.fact, settings.source), settings.scoring.text.bos
        )
        each = [
            replace(
                settings, fact=edit.FactSettings(), source=edit.FactsSettings([fact]), force=True
            )
            for fact in facts
        ]
        return _Edits([edit.run(lab, one) for one in each])


# workers import both by the name of this module
OPERATIONS: dict[str, Operation] = {
    **{name: study for name, study in STUDIES.items() if study.opens},
    "edit": _EachEdit(),
}


@dataclass(frozen=True)
class Settings:
    """Run the tasks of PLAN (YAML) that have no result yet: models x operations x seeds.

    An operation is a verb that works on a model, its parameters are the verb's settings.
    """

    plan: str = setting(help="the plan", metavar="PLAN", is_file=True)
    output: str | None = setting(
        None,
        "folder of the results; run again, it goes on with what is missing; not given: PLAN's name",
        metavar="DIR",
        short="-o",
    )
    engine: str = setting(
        "local", "processes here, or a Ray cluster", choices=("local", "ray"), group="Engine"
    )
    address: str | None = setting(
        None,
        "Ray: auto, host:port or ray://host:port of a cluster; not given: Ray is started on this"
        " machine alone",
        group="Engine",
    )
    workers: int | None = setting(
        None,
        "most tasks at a time; not given: as many as there are CPUs for",
        low=1,
        group="Engine",
    )
    threads: int | None = setting(
        None, "CPUs of a worker; not given: at most 4", low=1, group="Engine"
    )
    gpus: float = setting(
        0.0, "Ray: GPUs that a worker reserves, also a share", low=0, group="Engine"
    )
    dry_run: bool = setting(False, "check the plan, list the tasks that are missing, and run none")

    def __post_init__(self) -> None:
        if self.engine == "local" and (self.address is not None or self.gpus):
            raise BadInput("‹address› and ‹gpus› are for ‹engine› ray.")


@record
class PlannedTask:
    """A task in a few words."""

    id: str
    task: str


@record
class FailedTask:
    """A task that failed, and why; the next run tries it again."""

    id: str
    task: str
    error: str


@result("sweep")
class SweepResult(Result):
    """What a run of a plan did.

    tasks: of the plan; done_before: by earlier runs; done: in this one; missing: that have no
    result, in a dry run all that would be run.
    """

    title: str
    folder: str
    engine: str
    tasks: int
    done_before: int
    done: int
    failed: list[FailedTask]
    missing: list[PlannedTask]


def run(desk: Desk, settings: Settings) -> SweepResult:
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    plan = read_plan(settings.plan, OPERATIONS)
    tasks = expand(plan)
    folder = settings.output or Path(settings.plan).stem
    store = Store(folder)
    before = len(tasks) - len(store.missing(tasks))
    summary = Summary(len(tasks), before, 0, [])
    if not settings.dry_run:
        with store.writing(asdict(plan), tasks):
            summary = _work(desk, settings, store, tasks)
    return SweepResult(
        title=plan.title,
        folder=folder,
        engine=settings.engine,
        tasks=summary.tasks,
        done_before=summary.before,
        done=summary.done,
        failed=[FailedTask(f.task.id, f.task.says, f.error) for f in summary.failures],
        missing=[PlannedTask(task.id, task.says) for task in store.missing(tasks)],
        provenance=desk.provenance(settings, model=", ".join(plan.models)),
    )


def failed(result: SweepResult, settings: Settings) -> str | None:
    """Why the command line ends with status 1."""
    if not result.failed:
        return None
    return (
        f"{len(result.failed)} of {result.tasks} tasks failed; the same command tries them again."
    )


def _work(desk: Desk, settings: Settings, store: Store, tasks: Sequence[Task]) -> Summary:
    try:
        return run_tasks(tasks, store, _engine(settings), desk.tell)
    except KeyboardInterrupt:
        kept = len(tasks) - len(store.missing(tasks))
        raise SurgeonError(
            f"interrupted; {kept} of {len(tasks)} tasks are done and kept in {store.folder}, and"
            " the same command goes on with the others."
        ) from None


def _engine(settings: Settings) -> Callable[[int], Crew]:
    workers, threads = settings.workers, settings.threads
    if settings.engine == "local":
        return partial(LocalCrew, __name__, workers=workers, threads=threads)
    return partial(
        RayCrew,
        __name__,
        workers=workers,
        threads=threads,
        address=settings.address,
        gpus=settings.gpus,
    )
