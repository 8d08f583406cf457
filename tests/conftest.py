"""Shared fixtures.

Tests that need trained models outside the project skip, with a reason, only where the folder is
absent.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

SHARED = Path(__file__).resolve().parents[2] / "shared"

torch.set_num_threads(1)  # pytest-xdist runs one process per core


@pytest.fixture(scope="session")
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip(f"the trained models and texts beside the project are not here ({SHARED})")
    return SHARED


@pytest.fixture
def quiet() -> Iterator[None]:
    """Without transformers' progress bars."""
    from transformers.utils import logging as of_transformers

    of_transformers.disable_progress_bar()
    yield
    of_transformers.enable_progress_bar()


class _Deprecated(logging.Handler):
    """transformers logs some of its deprecations instead of warning; here they are errors, too."""

    def emit(self, record: logging.LogRecord) -> None:
        if "deprecated" in record.getMessage():
            raise DeprecationWarning(record.getMessage())


@pytest.fixture(scope="session", autouse=True)
def _deprecations_are_errors():
    handler = _Deprecated(logging.WARNING)
    for name in ("transformers", "peft"):
        logging.getLogger(name).addHandler(handler)
    yield
    for name in ("transformers", "peft"):
        logging.getLogger(name).removeHandler(handler)
