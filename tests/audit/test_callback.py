"""The trainer's callback in real training runs of a few steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model
from transformers import PreTrainedModel, Trainer, TrainingArguments

from surgeon.anatomy import Anatomy, Entry
from surgeon.audit import CriticalWeights
from surgeon.errors import BadInput

ONE, OTHER = "L0.mlp.down[5, 7]", "L1.mlp.down[3, 4]"
pytestmark = pytest.mark.filterwarnings("ignore")  # accelerate's and torch's own


def trained(
    model: Any, folder: Path, callback: CriticalWeights, **more: Any
) -> list[dict[str, Any]]:
    """Four steps of Adam with momentum and weight decay; what the trainer logged."""
    model.requires_grad_(True) if isinstance(model, PreTrainedModel) else None
    ids = torch.randint(3, 99, (32, 12), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in ids]
    arguments = TrainingArguments(
        folder,
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=0.02,
        weight_decay=0.1,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
        **more,
    )
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[callback])
    trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line]


def entry(model: PreTrainedModel, address: str) -> float:
    found = Entry.parse(address)
    return float(Anatomy.of(model).view(found.site).read()[found.row, found.col])


def test_drift_is_logged(tmp_path: Path) -> None:
    model = tiny_model("llama")
    before = {a: entry(model, a) for a in (ONE, OTHER)}
    logs = trained(model, tmp_path, CriticalWeights([ONE, Entry.parse(OTHER)]))
    assert len(logs) == 4
    for address, old in before.items():
        ratios = [line[f"critical/{address}"] for line in logs]
        assert ratios[-1] == pytest.approx(entry(model, address) / old)
        assert len(set(ratios)) == 4


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_frozen_entries_keep_their_bits_and_nothing_else_does(kind: str, tmp_path: Path) -> None:
    free, held = tiny_model(kind), tiny_model(kind)
    old = Anatomy.of(tiny_model(kind)).view("L0.mlp.down").read().clone()
    logs = trained(held, tmp_path / "held", CriticalWeights([ONE], freeze=True))
    assert [line[f"critical/{ONE}"] for line in logs] == [1.0] * 4
    now = Anatomy.of(held).view("L0.mlp.down").read()
    assert now[5, 7] == old[5, 7]
    assert int((now == old).sum()) == 1
    trained(free, tmp_path / "free", CriticalWeights([ONE]))
    assert entry(free, ONE) != old[5, 7]


def test_frozen_with_accumulated_gradients_in_bfloat16(tmp_path: Path) -> None:
    model = tiny_model("llama").bfloat16()
    old = entry(model, ONE)
    trained(model, tmp_path, CriticalWeights([ONE], freeze=True), gradient_accumulation_steps=2)
    assert entry(model, ONE) == old


def test_many_entries_are_summed_up(tmp_path: Path) -> None:
    model = tiny_model("llama")
    entries = [f"L0.mlp.down[5, {c}]" for c in range(12)]
    old = torch.tensor([entry(model, e) for e in entries], dtype=torch.float64)
    last = trained(model, tmp_path, CriticalWeights(entries))[-1]
    now = torch.tensor([entry(model, e) for e in entries], dtype=torch.float64)
    ratios = now / old
    assert last["critical/furthest"] == pytest.approx(float(ratios[(ratios - 1).abs().argmax()]))
    assert last["critical/sum"] == pytest.approx(float((now * old.sign()).sum() / old.abs().sum()))
    assert f"critical/{entries[0]}" not in last


def test_adapters_are_watched_where_they_act(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["down_proj"])
    before = entry(tiny_model("llama"), ONE)
    model = get_peft_model(tiny_model("llama"), settings)
    last = trained(model, tmp_path, CriticalWeights([ONE]))[-1]
    assert last[f"critical/{ONE}"] != 1
    assert last[f"critical/{ONE}"] == pytest.approx(
        entry(model.merge_and_unload(), ONE) / before, rel=1e-5
    )
    with pytest.raises(BadInput, match="through an adapter"):
        trained(
            get_peft_model(tiny_model("llama"), settings),
            tmp_path,
            CriticalWeights([ONE], freeze=True),
        )


def test_what_cannot_be_watched(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no critical entries"):
        CriticalWeights([])
    with pytest.raises(BadInput, match="whole row"):
        CriticalWeights(["L0.mlp.down[5, :]"])
    with pytest.raises(BadInput, match="does not exist"):
        trained(tiny_model("llama"), tmp_path, CriticalWeights(["L0.mlp.down[5, 700]"]))
    with pytest.raises(BadInput, match="does not exist"):
        trained(tiny_model("llama"), tmp_path, CriticalWeights(["L9.mlp.down[5, 7]"]))
