"""Repair as a whole: the patch, its measures, its control."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from surgeon.anatomy import Anatomy, Entry, Site, load_model
from surgeon.corpus import load_corpus, read_text
from surgeon.errors import BadInput, SurgeonError
from surgeon.measure import mean_nll
from surgeon.patch import Patch, ablate, load, save
from surgeon.patch.file import to_bytes
from surgeon.repair import (
    METHODS,
    ControlRepair,
    DistilConfig,
    RepairConfig,
    RepairResult,
    recut,
    repair,
)
from surgeon.settings import configured

from .conftest import COLUMNS, ROW, Patient

ENTRIES = [f"L0.mlp.down[{ROW}, {c}]" for c in COLUMNS]
QUICK = RepairConfig(exclude_injured=True, distil=DistilConfig(steps=10, every=5))
FIXED = {
    "nll",
    "ppl",
    "kl",
    "recovered",
    "steps",
    "seconds",
    "patch_bytes",
    "cosine_to_row",
    "delta_norm",
    "row_norm",
    "control",
    "held_out",
}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("method", METHODS)
def test_a_repair_is_a_patch_that_stacks_on_the_injury(
    patient: Patient, tmp_path: Path, kind: str, method: str
) -> None:
    anatomy, corpus = patient(kind)
    before = {name: p.clone() for name, p in anatomy.model.named_parameters()}
    injury = ablate(anatomy, ENTRIES)
    result = repair(anatomy, injury, corpus, replace(QUICK, method=method))
    document = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert set(document) >= FIXED
    assert document["control"]["recovered"] < document["recovered"]
    assert document["held_out"]["recovered"] == document["recovered"]
    read = RepairResult.from_json(document)
    assert read == result
    assert read.rows() == result.rows()
    assert len(repr(result).splitlines()) <= 40
    assert max(map(len, repr(result).splitlines())) <= 100
    save(result.patch, tmp_path / "p")
    assert document["patch_bytes"] == (tmp_path / "p").stat().st_size

    patch = load(tmp_path / "p")
    for first, second in ((injury, patch), (patch, injury)):
        injury.apply_(anatomy)
        patch.apply_(anatomy)
        assert mean_nll(anatomy.model, corpus.windows[-10:]) == pytest.approx(
            document["nll"]["patched"], rel=1e-6
        )
        assert bool((anatomy.view("L0.mlp.down").read()[ROW, list(COLUMNS)] == 0).all())
        first.undo_(anatomy)
        second.undo_(anatomy)
        assert all(torch.equal(p, before[name]) for name, p in anatomy.model.named_parameters())
    assert to_bytes(
        repair(anatomy, injury, corpus, replace(QUICK, method=method)).patch
    ) == to_bytes(patch)


def test_norms_and_cosine_are_those_of_the_rows(patient: Patient) -> None:
    anatomy, corpus = patient()
    injury = ablate(anatomy, ENTRIES)
    result = repair(anatomy, injury, corpus, replace(QUICK, method="graft", control=False))
    row = anatomy.view("L0.mlp.down").read()[ROW].double().clone()
    with injury.applied(anatomy):
        broken = anatomy.view("L0.mlp.down").read()[ROW].double().clone()
        with result.patch.applied(anatomy):
            delta = anatomy.view("L0.mlp.down").read()[ROW].double() - broken
    assert result.row_norm == pytest.approx(float(row.norm()))
    assert result.delta_norm == pytest.approx(float(delta.norm()))
    assert result.cosine_to_row == pytest.approx(float(torch.cosine_similarity(delta, row, dim=0)))
    assert result.control is None


def test_two_layers_a_second_text_and_low_rank(patient: Patient) -> None:
    anatomy, corpus = patient()
    second = replace(corpus, name="other words", windows=corpus.windows[:7])
    injury = ablate(anatomy, [*ENTRIES, "L2.mlp.down[:, 9]"])
    result = repair(
        anatomy, injury, replace(corpus, windows=corpus.windows[7:]), replace(QUICK, rank=2), second
    )
    assert [str(s) for s in result.patch.sites] == ["L0.mlp.down", "L2.mlp.down"]
    assert (result.held_out.name, result.held_out.second_text) == ("other words", True)
    assert result.control == ControlRepair(
        None,
        why="the repair may change more than half of the rows, so there are no other ones to"
        " compare with",
    )
    assert result.nll.patched < result.nll.broken
    injury.apply_(anatomy)
    result.patch.apply_(anatomy)


def test_what_cannot_be_repaired_is_said(patient: Patient) -> None:
    anatomy, corpus = patient()
    injury = ablate(anatomy, ENTRIES)
    values = anatomy.view("L0.mlp.down").read()[ROW, list(COLUMNS)].clone()
    with injury.applied(anatomy):
        cure = Patch.from_entries(anatomy, [Entry.parse(e) for e in ENTRIES], values)
    with pytest.raises(BadInput, match="has 4 windows, and a repair needs 5"):
        repair(anatomy, injury, replace(corpus, windows=corpus.windows[:4]))
    with injury.applied(anatomy), pytest.raises(SurgeonError, match="no damage to repair"):
        repair(anatomy, cure, corpus)
    for name, value, says in (
        ("method", "sew", "method sew is not known; use graft, distil, graft\\+distil"),
        ("loss", "l2", "loss l2 is not known; use kl, ce"),
        ("steps", 0, "steps is 0; it must be at least 1"),
        ("cooldown", 1.5, "cooldown is 1.5; it must be at most 1"),
        ("ridges", (0.0,), "a graft needs ridges and first_weights, all above 0"),
    ):
        with pytest.raises(BadInput, match=says):
            configured(RepairConfig, {name: value})
    with pytest.raises(BadInput, match="solved for all entries at once"):
        configured(RepairConfig, {"method": "graft", "sparse_k": 3})


def test_recut_windows_hold_the_same_tokens(patient: Patient) -> None:
    _, corpus = patient()
    short = recut(corpus.windows, True, 10)
    assert bool((short[:, 0] == 1).all())
    assert torch.equal(
        short[:, 1:].flatten(), corpus.windows[:, 1:].flatten()[: short.shape[0] * 9]
    )


def test_the_reference_follows_the_published_experiment() -> None:
    training = RepairConfig.reference().distil
    assert (training.lr, training.steps, training.batch, training.length, training.loss) == (
        1e-3,
        400,
        2,
        128,
        "kl",
    )
    assert (training.schedule, training.patience) == ("constant", 0)
    assert DistilConfig().relative_lr * 1.14 / 8192**0.5 == pytest.approx(1e-3, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "bar"), [("graft", 0.85), ("distil", 0.8), ("graft+distil", 0.85)]
)
def test_a_trained_model_recovers(shared: Path, method: str, bar: float) -> None:
    loaded = load_model(str(shared / "models" / "tinystories-656k"))
    assert loaded.tokenizer is not None
    anatomy = Anatomy.of(loaded.model)
    corpus = load_corpus(
        loaded.tokenizer, read_text(shared / "text" / "tinystories-sample.txt"), "stories"
    )
    cols = (165, 230, 163, 112, 380, 228, 226, 41, 62, 245, 157, 34)
    injury = ablate(anatomy, [f"L0.mlp.down[88, {c}]" for c in cols])
    result = repair(anatomy, injury, corpus, RepairConfig(method=method, exclude_injured=True))
    assert result.recovered > bar
    assert result.control is not None
    assert result.control.recovered is not None
    assert result.control.recovered < result.recovered - 0.3
    assert result.patch.touched(Site(0, "mlp.down")).any(1).nonzero().flatten().tolist() == [88]
