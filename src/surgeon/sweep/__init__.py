"""Sweeps: models x operations x seeds as independent tasks, in a pool of processes or on a Ray
cluster, resumable.
"""

from .plan import Plan, Work, expand, read_plan
from .schedule import Crew, Summary, run_tasks
from .store import Store
from .tables import Answer, averages, query
from .task import Bench, Operation, Row, Task

__all__ = [
    "Answer",
    "Bench",
    "Crew",
    "Operation",
    "Plan",
    "Row",
    "Store",
    "Summary",
    "Task",
    "Work",
    "averages",
    "expand",
    "query",
    "read_plan",
    "run_tasks",
]
