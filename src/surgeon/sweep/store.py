"""The folder of a sweep: one Parquet file a task, each written whole or not at all; the manifest;
records of errors.

DIR/manifest.json        the plan as it was last run, and every task with its id
DIR/results/ID.parquet   the rows of a finished task
DIR/errors/ID.json       why a task failed; the next run tries it again

How this works. The id of a task is the hash of its content, so a file that has it as its name is
the result of that very task, whenever and by whichever plan it was made. There is no list of what
is done: a task is done if its file is there. One process writes, under the lock of the manifest;
every file is renamed into its place when it is whole, so that a run may be killed at any time, and
what it left under a temporary name is cleared away by the next. The manifest says which of the
files belong to the plan as it is now; the tables read no others.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .. import files
from ..errors import BadInput, MissingExtra
from .task import Row, Task

_PARTS = ("results", "errors")


class Store:
    """The folder of a sweep. Raises: MissingExtra without `weight-surgeon[sweep]`."""

    def __init__(self, folder: str | Path) -> None:
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError as error:
            raise MissingExtra("a sweep", "sweep") from error
        self.folder = Path(folder)

    def result(self, task: str) -> Path:
        return self.folder / "results" / f"{task}.parquet"

    def error(self, task: str) -> Path:
        return self.folder / "errors" / f"{task}.json"

    @contextmanager
    def writing(self, plan: dict[str, Any], tasks: Sequence[Task]) -> Iterator[None]:
        """Make the folder, write the manifest, and keep every other sweep out meanwhile.

        Raises: BadInput for a folder that cannot be used, or holds something else; SurgeonError if
        another sweep is writing to it.
        """
        manifest = self.folder / "manifest.json"
        if self.folder.is_dir() and not manifest.exists() and self._holds_more():
            raise BadInput(
                f"{self.folder} is no folder of a sweep and is not empty; choose another place."
            )
        parts = [self.folder / name for name in _PARTS]
        for part in parts:
            files.make_folder(part)
        document = {"plan": plan, "tasks": [t.to_json() for t in tasks]}
        text = json.dumps(document, indent=1, sort_keys=True, allow_nan=False) + "\n"
        with files.lock(manifest):
            for part in parts:
                files.clear_leftovers(part)
            files.write_text(manifest, text)
            yield

    def _holds_more(self) -> bool:
        """Whether the folder holds anything that is not of a sweep."""
        return any(p.name not in _PARTS and p.name[0] != "." for p in self.folder.iterdir())

    def missing(self, tasks: Sequence[Task]) -> list[Task]:
        return [t for t in tasks if not self.result(t.id).exists()]

    def keep(self, task: Task, rows: Sequence[Row]) -> None:
        """Write the result of a task.

        Columns that are None in every row are left out: they have no type.
        """
        import pyarrow
        import pyarrow.parquet

        known = task.columns()
        whole = [{**known, **row} for row in rows]
        every = dict.fromkeys(name for row in whole for name in row)
        names = [name for name in every if any(row.get(name) is not None for row in whole)]
        table = pyarrow.table({name: [row.get(name) for row in whole] for name in names})
        table = table.replace_schema_metadata(
            {"surgeon": json.dumps(task.to_json(), sort_keys=True)}
        )
        with files.writing(self.result(task.id)) as part:
            pyarrow.parquet.write_table(table, part)
        self.error(task.id).unlink(missing_ok=True)

    def fail(self, task: Task, message: str, details: str | None) -> None:
        record = {"error": message, "details": details, "task": task.to_json()}
        text = json.dumps(record, indent=1, sort_keys=True) + "\n"
        files.write_text(self.error(task.id), text)

    def tasks(self) -> list[Task]:
        """The tasks of the manifest. Raises: BadInput if the folder holds none that can be read."""
        manifest = self.folder / "manifest.json"
        try:
            return [
                Task.from_json(t) for t in json.loads(manifest.read_text(encoding="utf-8"))["tasks"]
            ]
        except OSError as error:
            raise BadInput(
                f"{self.folder} is no folder of a sweep: its manifest.json cannot be read"
                f" ({error.strerror})."
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise BadInput(
                f"{manifest} is damaged; run the sweep again, it keeps the results."
            ) from error
