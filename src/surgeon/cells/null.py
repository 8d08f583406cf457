"""The equal-damage null: arbitrary weights of the same model, scaled until they cost as much as the
weight in question.

Whatever breaks a model breaks some genes more than others, and those share pathways. A story is
worth telling only where it is not the one that any weight of this model would give.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import SurgeonError
from .damage import Damage, Progress, by_cell, cells_of
from .model import ScGPT
from .parts import Part, mlp_part, norm_part, norms
from .planted import solve

LARGEST = 2.0**20
TOLERANCE = 0.25  # of the damage wanted, on all cells
SEARCH_CELLS = 24


@dataclass(frozen=True, eq=False)
class EqualDamage:
    """One arbitrary weight: what it was scaled by, its damage in nats, and the damage of each value
    (draw, cell, pos).
    """

    part: Part
    factor: float
    nats: float
    values: Float[Tensor, "draw cell pos"]


def equal_damage(
    damage: Damage, nats: float, n: int, seed: int = 0, progress: Progress | None = None
) -> list[EqualDamage]:
    """`n` random weights of the kinds that a screen looks at, each scaled until the mean damage is
    `nats`, within a quarter.

    A matrix, scale or shift is drawn first, then an entry of it and a sign. The factor is sought on
    the first cells and one draw, and judged on all. Weights that cannot cost as much are drawn
    again: behind a LayerNorm one channel can only drown the others.
    Raises: SurgeonError if fewer than `n` of 20 `n` weights can.
    """
    model = damage.model
    few = slice(0, SEARCH_CELLS)
    search = Damage(model, cells_of(damage.batch, few), damage.masked[:1, few])
    generator = torch.Generator().manual_seed(seed)
    found: list[EqualDamage] = []
    for _ in range(20 * n):
        if len(found) == n:
            break
        part = _random(model, generator)
        sign = 1 - 2 * int(torch.randint(2, (1,), generator=generator))
        size = solve(partial(_cost, search, part, sign), nats, 16.0, LARGEST, 0.05, 12, 16.0)
        if size is None:
            continue
        factor = sign * size
        values = damage.of([part], factor)
        measured = float(by_cell(values).nanmean())
        if abs(measured - nats) <= TOLERANCE * nats:
            found.append(EqualDamage(part, factor, measured, values))
            if progress:
                progress("equal-damage null", len(found), n)
    if len(found) < n:
        raise SurgeonError(
            f"only {len(found)} of {20 * n} random weights could be made to cost {nats:.3g} nats;"
            " ask for a smaller null."
        )
    return found


def _cost(damage: Damage, part: Part, sign: int, size: float) -> float:
    return float(by_cell(damage.of([part], sign * size)).nanmean())


def _random(model: ScGPT, generator: torch.Generator) -> Part:
    def below(size: int) -> int:
        return int(torch.randint(size, (1,), generator=generator))

    vectors = [(name, kind) for name, _ in norms(model) for kind in ("scale", "shift")]
    place = below(len(model.layers) + len(vectors))
    if place < len(model.layers):
        rows, cols = model.layers[place].linear2.weight.shape
        return mlp_part(model, place, below(rows), below(cols))
    name, kind = vectors[place - len(model.layers)]
    return norm_part(model, name, kind, below(model.d_model))
