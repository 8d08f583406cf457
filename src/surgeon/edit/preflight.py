"""What an edit will do to everything else, known before a weight changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

from ..anatomy import Site
from .covariance import CholeskyFactor, KeyMoments

PUBLISHED_RATIOS = (0.15, 0.50)  # update norm over weight norm: clean, broken; for wide models
WARN, REFUSE = 0.3, 0.75  # relative damage; how they were chosen stands in docs/editing.md
AGREE = 0.5  # cosine of bare and mean key under which the published ROME explodes

Factors = tuple[Float64[Tensor, "out r"], Float64[Tensor, "r in"]]


@dataclass(frozen=True)
class LayerForecast:
    """The change of one matrix. All in the units of the layer's output, over the sample that the
    covariance was taken on.

    predicted_damage: E|D k|^2. usual: E|W k|^2. relative_damage: the root of their ratio.
    update_norm_ratio: |D| / |W|, Frobenius. condition: of the covariance with its ridge.
    tokens_per_dimension: keys in the sample for each of d_mlp.
    """

    site: Site
    update_norm_ratio: float
    predicted_damage: float
    usual: float
    condition: float
    tokens_per_dimension: float

    @property
    def relative_damage(self) -> float:
        return sqrt(self.predicted_damage / self.usual) if self.usual > 0 else 0.0

    @property
    def verdict(self) -> str:
        return (
            "ok"
            if self.relative_damage < WARN
            else "warn"
            if self.relative_damage < REFUSE
            else "refuse"
        )

    def to_json(self) -> dict[str, Any]:
        return {
            **vars(self),
            "site": str(self.site),
            "relative_damage": self.relative_damage,
            "verdict": self.verdict,
        }


def forecast(
    site: Site, weight: Tensor, factors: Factors, moments: KeyMoments, factor: CholeskyFactor
) -> LayerForecast:
    """What the change left @ right of `weight` (out, in) does to the layer's output on usual
    keys.
    """
    left, right = (f.double() for f in factors)
    matrix = weight.detach().cpu().double()
    c = moments.covariance
    damage = float(((left.T @ left) * (right @ c @ right.T)).sum())
    size = float(((left.T @ left) * (right @ right.T)).sum()) ** 0.5
    return LayerForecast(
        site,
        size / float(matrix.norm()),
        max(0.0, damage),
        float(((matrix @ c) * matrix).sum()),
        factor.condition,
        moments.count / moments.d_mlp,
    )


@dataclass(frozen=True)
class KeyForecast:
    """One fact in one layer: |r|, k' C^-1 k of its mean key, |r|^2 / (k' C^-1 k), the damage of an
    edit of this fact alone with that key, the cosine of the bare and the mean key, and how far the
    edit's direction moves (cosine) from half of the sample to all of it."""

    residual_norm: float
    reach: float
    expected_damage: float
    key_agreement: float
    direction_stability: float

    def to_json(self) -> dict[str, float]:
        return dict(vars(self))


def key_forecast(
    keys: Float64[Tensor, "contexts in"],
    residual: Float64[Tensor, " out"],
    factor: CholeskyFactor,
    half: CholeskyFactor,
) -> KeyForecast:
    mean, bare = keys.mean(0), keys[0]
    direction, before = factor.solve(mean[:, None])[:, 0], half.solve(mean[:, None])[:, 0]
    reach, norm = float(mean @ direction), float(residual.norm())
    cosine = torch.nn.functional.cosine_similarity
    return KeyForecast(
        norm,
        reach,
        norm**2 / reach,
        float(cosine(mean, bare, 0)),
        float(cosine(direction, before, 0)),
    )


def worst(forecasts: Sequence[LayerForecast]) -> LayerForecast:
    return max(forecasts, key=lambda f: f.relative_damage)
