"""A run folder made of given results."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from surgeon.result import Result


@pytest.fixture
def run_folder(tmp_path: Path) -> Callable[..., Path]:
    """A run folder that holds the given results by file name."""

    def make(**results: Result) -> Path:
        for name, result in results.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(result.to_json()), encoding="utf-8")
        return tmp_path

    return make
