"""Damage by condition or disease stage, with donors as replicates: cells of one donor are not
independent of one another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, product
from math import comb

import torch
from jaxtyping import Float64
from torch import Tensor

from ..errors import BadInput, Refused

EXACT = 20_000  # up to this many rearrangements all are gone through
Means = dict[str, dict[str, float]]  # condition -> donor -> nats


@dataclass(frozen=True)
class DonorTest:
    """Mean damage of each donor in each condition, and how likely their spread over conditions is
    by chance.

    statistic, in nats, is what `measure` says: of two conditions the difference of the mean over
    donors, second less first; of more, the standard deviation of the conditions' means. p is
    two-sided, by permutation of donors (paired: of each donor's two conditions). smallest_p: the
    least p these donors could have given.
    """

    condition: str
    donor: str
    means: Means
    statistic: float
    measure: str
    p: float
    smallest_p: float
    design: str
    rearrangements: int


def donor_test(
    damage: Float64[Tensor, " cell"],
    conditions: Sequence[str],
    donors: Sequence[str],
    names: tuple[str, str] = ("condition", "donor"),
    permutations: int = 9999,
    seed: int = 0,
) -> DonorTest:
    """Test whether the damage differs between conditions, donors being the replicates.

    Each donor counts once, whatever the number of its cells. Donors seen in both of two conditions
    are compared with themselves.
    Raises: BadInput with fewer than two conditions or a mixture of paired and unpaired donors;
    Refused with a condition of one donor.
    """
    means = _means(damage, conditions, donors)
    if len(means) < 2:
        raise BadInput(
            f"the column {names[0]!r} holds one condition ({', '.join(means) or 'none'}); a"
            " comparison needs two or more."
        )
    few = [f"{condition} has {len(of)}" for condition, of in means.items() if len(of) < 2]
    if few:
        raise Refused(
            f"donors are the replicates, and every condition needs at least two ({', '.join(few)});"
            " cells of one donor are not independent, so no statistic is computed. Leave ‹donor›"
            " out to see the mean damage by condition without a test."
        )
    everyone = [donor for of in means.values() for donor in of]
    first, second = (set(of) for of in list(means.values())[:2])
    paired = len(means) == 2 and first == second
    if not paired and len(everyone) != len(set(everyone)):
        raise BadInput(
            f"some donors of {names[1]!r} have cells in several conditions of {names[0]!r} and"
            " others do not; keep either donors with one condition each, or donors with both of two"
            " conditions."
        )
    observed, null, exact = (_paired if paired else _unpaired)(means, permutations, seed)
    as_large = sum(abs(v) >= abs(observed) * (1 - 1e-9) for v in null)
    sizes = [len(of) for of in means.values()]
    # the mirror image of an arrangement gives the same |statistic|, where there is one
    mirrored = paired or (len(sizes) == 2 and sizes[0] == sizes[1])
    return DonorTest(
        *names,
        means,
        statistic=observed,
        measure="difference of the means" if len(means) == 2 else "standard deviation of the means",
        p=as_large / len(null) if exact else (1 + as_large) / (1 + len(null)),
        smallest_p=(2 if mirrored else 1) / len(null) if exact else 1 / (1 + len(null)),
        design="paired" if paired else "unpaired",
        rearrangements=len(null),
    )


def _means(damage: Tensor, conditions: Sequence[str], donors: Sequence[str]) -> Means:
    cells: dict[str, dict[str, list[float]]] = {}
    for value, condition, donor in zip(damage.tolist(), conditions, donors, strict=True):
        cells.setdefault(condition, {}).setdefault(donor, []).append(value)
    return {
        condition: {donor: sum(v) / len(v) for donor, v in sorted(of.items())}
        for condition, of in sorted(cells.items())
    }


def _unpaired(means: Means, permutations: int, seed: int) -> tuple[float, list[float], bool]:
    """The statistic, the same under rearrangement, and whether those are all there are."""
    values = torch.tensor([v for of in means.values() for v in of.values()], dtype=torch.float64)
    sizes = [len(of) for of in means.values()]
    n = len(values)

    def spread(order: Tensor) -> float:
        parts = torch.stack([part.mean() for part in torch.split(values[order], sizes)])
        return float(parts[1] - parts[0] if len(parts) == 2 else parts.std(unbiased=False))

    observed = spread(torch.arange(n))
    if len(sizes) == 2 and comb(n, sizes[0]) <= EXACT:
        null = []
        for chosen in combinations(range(n), sizes[0]):
            rest = [i for i in range(n) if i not in chosen]
            null.append(spread(torch.tensor([*chosen, *rest])))
        return observed, null, True
    generator = torch.Generator().manual_seed(seed)
    orders = (torch.randperm(n, generator=generator) for _ in range(permutations))
    return observed, [spread(order) for order in orders], False


def _paired(means: Means, permutations: int, seed: int) -> tuple[float, list[float], bool]:
    """As `_unpaired`, with each donor's two conditions exchanged or not."""
    first, second = means.values()
    differences = torch.tensor([second[d] - first[d] for d in first], dtype=torch.float64)
    n = len(differences)
    exact = 2**n <= EXACT
    if exact:
        signs = torch.tensor(list(product((1.0, -1.0), repeat=n)), dtype=torch.float64)
    else:
        generator = torch.Generator().manual_seed(seed)
        signs = torch.randint(2, (permutations, n), generator=generator).double() * 2 - 1
    return float(differences.mean()), (signs * differences).mean(1).tolist(), exact
