"""Which entries a repair may change, and the broken model held while they are tried."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..anatomy import Anatomy, Site
from ..errors import BadInput, SurgeonError
from ..patch import LowRankDelta, Patch, compose


@dataclass(frozen=True, eq=False)
class Target:
    """Entries of one matrix that may change, as a mask (out, in).

    With a rank they are a block, all of some rows in some columns.
    """

    site: Site
    mask: Bool[Tensor, "out in"]

    @property
    def rows(self) -> Tensor:
        return self.mask.any(1).nonzero().flatten()

    @property
    def cols(self) -> Tensor:
        return self.mask.any(0).nonzero().flatten()

    def elsewhere(self, generator: torch.Generator) -> Target | None:
        """The same columns of as many other rows, drawn at random: the control.

        None if there are not that many.
        """
        rows = self.rows
        others = (~self.mask.any(1)).nonzero().flatten()
        if len(others) < len(rows):
            return None
        drawn = torch.randperm(len(others), generator=generator)[: len(rows)]
        mask = torch.zeros_like(self.mask)
        mask[others[drawn]] = self.mask[rows]
        return replace(self, mask=mask)


@dataclass(frozen=True, eq=False)
class Change:
    """A repaired matrix (out, in) in the model's dtype; for a repair of low rank also its factors
    (out, r) and (r, in).
    """

    matrix: Tensor
    factors: tuple[Tensor, Tensor] | None = None

    @classmethod
    def low_rank(
        cls,
        site: Site,
        broken: Float[Tensor, "out in"],
        left: Float[Tensor, "out r"],
        right: Float[Tensor, "r in"],
    ) -> Change:
        matrix = broken.clone()
        LowRankDelta(site, left, right).apply_(matrix)
        return cls(matrix, (left, right))


Changes = Mapping[Site, Change]


def is_projection(module: nn.Module) -> bool:
    """Whether the module computes x W^T and nothing more than a bias: what enters it, the matrix
    multiplies.
    """
    return isinstance(module, (nn.Linear, Conv1D))


def targets(
    anatomy: Anatomy,
    injury: Patch,
    rows: Sequence[int] = (),
    columns: Sequence[int] = (),
    exclude_injured: bool = False,
    rank: int = 0,
) -> list[Target]:
    """For each injured projection, by layer: the injured rows (or `rows`), whole or in `columns`,
    without what was injured if so asked.

    Raises: BadInput if nothing is left that could change, for a row or column the matrix lacks, or
    if no projection was injured.
    """
    changed = [site for site in injury.sites if injury.touched(site).any()]
    injured = [s for s in changed if is_projection(anatomy.module(s)) or s.expert is not None]
    if not injured:
        raise BadInput(
            f"the injury changes {', '.join(map(str, changed)) or 'nothing'} and no projection,"
            " whose output a repair restores."
        )
    wanted = []
    for site in sorted(injured, key=lambda s: (_layer(s), str(s))):
        hurt = injury.touched(site)
        _require_lines(site, "row", rows, hurt.shape[0])
        _require_lines(site, "column", columns, hurt.shape[1])
        within = torch.zeros(hurt.shape[1], dtype=torch.bool)
        within[list(columns) if columns else slice(None)] = True
        mask = torch.zeros_like(hurt)
        mask[torch.tensor(rows) if rows else hurt.any(1)] = within
        if exclude_injured:
            mask &= ~hurt.any(0) if rank else ~hurt
        if mask.any():
            wanted.append(Target(site, mask))
    if not wanted:
        raise BadInput(
            "without the injured entries nothing is left to change in the rows and columns of the"
            " repair; leave out ‹exclude_injured›, or name other ‹rows› or ‹columns›."
        )
    return wanted


def _require_lines(site: Site, name: str, wanted: Sequence[int], size: int) -> None:
    outside = [number for number in wanted if not 0 <= number < size]
    if outside:
        raise BadInput(f"{site} has no {name} {outside[0]}; it has {size}, counted from 0.")


def _layer(site: Site) -> int:
    """The layer for the order; what stands before the first comes first."""
    return -1 if site.layer is None else site.layer


@contextmanager
def broken(anatomy: Anatomy, injury: Patch, sites: Sequence[Site]) -> Iterator[dict[Site, Tensor]]:
    """The injured model, and copies of the matrices of `sites` in it.

    What is written to them within the block is taken back.
    """
    with injury.applied(anatomy):
        matrices = {site: anatomy.view(site).read().clone() for site in sites}
        try:
            yield matrices
        finally:
            write_(anatomy, matrices)


def write_(anatomy: Anatomy, matrices: Mapping[Site, Tensor]) -> None:
    for site, matrix in matrices.items():
        anatomy.view(site).assign_(matrix)


def to_patch(anatomy: Anatomy, changes: Changes, made_by: Mapping[str, Any]) -> Patch:
    """The changes as one patch, made on the model as it stands.

    Raises: SurgeonError if nothing changes.
    """
    patches = []
    for site, change in changes.items():
        if bool((change.matrix == anatomy.view(site).read()).all()):
            continue
        if change.factors is not None:
            patches.append(Patch.low_rank(anatomy, site, *change.factors))
        else:
            patches.append(Patch.from_matrix(anatomy, {site: change.matrix}))
    if not patches:
        raise SurgeonError(
            "no change was found that does better than the broken model on held-out text; try"
            " another ‹lr›, or more text."
        )
    whole = reduce(compose, patches)
    return replace(whole, made_by={"surgeon": whole.made_by["surgeon"], **made_by})


def lowest(targets: Sequence[Target]) -> int:
    """The layer below which the targets change nothing."""
    return min(max(0, _layer(target.site)) for target in targets)
