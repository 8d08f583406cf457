"""Damage by condition or disease stage, with donors as replicates: cells of one donor are not
independent of one another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64
from torch import Tensor

from ..errors import BadInput, Refused
from ..result import record
from .extra import needs

Means = dict[str, dict[str, float]]  # condition -> donor -> nats


@record
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
    permutations: int = 19_999,
    seed: int = 0,
) -> DonorTest:
    """Test whether the damage differs between conditions, donors being the replicates.

    Each donor counts once, whatever the number of its cells. Donors seen in both of two conditions
    are compared with themselves. Where there are no more than so many permutations, all are gone
    through.
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
    two = len(means) == 2

    def statistic(*groups: np.ndarray, axis: int = -1) -> Any:
        centres = np.stack([group.mean(axis=axis) for group in groups])
        return centres[1] - centres[0] if two else centres.std(axis=0)

    [stats] = needs("a test of donors", "scipy.stats")
    test = stats.permutation_test(
        [np.array(list(of.values())) for of in means.values()],
        statistic,
        permutation_type="samples" if paired else "independent",
        n_resamples=permutations,
        alternative="two-sided" if two else "greater",
        rng=seed,
    )
    n = len(test.null_distribution)
    least = (2 if two else 1) / (n if n != permutations else n + 1)
    return DonorTest(
        *names,
        means,
        statistic=float(test.statistic),
        measure="difference of the means" if two else "standard deviation of the means",
        p=float(test.pvalue),
        smallest_p=least,
        design="paired" if paired else "unpaired",
        rearrangements=n,
    )


def _means(damage: Tensor, conditions: Sequence[str], donors: Sequence[str]) -> Means:
    cells: dict[str, dict[str, list[float]]] = {}
    for value, condition, donor in zip(damage.tolist(), conditions, donors, strict=True):
        cells.setdefault(condition, {}).setdefault(donor, []).append(value)
    return {
        condition: {donor: sum(v) / len(v) for donor, v in sorted(of.items())}
        for condition, of in sorted(cells.items())
    }
