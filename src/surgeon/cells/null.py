"""The equal-damage null: arbitrary weights of the same model, scaled until they cost as much as the
weight in question.

Whatever breaks a model breaks some genes more than others, and those share pathways. A story is
worth telling only where it is not the one that any weight of this model would give.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..anatomy import Region
from ..errors import SurgeonError
from ..progress import Tell, silent
from .candidates import screened
from .likelihood import MaskedNLL, Values, by_cell
from .planted import solve

LARGEST = 2.0**20
TOLERANCE = 0.25  # of the damage wanted, on all cells
SEARCH_CELLS = 24


@dataclass(frozen=True, eq=False)
class EqualDamage:
    """One arbitrary weight: what it was scaled by, and its damage in nats, over all and of each
    value.
    """

    region: Region
    factor: float
    nats: float
    values: Values


def equal_damage(
    nll: MaskedNLL, nats: float, n: int, seed: int = 0, tell: Tell = silent
) -> list[EqualDamage]:
    """`n` random weights of the kinds that a screen looks at, each scaled until the mean damage is
    `nats`, within a quarter.

    A matrix, scale or shift is drawn first, then an entry of it and a sign. The factor is sought on
    the first cells and one draw, and judged on all. Weights that cannot cost as much are drawn
    again: behind a LayerNorm one channel can only drown the others.
    Raises: SurgeonError if fewer than `n` of 20 `n` weights can.
    """
    few = slice(0, SEARCH_CELLS)
    search = MaskedNLL(nll.anatomy, nll.batch.of(few), nll.masked[:1, few])
    sites = screened(nll.anatomy)
    generator = torch.Generator().manual_seed(seed)

    def below(size: int) -> int:
        return int(torch.randint(size, (1,), generator=generator)) if size > 1 else 0

    found: list[EqualDamage] = []
    for _ in range(20 * n):
        if len(found) == n:
            break
        site = sites[below(len(sites))]
        rows, cols = nll.anatomy.view(site).shape
        region, sign = Region(site, below(rows), below(cols)), 1 - 2 * below(2)

        def cost(size: float, region: Region = region, sign: int = sign) -> float:
            return search.cost([region], f"scale:{sign * size!r}")

        size = solve(cost, nats, 16.0, LARGEST, tolerance=0.05, steps=12, growth=16.0)
        if size is None:
            continue
        values = nll.damage([region], f"scale:{sign * size!r}")
        measured = float(by_cell(values).mean())
        if abs(measured - nats) <= TOLERANCE * nats:
            found.append(EqualDamage(region, sign * size, measured, values))
            tell("equal-damage null", len(found), n)
    if len(found) < n:
        raise SurgeonError(
            f"only {len(found)} of {20 * n} random weights could be made to cost {nats:.3g} nats;"
            " ask for a smaller null."
        )
    return found
