"""The graft, against least squares on inputs that are hooked here, and through what the repaired
module writes.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from surgeon.anatomy import Anatomy, Site
from surgeon.errors import BadInput
from surgeon.measure import mean_nll
from surgeon.patch import ablate
from surgeon.repair import GraftConfig, graft, targets

from .conftest import COLUMNS, ROW, Patient

DOWN = Site(0, "mlp.down")
ENTRIES = [f"{DOWN}[{ROW}, {c}]" for c in COLUMNS]


@torch.no_grad()
def seen(anatomy: Anatomy, site: Site, ids: Tensor) -> tuple[Tensor, Tensor]:
    """What enters the module of a site and what leaves it, in float64."""
    kept: list[tuple[Tensor, Tensor]] = []
    handle = anatomy.module(site).register_forward_hook(
        lambda m, a, y: kept.append((a[0].double(), y.double()))
    )
    anatomy.model(input_ids=ids)
    handle.remove()
    (x, y), shape = kept[0], ids.shape
    return x.reshape(*shape, -1), y.reshape(*shape, -1)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_graft_is_the_weighted_ridge_solution(patient: Patient, kind: str) -> None:
    anatomy, corpus = patient(kind)
    injury, fit = ablate(anatomy, ENTRIES), corpus.windows[:30]
    x, intact = seen(anatomy, DOWN, fit)
    with injury.applied(anatomy):
        _, broken = seen(anatomy, DOWN, fit)
    free = [c for c in range(x.shape[-1]) if c not in COLUMNS]
    weight = torch.ones(x.shape[:2], dtype=torch.float64)
    weight[:, 0] = 10
    w = weight.flatten().sqrt()[:, None]
    a, b = x[..., free].flatten(0, 1) * w, (intact - broken)[..., ROW].flatten()[:, None] * w
    ridge = 1e-2 * a.pow(2).sum(0).mean()
    a, b = (
        torch.cat([a, ridge.sqrt() * torch.eye(len(free), dtype=a.dtype)]),
        torch.cat([b, torch.zeros(len(free), 1, dtype=b.dtype)]),
    )
    expected = torch.linalg.lstsq(a, b).solution[:, 0]

    result = graft(
        anatomy,
        injury,
        targets(anatomy, injury, exclude_injured=True),
        fit,
        corpus.windows[30:],
        GraftConfig((1e-2,), (10.0,)),
    )
    change = result.changes[DOWN].matrix.double() - anatomy.view(DOWN).read().double()
    torch.testing.assert_close(change[ROW, free], expected, rtol=1e-4, atol=1e-5)
    choice = result.chosen[str(DOWN)]
    assert (choice.first_weight, choice.ridge) == (10.0, 1e-2)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_with_the_injured_entries_at_hand_the_module_writes_as_before(
    patient: Patient, kind: str
) -> None:
    anatomy, corpus = patient(kind)
    injury = ablate(anatomy, ENTRIES)
    _, intact = seen(anatomy, DOWN, corpus.windows)
    result = graft(
        anatomy,
        injury,
        targets(anatomy, injury),
        corpus.windows,
        corpus.windows,
        GraftConfig((1e-10,), (1.0,)),
    )
    with injury.applied(anatomy):
        _, broken = seen(anatomy, DOWN, corpus.windows)
        anatomy.view(DOWN).assign_(result.changes[DOWN].matrix)
        _, healed = seen(anatomy, DOWN, corpus.windows)
    assert (healed - intact).abs().max() < 1e-4 < (broken - intact).abs().max()


def test_an_injury_below_is_made_good_with_what_enters_the_broken_model(patient: Patient) -> None:
    anatomy, corpus = patient("llama")
    high = Site(2, "mlp.down")
    injury = ablate(anatomy, [*ENTRIES, f"{high}[3, 4]", f"{high}[3, 5]"])
    _, intact = seen(anatomy, high, corpus.windows)
    result = graft(
        anatomy,
        injury,
        targets(anatomy, injury, exclude_injured=True),
        corpus.windows,
        corpus.windows,
        GraftConfig((1e-8,), (1.0,)),
    )
    with injury.applied(anatomy):
        anatomy.view(DOWN).assign_(result.changes[DOWN].matrix)
        x, before = seen(anatomy, high, corpus.windows)
        anatomy.view(high).assign_(result.changes[high].matrix)
        _, after = seen(anatomy, high, corpus.windows)
    error = lambda y: (y - intact)[..., 3].pow(2).mean()  # noqa: E731
    free = [c for c in range(x.shape[-1]) if c not in (4, 5)]
    a, b = x[..., free].flatten(0, 1), (intact - before)[..., 3].flatten()[:, None]
    best = (a @ torch.linalg.lstsq(a, b).solution - b).pow(2).mean()
    assert error(after) == pytest.approx(float(best), rel=1e-3)
    assert error(after) < error(before)


def test_an_injured_column_needs_only_rank_one(patient: Patient) -> None:
    anatomy, corpus = patient("llama")
    injury = ablate(anatomy, [f"{DOWN}[:, 7]"])
    fit, config = corpus.windows, GraftConfig((1e-4,), (1.0,))
    full, one = (
        graft(
            anatomy,
            injury,
            targets(anatomy, injury, exclude_injured=True, rank=rank),
            fit,
            fit,
            config,
            rank,
        ).changes[DOWN]
        for rank in (0, 1)
    )
    torch.testing.assert_close(one.matrix, full.matrix, rtol=0, atol=1e-4)
    assert one.factors is not None
    with injury.applied(anatomy):
        assert bool((full.matrix[:, 7] == anatomy.view(DOWN).read()[:, 7]).all())


def test_a_graft_beats_the_same_in_a_random_row(patient: Patient) -> None:
    anatomy, corpus = patient("llama")
    injury = ablate(anatomy, ENTRIES)
    result = graft(
        anatomy,
        injury,
        targets(anatomy, injury, exclude_injured=True),
        corpus.windows[:20],
        corpus.windows[20:30],
    )
    with injury.applied(anatomy):
        view = anatomy.view(DOWN)
        matrix = view.read().clone()
        broken = mean_nll(anatomy.model, corpus.windows[30:])
        view.assign_(result.changes[DOWN].matrix)
        healed = mean_nll(anatomy.model, corpus.windows[30:])
        elsewhere = matrix.clone()
        elsewhere[9] += result.changes[DOWN].matrix[ROW] - matrix[ROW]
        view.assign_(elsewhere)
        wrong = mean_nll(anatomy.model, corpus.windows[30:])
        view.assign_(matrix)
    assert healed < broken
    assert healed < wrong


def test_what_cannot_be_grafted_is_said(patient: Patient) -> None:
    anatomy, corpus = patient("llama")
    row = ablate(anatomy, [f"{DOWN}[{ROW}, :]"])
    with pytest.raises(BadInput, match="nothing is left to change"):
        targets(anatomy, row, exclude_injured=True)
    with pytest.raises(BadInput, match="no projection"):
        targets(anatomy, ablate(anatomy, ["final_norm[3, 0]"]))
    with pytest.raises(BadInput, match="has no column 48; it has 48"):
        targets(anatomy, row, columns=[48])
    experts, corpus = patient("mixtral", site="L0.mlp.down.e1")
    injury = ablate(experts, ["L0.mlp.down.e1[5, 7]"])
    with pytest.raises(BadInput, match="use method distil"):
        graft(experts, injury, targets(experts, injury), corpus.windows, corpus.windows)
