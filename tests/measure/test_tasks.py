"""Zero-shot accuracy through lm-eval, with the model object in memory, on a local task: against a
plain computation.
"""

import json

import pytest
import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerBase

from surgeon.anatomy import Anatomy, load_model
from surgeon.errors import BadInput, MissingExtra
from surgeon.measure import task_accuracy
from surgeon.patch import ablate

pytestmark = pytest.mark.filterwarnings(
    "ignore"
)  # lm-eval and datasets warn about their own dependencies

TASK = """task: local_piqa
dataset_path: json
dataset_kwargs:
  data_files:
    validation: {data}
test_split: validation
output_type: multiple_choice
doc_to_text: "{{{{goal}}}}"
doc_to_target: label
doc_to_choice: "{{{{[sol1, sol2]}}}}"
metric_list:
  - metric: acc
"""


@pytest.fixture
def piqa(shared, tmp_path, monkeypatch):
    """Forty PIQA questions as a task of lm-eval, made from the files beside the project."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [
        json.loads(line) for line in (shared / "tasks" / "piqa.jsonl").read_text().splitlines()[:40]
    ]
    labels = [int(x) for x in (shared / "tasks" / "piqa-labels.lst").read_text().split()[:40]]
    items = [
        {"goal": r["goal"], "sol1": r["sol1"], "sol2": r["sol2"], "label": n}
        for r, n in zip(rows, labels, strict=True)
    ]
    data = tmp_path / "piqa.jsonl"
    data.write_text("".join(json.dumps(item) + "\n" for item in items))
    task = tmp_path / "local_piqa.yaml"
    task.write_text(TASK.format(data=data))
    return task, items


def plain_accuracy(model, tokenizer, items):
    """The choice with the higher log-likelihood after the question."""
    right = 0
    for item in items:
        scores = []
        for choice in (item["sol1"], item["sol2"]):
            context, whole = (
                tokenizer(t).input_ids for t in (item["goal"], f"{item['goal']} {choice}")
            )
            logits = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            targets = whole[len(context) :]
            scores.append(
                float(
                    -F.nll_loss(
                        logits[len(context) - 1 : -1], torch.tensor(targets), reduction="sum"
                    )
                )
            )
        right += int(scores[1] > scores[0]) == item["label"]
    return right / len(items)


@pytest.mark.slow
def test_accuracy_before_and_after_an_injury(shared, piqa):
    task, items = piqa
    loaded = load_model(str(shared / "models" / "stories-260k"))
    anatomy = Anatomy.of(loaded.model)
    assert task_accuracy(loaded.model, loaded.tokenizer, [str(task)])[
        "local_piqa"
    ] == plain_accuracy(loaded.model, loaded.tokenizer, items)
    # taking a whole matrix out must show, or the injured model is not the one that was measured
    with ablate(
        anatomy, [anatomy.region("L1.attn.out[:, :]"), anatomy.region("L0.mlp.down[:, :]")]
    ).applied(anatomy):
        injured = task_accuracy(loaded.model, loaded.tokenizer, [str(task)])["local_piqa"]
        assert injured == plain_accuracy(loaded.model, loaded.tokenizer, items)


def test_an_unknown_task_is_said_so(tmp_path):
    with pytest.raises(BadInput, match="no task file"):
        task_accuracy(
            torch.nn.Linear(1, 1), PreTrainedTokenizerBase(), [str(tmp_path / "none.yaml")]
        )


def test_without_lm_eval_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(MissingExtra, match=r"weight-surgeon\[eval\]"):
        task_accuracy(torch.nn.Linear(1, 1), PreTrainedTokenizerBase(), ["piqa"])
