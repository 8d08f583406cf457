"""Zero-shot accuracy through lm-eval, on the model object in memory, so that an injured model is
measured as it stands.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from ..errors import BadInput, MissingExtra


def task_accuracy(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    limit: int | None = None,
) -> dict[str, float]:
    """Accuracy (lm-eval's `acc`, else `exact_match`) of each task, by name.

    tasks: names that lm-eval knows (their data come from the Hub), or paths of local task YAML
    files.
    Raises: MissingExtra without `weight-surgeon[eval]`; BadInput for a task that is unknown or
    gives no accuracy.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MissingExtra("accuracy on tasks", "eval") from error
    files = [Path(t) for t in tasks if t.endswith((".yaml", ".yml"))]
    for file in files:
        if not file.is_file():
            raise BadInput(
                f"no task file at {file}; give a task YAML of lm-eval, or the name of a task it"
                " knows."
            )
    names = [Path(t).stem if t.endswith((".yaml", ".yml")) else t for t in tasks]
    manager = TaskManager(
        include_path=[str(f.parent.resolve()) for f in files] or None,
        include_defaults=len(files) < len(tasks),
    )
    unknown = [n for n in names if n not in manager.all_tasks]
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


def _accuracy(name: str, scores: dict[str, Any]) -> float:
    for metric in ("acc", "exact_match"):
        for key, value in scores.items():
            if key.partition(",")[0] == metric:
                return float(value)
    raise BadInput(f"the task {name} gives {', '.join(scores)}, no accuracy.")
