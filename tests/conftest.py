"""Shared fixtures.

Tests that need trained models outside the project skip, with a reason, only where the folder is
absent.
"""

from __future__ import annotations

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
