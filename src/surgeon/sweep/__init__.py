"""Sweeps: models x operations x seeds as independent tasks, in a pool of processes or on a Ray
cluster, resumable.

Every name here is imported when it is first used, so that a table of results loads no model.
"""

from __future__ import annotations

import importlib
from typing import Any

# the module that each name comes from
_FACE = {
    "Answer": "tables",
    "Crew": "schedule",
    "Operation": "task",
    "Plan": "plan",
    "Row": "task",
    "Store": "store",
    "Summary": "schedule",
    "Task": "task",
    "Work": "plan",
    "averages": "tables",
    "expand": "plan",
    "query": "tables",
    "read_plan": "plan",
    "run_tasks": "schedule",
}

__all__ = sorted(_FACE)


def __getattr__(name: str) -> Any:
    if name not in _FACE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_FACE[name]}"), name)
