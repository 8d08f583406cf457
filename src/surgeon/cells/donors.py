"""Damage by condition or disease stage, with donors as replicates: cells of one donor are not
independent of one another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, product
from math import comb
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

from ..errors import BadInput, Refused

EXACT = 20_000  # up to this many rearrangements all are gone through


@dataclass(frozen=True)
class DonorTest:
    """Mean damage of each donor in each condition, and how likely their spread over conditions is
    by chance.

    means: condition -> donor -> nats. statistic: for two conditions the difference of the mean over
    donors, second less first, in nats; for more, the variance of the conditions' means. p is
    two-sided, by permutation of donors (paired: of each donor's two conditions). smallest_p: the
    least p these donors could have given.
    """

    condition: str
    donor: str
    means: dict[str, dict[str, float]]
    statistic: float
    p: float
    smallest_p: float
    design: str
    rearrangements: int

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


def donor_test(
    damage: Float64[Tensor, " cell"],
    conditions: Sequence[str],
    donors: Sequence[str],
    names: tuple[str, str] = ("condition", "donor"),
    permutations: int = 9999,
    seed: int = 0,
) -> DonorTest:
    """Test whether the damage differs between conditions, donors being the replicates; cells
    without damage (NaN) are left out.

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
    few = {condition: len(of) for condition, of in means.items() if len(of) < 2}
    if few:
        named = ", ".join(f"{condition} has {n}" for condition, n in few.items())
        raise Refused(
            f"donors are the replicates, and every condition needs at least two ({named}); cells of"
            " one donor are not independent, so no statistic is computed. Leave --donor out to see"
            " the mean damage by condition without a test."
        )
    everyone = [donor for of in means.values() for donor in of]
    shared = len(everyone) != len(set(everyone))
    if not shared:
        return _unpaired(means, names, permutations, seed)
    first, second = (set(of) for of in list(means.values())[:2])
    if len(means) == 2 and first == second:
        return _paired(means, names, permutations, seed)
    raise BadInput(
        f"some donors of {names[1]!r} have cells in several conditions of {names[0]!r} and others"
        " do not; keep either donors with one condition each, or donors with both of two"
        " conditions."
    )


def _means(
    damage: Tensor, conditions: Sequence[str], donors: Sequence[str]
) -> dict[str, dict[str, float]]:
    cells: dict[str, dict[str, list[float]]] = {}
    for value, condition, donor in zip(damage.tolist(), conditions, donors, strict=True):
        if value == value:
            cells.setdefault(condition, {}).setdefault(donor, []).append(value)
    return {
        c: {d: sum(v) / len(v) for d, v in sorted(of.items())} for c, of in sorted(cells.items())
    }


def _unpaired(
    means: dict[str, dict[str, float]], names: tuple[str, str], permutations: int, seed: int
) -> DonorTest:
    values = torch.tensor([v for of in means.values() for v in of.values()], dtype=torch.float64)
    sizes = [len(of) for of in means.values()]

    def spread(order: Tensor) -> float:
        parts = [part.mean() for part in torch.split(values[order], sizes)]
        return (
            float(parts[1] - parts[0])
            if len(parts) == 2
            else float(torch.stack(parts).var(unbiased=False))
        )

    observed = spread(torch.arange(len(values)))
    ways = comb(len(values), sizes[0]) if len(sizes) == 2 else EXACT + 1
    if ways <= EXACT:
        null = []
        for chosen in combinations(range(len(values)), sizes[0]):
            rest = [i for i in range(len(values)) if i not in set(chosen)]
            null.append(spread(torch.tensor([*chosen, *rest])))
        return _result(names, means, observed, null, True, "unpaired", sizes)
    generator = torch.Generator().manual_seed(seed)
    null = [spread(torch.randperm(len(values), generator=generator)) for _ in range(permutations)]
    return _result(names, means, observed, null, False, "unpaired", sizes)


def _paired(
    means: dict[str, dict[str, float]], names: tuple[str, str], permutations: int, seed: int
) -> DonorTest:
    first, second = means.values()
    differences = torch.tensor([second[d] - first[d] for d in first], dtype=torch.float64)
    n = len(differences)
    if 2**n <= EXACT:
        null = [
            float((differences * torch.tensor(signs)).mean())
            for signs in product((1.0, -1.0), repeat=n)
        ]
        return _result(names, means, float(differences.mean()), null, True, "paired", [n])
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(2, (permutations, n), generator=generator).double() * 2 - 1
    return _result(
        names,
        means,
        float(differences.mean()),
        (signs * differences).mean(1).tolist(),
        False,
        "paired",
        [n],
    )


def _result(
    names: tuple[str, str],
    means: dict[str, dict[str, float]],
    observed: float,
    null: list[float],
    exact: bool,
    design: str,
    sizes: list[int],
) -> DonorTest:
    as_large = sum(abs(v) >= abs(observed) * (1 - 1e-9) for v in null)
    p = as_large / len(null) if exact else (1 + as_large) / (1 + len(null))
    # the mirror image of an arrangement gives the same |statistic|, where there is one
    mirrored = design == "paired" or (len(sizes) == 2 and sizes[0] == sizes[1])
    smallest = (2 if mirrored else 1) / len(null) if exact else 1 / (1 + len(null))
    return DonorTest(*names, means, observed, p, smallest, design, len(null))
