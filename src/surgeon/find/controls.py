"""Controls: the same operation on matched random weights of the same matrices."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from math import prod

import torch
from torch import Tensor

from ..anatomy import Anatomy, Entry
from ..errors import BadInput

# so many times more candidates than controls are taken for the nearest in magnitude, so that
# another seed draws other controls
NEIGHBOURS = 4


def matched_controls(
    anatomy: Anatomy, entries: Sequence[Entry], n: int, seed: int = 0
) -> list[list[Entry]]:
    """`n` control sets for `entries`: the same number of entries, in the same matrices, matched in
    |w|.

    Where several entries share a row, the control takes them from one other row (likewise a
    column), chosen at random among the rows whose norm is nearest; a whole row is thus matched by
    whole rows. A lone entry is matched by one of the entries nearest in |w|. Rows and columns of
    the set itself are never used. Raises: BadInput if the set is a whole matrix.
    """
    generator = torch.Generator().manual_seed(seed)
    controls: list[list[Entry]] = [[] for _ in range(n)]
    for site, group in groupby(sorted(entries), key=lambda e: e.site):
        mine = list(group)
        if len(mine) == prod(anatomy.view(site).shape):
            raise BadInput(
                f"all of {site} was named, and then nothing is left in it to be a control; name"
                " rows, columns or entries."
            )
        rows = torch.tensor([e.row for e in mine])
        cols = torch.tensor([e.col for e in mine])
        size = anatomy.view(site).read().detach().abs().float().cpu()
        # the entries of a norm are matched one by one: it has no other column to take them from
        by_column = size.shape[1] > 1 and len(torch.unique(rows)) > len(torch.unique(cols))
        if by_column:
            size, rows, cols = size.T, cols, rows
        for line in torch.unique(rows).tolist():
            within = cols[rows == line]
            drawn = (
                _lines(size, rows, within, line, n, generator)
                if len(within) > 1
                else _singles(size, rows, cols, line, within, n, generator)
            )
            for control, (row, picked) in zip(controls, drawn, strict=True):
                control.extend(
                    Entry(site, c, row) if by_column else Entry(site, row, c) for c in picked
                )
    return controls


def _lines(
    size: Tensor, taken: Tensor, within: Tensor, line: int, n: int, generator: torch.Generator
) -> list[tuple[int, list[int]]]:
    """For each control one other line of nearby norm, and in it the entries nearest in |w| to those
    of the set.
    """
    norms = size.norm(dim=1)
    distance = (norms - norms[line]).abs()
    distance[torch.unique(taken)] = float("inf")
    free = int(distance.isfinite().sum())
    if free == 0:  # the set spans every line; other entries of the same line are all that is left
        return [
            (line, torch.randperm(size.shape[1], generator=generator)[: len(within)].tolist())
            for _ in range(n)
        ]
    near = distance.argsort()[: min(free, NEIGHBOURS * n)]
    order = torch.randperm(len(near), generator=generator)
    wanted = size[line, within]
    return [
        (int(row), _nearest(size[int(row)], wanted))
        for row in near[order[torch.arange(n) % len(order)]]
    ]


def _singles(
    size: Tensor,
    rows: Tensor,
    cols: Tensor,
    line: int,
    within: Tensor,
    n: int,
    generator: torch.Generator,
) -> list[tuple[int, list[int]]]:
    distance = (size - size[line, within[0]]).abs()
    distance[rows, cols] = float("inf")
    near = (
        distance.flatten()
        .topk(min(distance.numel() - len(rows), NEIGHBOURS * n), largest=False)
        .indices
    )
    picks = near[torch.randperm(len(near), generator=generator)[torch.arange(n) % len(near)]]
    return [(int(p) // size.shape[1], [int(p) % size.shape[1]]) for p in picks]


def _nearest(available: Tensor, wanted: Tensor) -> list[int]:
    """Distinct positions of `available` whose values are close to `wanted`, largest wanted
    first.
    """
    order = available.argsort(descending=True)
    if len(wanted) == len(available):
        return order.tolist()
    values = available[order]
    picked: list[int] = []
    used = torch.zeros(len(order), dtype=torch.bool)
    for value in wanted.sort(descending=True).values:
        distance = (values - value).abs()
        distance[used] = float("inf")
        best = int(distance.argmin())
        used[best] = True
        picked.append(int(order[best]))
    return picked
