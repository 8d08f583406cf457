"""Zero-shot accuracy through lm-eval.

It is measured on the model object in memory, so that an injured model is measured as it stands.
lm-eval keeps the tokenizer's own BOS policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
from torch import nn

from ..errors import BadInput, MissingExtra


def task_accuracy(
    model: nn.Module,
    tokenizer: transformers.PreTrainedTokenizerBase,
    tasks: Sequence[str],
    limit: int | None = None,
) -> dict[str, float]:
    """Accuracy (lm-eval's `acc`, else `exact_match`) of each task, by name.

    tasks: names that lm-eval knows (their data come from the Hub), or paths of task YAML files.
    limit: items of each task, from the first; default, all.
    Raises: MissingExtra without `weight-surgeon[eval]`; BadInput for a task that is unknown or
    gives no accuracy.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MissingExtra("accuracy on tasks", "eval") from error
    files = [Path(task) for task in tasks if _is_file(task)]
    for file in files:
        if not file.is_file():
            raise BadInput(
                f"no task file at {file}; give a task YAML of lm-eval, or the name of a task it"
                " knows."
            )
    names = [Path(task).stem if _is_file(task) else task for task in tasks]
    folders = [str(file.parent.resolve()) for file in files]
    # reading lm-eval's own thousands of tasks takes seconds, so only where one is named
    any_named = len(files) < len(tasks)
    manager = TaskManager(include_path=folders or None, include_defaults=any_named)
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise BadInput(
            f"lm-eval has no task named {', '.join(unknown)}; a task file must be named after the"
            " task it defines."
        )
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=16)
    results: dict[str, Any] = simple_evaluate(
        wrapped,
        tasks=names,
        task_manager=manager,
        limit=limit,
        bootstrap_iters=0,
        verbosity="ERROR",
    )["results"]
    return {name: _accuracy(name, results[name]) for name in names}


def _is_file(task: str) -> bool:
    return task.endswith((".yaml", ".yml"))


def _accuracy(name: str, scores: dict[str, Any]) -> float:
    # lm-eval writes a metric and its filter as "acc,none"
    for metric in ("acc", "exact_match"):
        for key, value in scores.items():
            if key.partition(",")[0] == metric:
                return float(value)
    raise BadInput(f"the task {name} gives {', '.join(scores)}, no accuracy.")
