"""The folder of a sweep: one Parquet file a task, each written whole or not at all; the manifest;
records of errors.

DIR/manifest.json        the plan as it was last run, and every task with its id
DIR/results/ID.parquet   the rows of a finished task
DIR/errors/ID.json       why a task failed; the next run tries it again
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import BadInput, MissingExtra, SurgeonError
from .task import Row, Task


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
        try:
            if (
                self.folder.exists()
                and not manifest.exists()
                and {p.name for p in self.folder.iterdir()} - {".lock", "results", "errors"}
            ):
                raise BadInput(
                    f"{self.folder} is no folder of a sweep and is not empty; choose another place"
                    " with -o."
                )
            for part in ("results", "errors"):
                (self.folder / part).mkdir(parents=True, exist_ok=True)
            lock = (self.folder / ".lock").open("w")
        except OSError as error:
            raise BadInput(
                f"cannot make the folder {self.folder} or write to it: {error.strerror}; choose"
                " another place."
            ) from error
        with lock:
            try:
                fcntl.flock(
                    lock, fcntl.LOCK_EX | fcntl.LOCK_NB
                )  # falls with the process, however it ends
            except OSError as error:
                raise SurgeonError(
                    f"another sweep is writing to {self.folder}; wait for it, or choose another"
                    " folder with -o."
                ) from error
            for left in self.folder.glob("*/.*.part"):  # of a sweep that was killed
                left.unlink()
            document = {"plan": plan, "tasks": [t.to_json() for t in tasks]}
            text = json.dumps(document, indent=1, sort_keys=True, allow_nan=False) + "\n"
            _write(manifest, lambda path: path.write_text(text, encoding="utf-8"))
            yield

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
        names = [
            n
            for n in dict.fromkeys(n for row in whole for n in row)
            if any(row.get(n) is not None for row in whole)
        ]
        table = pyarrow.table({name: [row.get(name) for row in whole] for name in names})
        table = table.replace_schema_metadata(
            {"surgeon": json.dumps(task.to_json(), sort_keys=True)}
        )
        _write(self.result(task.id), lambda path: pyarrow.parquet.write_table(table, path))
        self.error(task.id).unlink(missing_ok=True)

    def fail(self, task: Task, message: str, details: str | None) -> None:
        record = {"error": message, "details": details, "task": task.to_json()}
        text = json.dumps(record, indent=1, sort_keys=True) + "\n"
        _write(self.error(task.id), lambda path: path.write_text(text, encoding="utf-8"))

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


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    part = path.with_name(f".{path.name}.part")
    write(part)
    os.replace(part, path)
