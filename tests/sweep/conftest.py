from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sweep_work

from surgeon.patients import heldout_text
from surgeon.sweep import Store, Summary, expand, read_plan, run_tasks

HEAD = "models: [patient]\ntext: story.txt\nwindow: 64\nwindows: 4\n"


@pytest.fixture(autouse=True)
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(sweep_work.LOG, str(tmp_path / "log"))
    return tmp_path / "log"


@pytest.fixture
def plan(tmp_path: Path) -> Callable[[str], Any]:
    """The plan of a text; if that begins with something else than models, with the patient on a
    short text put before it.
    """
    (tmp_path / "story.txt").write_text("\n".join(heldout_text().splitlines()[:40]))

    def read(text: str) -> Any:
        path = tmp_path / "plan.yaml"
        path.write_text(HEAD + text if text.startswith(("operations", "seeds")) else text)
        return read_plan(path, sweep_work.OPERATIONS)

    return read


@pytest.fixture
def sweep(plan: Any, tmp_path: Path) -> Callable[..., tuple[Summary, Store]]:
    """A plan's text run into a folder by a crew."""

    def run(text: str, make_crew: Any) -> tuple[Summary, Store]:
        tasks, store = expand(plan(text)), Store(tmp_path / "results")
        with store.writing({"text": text}, tasks):
            return run_tasks(tasks, store, make_crew), store

    return run
