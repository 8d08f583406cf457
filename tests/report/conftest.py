"""A run folder made of given documents."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def run_folder(tmp_path: Path) -> Callable[..., Path]:
    """A run folder that holds the given documents by file name."""

    def make(**files: dict[str, Any]) -> Path:
        for name, document in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(document), encoding="utf-8")
        return tmp_path

    return make
