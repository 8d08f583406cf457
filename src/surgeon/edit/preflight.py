"""What an edit will do to everything else, known before a weight changes.

An edit D of a matrix W changes its output on a key k by D k. Over the sample of keys that the
covariance C was taken on, E|D k|^2 = tr(D C D'), which needs no pass of the model; the same of W is
what the matrix usually writes. The root of their ratio, the relative damage, is what the verdict is
about. How its limits were set stands in docs/editing.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import torch.nn.functional as F
from jaxtyping import Float64
from torch import Tensor

from ..anatomy import Site
from ..result import derived, record
from .covariance import CholeskyFactor, KeyMoments

PUBLISHED_RATIOS = (0.15, 0.50)  # update norm over weight norm: clean, broken; for wide models
WARN, REFUSE = 0.3, 0.75  # of the relative damage

Factors = tuple[Float64[Tensor, "out r"], Float64[Tensor, "r in"]]


@record
class LayerForecast:
    """The change of one matrix. All in the units of the layer's output, over the sample that the
    covariance was taken on.

    predicted_damage: E|D k|^2. usual: E|W k|^2. update_norm_ratio: |D| / |W|, Frobenius. condition:
    of the covariance with its ridge. tokens_per_dimension: keys in the sample for each of d_mlp.
    """

    site: Site
    update_norm_ratio: float
    predicted_damage: float
    usual: float
    condition: float
    tokens_per_dimension: float

    @derived
    def relative_damage(self) -> float:
        """By how much the layer's output changes on ordinary text, as a share of its usual size."""
        return sqrt(self.predicted_damage / self.usual) if self.usual > 0 else 0.0

    @derived
    def verdict(self) -> str:
        if self.relative_damage < WARN:
            return "ok"
        return "warn" if self.relative_damage < REFUSE else "refuse"


@record
class KeyForecast:
    """One fact in one layer. residual_norm: |r|, r what its key is to write in addition. reach:
    k' C^-1 k of its mean key. expected_damage: |r|^2 / (k' C^-1 k), that of an edit of this fact
    alone with that key. key_agreement: cosine of the bare and the mean key. direction_stability:
    cosine of the edit's direction from half of the sample and from all of it.
    """

    residual_norm: float
    reach: float
    expected_damage: float
    key_agreement: float
    direction_stability: float


@record
class FoundValue:
    """The value that was found for a fact: in how many steps; the target's probability with it,
    least over the contexts; its norm relative to the residual stream's.
    """

    steps: int
    probability: float
    relative_norm: float


@record
class FactForecast:
    """One fact of an edit, as its prompt was read and as the last changed layer is to hold it.

    warnings: sentences about a subject that is split oddly. value, key: None for fine-tuning, which
    has neither. projection_loss: of AlphaEdit, the share of the key that it cannot reach, largest
    over layers.
    """

    prompt: str
    subject: str
    subject_tokens: list[str]
    position_zero: bool
    warnings: list[str]
    value: FoundValue | None = None
    key: KeyForecast | None = None
    projection_loss: float | None = None


@record
class Preflight:
    """What an edit will do, matrix by matrix and fact by fact."""

    layers: list[LayerForecast]
    facts: list[FactForecast]

    @property
    def worst(self) -> LayerForecast:
        """The matrix whose output changes most."""
        return max(self.layers, key=lambda one: one.relative_damage)

    @derived
    def verdict(self) -> str:
        """ok, warn or refuse, as the worst matrix has it."""
        verdict: str = self.worst.verdict
        return verdict

    @derived
    def update_norm_ratio(self) -> float:
        """The largest of all matrices."""
        return max(one.update_norm_ratio for one in self.layers)

    @derived
    def predicted_damage(self) -> float:
        return self.worst.predicted_damage

    @derived
    def relative_damage(self) -> float:
        damage: float = self.worst.relative_damage
        return damage

    @derived
    def position_zero(self) -> bool:
        """Whether nothing but BOS stands before a subject."""
        return any(fact.position_zero for fact in self.facts)

    @derived
    def subject_tokens(self) -> list[str] | list[list[str]]:
        """Of the fact, or of each where there are several."""
        tokens = [fact.subject_tokens for fact in self.facts]
        return tokens[0] if len(tokens) == 1 else tokens


def forecast(
    site: Site, weight: Tensor, factors: Factors, moments: KeyMoments, factor: CholeskyFactor
) -> LayerForecast:
    """What the change left @ right of `weight` (out, in) does to the layer's output on usual
    keys.
    """
    left, right = (f.double() for f in factors)
    matrix = weight.detach().cpu().double()
    c = moments.covariance
    # tr(D C D') and |D|^2 of D = left @ right, without D, which may be large
    damage = float(((left.T @ left) * (right @ c @ right.T)).sum())
    size = float(((left.T @ left) * (right @ right.T)).sum()) ** 0.5
    return LayerForecast(
        site,
        size / float(matrix.norm()),
        max(0.0, damage),  # rounding can take it a little below
        float(((matrix @ c) * matrix).sum()),
        factor.condition,
        moments.count / moments.d_mlp,
    )


def key_forecast(
    keys: Float64[Tensor, "contexts in"],
    residual: Float64[Tensor, " out"],
    factor: CholeskyFactor,
    half: CholeskyFactor,
) -> KeyForecast:
    """half: the factor from half of the sample."""
    mean, bare = keys.mean(0), keys[0]
    direction, before = factor.solve(mean[:, None])[:, 0], half.solve(mean[:, None])[:, 0]
    reach, norm = float(mean @ direction), float(residual.norm())
    return KeyForecast(
        norm,
        reach,
        norm**2 / reach,
        float(F.cosine_similarity(mean, bare, 0)),
        float(F.cosine_similarity(direction, before, 0)),
    )


def worst_of(preflights: Sequence[Preflight]) -> Preflight:
    """The layers of the worst of several forecasts, which stand for all, and the facts of all."""
    most = max(preflights, key=lambda one: one.relative_damage)
    return Preflight(most.layers, [fact for one in preflights for fact in one.facts])
