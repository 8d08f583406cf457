"""The editors' algebra, against brute force on small problems."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from surgeon.edit.alphaedit import null_basis, null_space_change, projection_loss
from surgeon.edit.covariance import CholeskyFactor, KeyMoments, factor
from surgeon.edit.emmet import exact_change
from surgeon.edit.memit import spread_change
from surgeon.edit.radar import output_change, ranked
from surgeon.edit.rome import UnusableKey, chosen_keys, least_change, legacy_change
from surgeon.errors import BadInput, SurgeonError

D_MLP, D_MODEL, N = 12, 7, 3


@pytest.fixture
def problem() -> tuple[Tensor, Tensor, Tensor, CholeskyFactor]:
    g = torch.Generator().manual_seed(0)
    sample = torch.randn(200, D_MLP, generator=g, dtype=torch.float64) @ torch.randn(
        D_MLP, D_MLP, generator=g, dtype=torch.float64
    )
    c = sample.T @ sample / len(sample)
    keys = torch.randn(N, D_MLP, generator=g, dtype=torch.float64)
    return (
        c,
        keys,
        torch.randn(N, D_MODEL, generator=g, dtype=torch.float64),
        CholeskyFactor.of(c, 1e-9),
    )


def constrained_minimum(c: Tensor, keys: Tensor, deltas: Tensor) -> Tensor:
    """argmin tr(D C D') with D keys' = deltas', from the stationarity conditions written out as one
    linear system.
    """
    n, d = len(keys), len(c)
    system = torch.zeros(d + n, d + n, dtype=torch.float64)
    system[:d, :d], system[:d, d:], system[d:, :d] = 2 * c, keys.T, keys
    rhs = torch.cat([torch.zeros(d, deltas.shape[1], dtype=torch.float64), deltas])
    return torch.linalg.solve(system, rhs)[:d].T


def test_rome_is_the_constrained_minimum(
    problem: tuple[Tensor, Tensor, Tensor, CholeskyFactor],
) -> None:
    c, keys, deltas, f = problem
    for constraints in (keys[:1], keys[:2]):
        left, right = least_change(constraints, deltas[0], f)
        torch.testing.assert_close(
            left @ right,
            constrained_minimum(c, constraints, deltas[:1].expand(len(constraints), -1)),
            rtol=1e-6,
            atol=1e-8,
        )
    left, right = legacy_change(keys[0], keys[1], deltas[0], f)
    torch.testing.assert_close(left @ right @ keys[1], deltas[0])
    direction = torch.linalg.solve(c, keys[0])
    assert torch.nn.functional.cosine_similarity(right[0], direction, 0) > 0.999999


def test_emmet_is_the_constrained_minimum(
    problem: tuple[Tensor, Tensor, Tensor, CholeskyFactor],
) -> None:
    c, keys, deltas, f = problem
    left, right = exact_change(keys, deltas, f)
    torch.testing.assert_close(
        left @ right, constrained_minimum(c, keys, deltas), rtol=1e-6, atol=1e-8
    )


def test_memit_is_the_published_formula(
    problem: tuple[Tensor, Tensor, Tensor, CholeskyFactor],
) -> None:
    c, keys, deltas, f = problem
    left, right = spread_change(keys, deltas, f, 5.0)
    published = deltas.T @ keys @ torch.linalg.inv(5.0 * c + keys.T @ keys)
    torch.testing.assert_close(left @ right, published, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("several", [False, True])
def test_alphaedit_is_the_published_formula(
    problem: tuple[Tensor, Tensor, Tensor, CholeskyFactor], several: bool
) -> None:
    c, keys, deltas, _ = problem
    basis = null_basis(c, 0.2)
    p = basis @ basis.T
    earlier = 2 * keys.flip(0) + 1 if several else None
    left, right = null_space_change(keys, deltas, basis, 0.5, earlier)
    past = torch.zeros_like(c) if earlier is None else p @ earlier.T @ earlier @ p
    published = (
        deltas.T
        @ keys
        @ p
        @ torch.linalg.inv(
            past + p @ keys.T @ keys @ p + 0.5 * torch.eye(D_MLP, dtype=torch.float64)
        )
    )
    torch.testing.assert_close(left @ right, published @ p, rtol=1e-6, atol=1e-8)
    values = torch.linalg.eigvalsh(c)
    kept = basis.shape[1]
    assert 0 < kept < D_MLP
    assert values[:kept].sum() <= 0.2 * values.sum() < values[: kept + 1].sum()
    torch.testing.assert_close(
        projection_loss(keys, basis), 1 - (keys @ p).pow(2).sum(1) / keys.pow(2).sum(1)
    )


def test_no_direction_is_small_enough(
    problem: tuple[Tensor, Tensor, Tensor, CholeskyFactor],
) -> None:
    with pytest.raises(BadInput, match="energy"):
        null_basis(torch.eye(5, dtype=torch.float64), 0.1)


def test_keys_that_cannot_be_told_apart(
    problem: tuple[Tensor, Tensor, Tensor, CholeskyFactor],
) -> None:
    _, keys, deltas, f = problem
    for bad in (
        torch.zeros(1, D_MLP, dtype=torch.float64),
        keys[:1].repeat(2, 1),
        keys[:1] * torch.nan,
    ):
        with pytest.raises(UnusableKey):
            least_change(bad, deltas[0], f)
    with pytest.raises(UnusableKey):
        exact_change(keys[[0, 1, 0]], deltas, f)
    assert len(chosen_keys(keys, "both")) == 2
    assert len(chosen_keys(keys[:1], "both")) == 1
    torch.testing.assert_close(chosen_keys(keys, "mean")[0], keys.mean(0))


def test_a_covariance_that_was_never_full(
    problem: tuple[Tensor, Tensor, Tensor, CholeskyFactor],
) -> None:
    rank_two = torch.zeros(D_MLP, D_MLP, dtype=torch.float64)
    rank_two[0, 0] = -1
    with pytest.raises(SurgeonError, match="not positive definite"):
        CholeskyFactor.of(rank_two, 1e-3)


def test_condition_and_ledoit_wolf() -> None:
    """Ledoit & Wolf's own definition, summed over the samples one by one."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(40, D_MLP, generator=g, dtype=torch.float64) * torch.arange(1, D_MLP + 1)
    n, c = len(x), x.T @ x / len(x)
    moments = KeyMoments(
        x.T @ x, x[:20].T @ x[:20], n, 20, float(x.pow(2).sum(1).pow(2).sum()), 0.0
    )
    mu = c.trace() / D_MLP
    d2 = (c - mu * torch.eye(D_MLP)).pow(2).sum()
    b2 = sum((torch.outer(row, row) - c).pow(2).sum() for row in x) / n**2
    assert moments.shrinkage() == pytest.approx(float(min(b2, d2) / d2))
    f = factor(moments, "ledoit-wolf")
    shrunk = (1 - b2 / d2) * c + b2 / d2 * mu * torch.eye(D_MLP)
    torch.testing.assert_close(f.lower @ f.lower.T, shrunk)
    assert f.condition == pytest.approx(float(torch.linalg.cond(shrunk)))


def test_radar_ranks_by_what_changes(
    problem: tuple[Tensor, Tensor, Tensor, CholeskyFactor],
) -> None:
    _, keys, deltas, f = problem
    change = exact_change(keys, deltas, f)
    g = torch.Generator().manual_seed(2)
    many = torch.randn(50, D_MLP, generator=g, dtype=torch.float64)
    brute = torch.stack([(change[0] @ change[1] @ k).norm() for k in many])
    torch.testing.assert_close(output_change(many, change), brute)
    assert ranked(brute, 4) == brute.argsort(descending=True)[:4].tolist()
    one = least_change(keys[:1], deltas[0], f)  # the closed form of the design
    solved = f.solve(keys[:1].T)[:, 0]
    torch.testing.assert_close(
        output_change(many, one), deltas[0].norm() * (many @ solved).abs() / (keys[0] @ solved)
    )
