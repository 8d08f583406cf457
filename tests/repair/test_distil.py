"""Distillation: its loss against the plain one, only allowed entries, and the same bytes after a
kill.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from surgeon.anatomy import Anatomy, Site
from surgeon.errors import BadInput
from surgeon.patch import Patch, ablate
from surgeon.repair import DistilConfig, Distilled, distil, targets
from surgeon.repair.lesson import Lesson, coarse
from surgeon.repair.run import Part, Run

from .conftest import COLUMNS, ROW, Patient

SHORT = DistilConfig(steps=12, every=4)


def injure(anatomy: Anatomy, site: str = "L0.mlp.down") -> tuple[Site, Patch]:
    return Site.parse(site), ablate(anatomy, [f"{site}[{ROW}, {c}]" for c in COLUMNS])


def run(
    anatomy: Anatomy, injury: Patch, windows: Tensor, config: DistilConfig = SHORT, **more: Any
) -> Distilled:
    wanted = targets(anatomy, injury, exclude_injured=True, rank=more.get("rank", 0))
    return distil(anatomy, injury, wanted, windows[:30], windows[30:], config, **more)


@pytest.mark.parametrize("site", ["L0.mlp.down", "L2.mlp.down"])
def test_the_gradient_is_that_of_the_plain_kl(patient: Patient, site: str) -> None:
    anatomy, corpus = patient("llama", site=site)
    where, injury = injure(anatomy, site)
    model, ids, drawn = anatomy.model, corpus.windows[:6], [4, 1]
    lesson = Lesson(anatomy, ids, range(6), where.layer or 0, DistilConfig())
    with torch.no_grad():
        intact = F.log_softmax(model(input_ids=ids[drawn]).logits[:, :-1], -1)
    weight = model.get_parameter(anatomy.addresses[where].parameter)
    with injury.applied(anatomy):
        weight.requires_grad_(True)
        broken = F.log_softmax(model(input_ids=ids[drawn]).logits[:, :-1], -1)
        plain = F.kl_div(broken, intact, reduction="none", log_target=True).sum(-1).mean()
        (expected,) = torch.autograd.grad(plain, weight)
        loss = lesson.loss(lesson.logits(drawn), drawn)
        (gradient,) = torch.autograd.grad(loss, weight)
        weight.requires_grad_(False)
    assert lesson.keeps_entries == (site == "L2.mlp.down")
    torch.testing.assert_close(loss.detach(), plain.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ({"cooldown": 0.0}, [1, 1, 1, 1, 1, 1]),
        ({"cooldown": 0.5}, [1, 1, 1, 1, 2 / 3, 1 / 3]),
        ({"schedule": "cosine"}, [1, 0.9330127, 0.75, 0.5, 0.25, 0.0669873]),
    ],
)
def test_training_is_that_of_the_plain_loop(
    patient: Patient, schedule: dict[str, Any], rates: list[float]
) -> None:
    """Both models run whole at every step, AdamW on the whole matrix, its gradient masked."""
    anatomy, corpus = patient()
    where, injury = injure(anatomy)
    fit = corpus.windows[:30]
    result = run(
        anatomy, injury, corpus.windows, DistilConfig(steps=6, lr=0.01, patience=0, **schedule)
    )
    student = copy.deepcopy(anatomy.model)
    injury.apply_(Anatomy.of(student))
    weight = student.get_parameter(anatomy.addresses[where].parameter).requires_grad_(True)
    free = torch.zeros_like(weight)
    free[ROW] = 1
    free[ROW, list(COLUMNS)] = 0
    optimizer = torch.optim.AdamW([weight], lr=0.01, weight_decay=0.0)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    for step, rate in enumerate(rates):
        ids = fit[order[2 * step : 2 * step + 2]]
        with torch.no_grad():
            intact = anatomy.model(input_ids=ids).logits[:, :-1].log_softmax(-1)
        log_q = student(input_ids=ids).logits[:, :-1].log_softmax(-1)
        loss = F.kl_div(log_q, intact, log_target=True, reduction="none").sum(-1).mean()
        (grad,) = torch.autograd.grad(loss, weight)
        weight.grad = grad * free
        optimizer.param_groups[0]["lr"] = 0.01 * rate
        optimizer.step()
    # less than a hundredth of one step
    torch.testing.assert_close(result.changes[where].matrix, weight.detach(), rtol=0, atol=5e-5)


def test_of_looks_as_good_as_the_best_the_last_is_kept(patient: Patient) -> None:
    anatomy, _ = patient()
    where, injury = injure(anatomy)
    wanted = targets(anatomy, injury, exclude_injured=True)
    matrix = anatomy.view(where).read()

    def kept(losses: list[float], patience: int = 4) -> tuple[int, int]:
        part = Part(anatomy, wanted[0], matrix, None, 0, 1.0, 0)
        training = Run([part], DistilConfig(steps=100, every=1, patience=patience), "", None)
        for loss in losses:
            if training.over:
                break
            with torch.no_grad():
                part.trained[0].fill_(training.step)
            training.look(float(loss), 0.0, None)
            training.step += 1
        (best,) = training.kept()
        assert bool((best.trained[0] == training.best_step).all())
        return training.best_step, training.step

    assert kept([3, 2, 1, 1.01]) == (3, 4)
    assert kept([3, 2, 1, 1.03, 1.5]) == (2, 5)
    assert kept([1, 1.015, 1.03]) == (
        1,
        3,
    )  # 1.03 is near the last that was kept, and not near the best
    assert kept([1, 1.01, 1.01, 1.01, 1.01, 0.5], patience=4) == (4, 5)  # no better four times
    assert kept([1, 2, 3, 4, 5, 6, 7], patience=0) == (6, 7)


def test_the_likeliest_tokens_and_the_mass_of_the_rest_bound_the_kl() -> None:
    g = torch.Generator().manual_seed(0)
    p, q = (
        F.log_softmax(3 * torch.randn(7, 50, generator=g, dtype=torch.float64), -1)
        for _ in range(2)
    )
    kl = lambda a, b: (a.exp() * (a - b)).sum(-1)  # noqa: E731
    torch.testing.assert_close(
        coarse(q + 5, p.topk(4).indices), coarse(q, p.topk(4).indices) + 5
    )  # logits do as well
    whole, last = kl(p, q), torch.zeros(7, dtype=torch.float64)
    for k in (1, 5, 20, 49):
        kept = p.topk(k).indices
        part = kl(coarse(p, kept), coarse(q, kept))
        assert bool((coarse(p, kept).logsumexp(-1).abs() < 1e-12).all())
        assert bool((last <= part + 1e-12).all())
        assert bool((part <= whole + 1e-12).all())
        last = part
    torch.testing.assert_close(last, whole)  # "any other" is a single token then


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("llama", torch.float32),
        ("gpt2", torch.float32),
        ("llama", torch.bfloat16),
        ("mixtral", torch.float32),
    ],
)
def test_only_allowed_entries_change_and_the_model_is_left_alone(
    patient: Patient, kind: str, dtype: torch.dtype
) -> None:
    site = "L0.mlp.down.e1" if kind == "mixtral" else "L0.mlp.down"
    anatomy, corpus = patient(kind, dtype, site)
    where, injury = injure(anatomy, site)
    before = {name: p.clone() for name, p in anatomy.model.named_parameters()}
    result = run(anatomy, injury, corpus.windows)
    assert all(
        torch.equal(p, before[name]) and p.grad is None and not p.requires_grad
        for name, p in anatomy.model.named_parameters()
    )
    with injury.applied(anatomy):
        broken = anatomy.view(where).read().clone()
    changed = (result.changes[where].matrix != broken).nonzero().tolist()
    assert changed
    assert all(row == ROW and col not in COLUMNS for row, col in changed)
    first, *_, last = result.curve
    assert min(look.loss for look in result.curve) < first.loss
    assert last.step == 12


def test_a_killed_run_ends_with_the_same_bytes(patient: Patient, tmp_path: Path) -> None:
    anatomy, corpus = patient()
    where, injury = injure(anatomy)
    whole = run(anatomy, injury, corpus.windows)
    file = tmp_path / "half.safetensors"

    def kill(what: str, done: int, total: int) -> None:
        if done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(anatomy, injury, corpus.windows, progress=kill, checkpoint=file)
    looks: list[int] = []
    again = run(
        anatomy,
        injury,
        corpus.windows,
        progress=lambda what, done, total: looks.append(done),
        checkpoint=file,
    )
    assert looks == [12]  # the looks before were not taken again
    assert torch.equal(again.changes[where].matrix, whole.changes[where].matrix)
    assert (again.curve, again.steps, again.kept) == (whole.curve, whole.steps, whole.kept)
    with pytest.raises(BadInput, match="of another repair"):
        run(anatomy, injury, corpus.windows, checkpoint=file, seed=1)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(BadInput, match="damaged"):
        run(anatomy, injury, corpus.windows, checkpoint=file)


def test_the_seed_decides(patient: Patient) -> None:
    anatomy, corpus = patient()
    where, injury = injure(anatomy)
    one, same, other = (
        run(anatomy, injury, corpus.windows, seed=s).changes[where].matrix for s in (0, 0, 1)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_a_sparse_change_has_its_k_entries(patient: Patient) -> None:
    anatomy, corpus = patient()
    where, injury = injure(anatomy)
    with injury.applied(anatomy):
        broken = anatomy.view(where).read().clone()
    sparse = run(anatomy, injury, corpus.windows, DistilConfig(steps=30, every=5, sparse_k=4))
    assert int((sparse.changes[where].matrix != broken).sum()) == 4
    pulled = run(anatomy, injury, corpus.windows, DistilConfig(steps=30, every=5, l1=1.5))
    assert 0 <= int((pulled.changes[where].matrix != broken).sum()) < 45
    with pytest.raises(BadInput, match="cannot be sparse as well"):
        run(anatomy, injury, corpus.windows, DistilConfig(sparse_k=4), rank=1)


def test_a_change_of_low_rank_is_trained_as_factors(patient: Patient) -> None:
    anatomy, corpus = patient()
    where, injury = Site.parse("L0.mlp.down"), ablate(anatomy, ["L0.mlp.down[:, 7]"])
    result = run(anatomy, injury, corpus.windows, rank=2, config=DistilConfig(steps=12, patience=0))
    with injury.applied(anatomy):
        change = (result.changes[where].matrix - anatomy.view(where).read()).double()
    assert int((torch.linalg.svdvals(change) > 1e-4).sum()) == 2
    assert not bool(change[:, 7].any())


def test_without_patience_the_last_step_is_kept(patient: Patient) -> None:
    anatomy, corpus = patient()
    _, injury = injure(anatomy)
    result = run(
        anatomy, injury, corpus.windows, DistilConfig(steps=7, every=4, patience=0, loss="ce")
    )
    assert (result.steps, result.kept) == (7, 7)


def test_two_experts_of_one_parameter_are_trained_together(patient: Patient) -> None:
    anatomy, corpus = patient("mixtral", site="L0.mlp.down.e1")
    injury = ablate(anatomy, [f"L0.mlp.down.e{e}[{ROW}, {c}]" for e in (0, 1) for c in COLUMNS])
    result = run(anatomy, injury, corpus.windows, DistilConfig(steps=6, patience=0))
    with injury.applied(anatomy):
        for site, change in result.changes.items():
            assert bool((change.matrix != anatomy.view(site).read()).any())
    assert [str(s) for s in result.changes] == ["L0.mlp.down.e0", "L0.mlp.down.e1"]
