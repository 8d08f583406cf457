"""Controls: the same operation on matched random weights of the same matrices."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from ..anatomy import Anatomy, Entry, Region, Site
from ..errors import BadInput

# so many times more candidates than controls are taken for the nearest in magnitude, so that
# another seed draws other controls
NEIGHBOURS = 4


def matched_controls(
    anatomy: Anatomy,
    parts: Sequence[Region | Entry],
    n: int,
    seed: int = 0,
    taken: Sequence[Region] = (),
) -> list[list[Region]]:
    """`n` control sets for `parts`: as many weights, in the same matrices, matched in |w|.

    A whole row is matched by one of the rows nearest in norm, likewise a column. Where several
    entries share a row, the control takes them from one other row (or column), chosen at random
    among those nearest in norm. A lone entry is matched by one of the entries nearest in |w|. Rows
    and columns of the set itself are never used, nor weights that are taken if enough are left.
    Raises: BadInput if the set is a whole matrix.
    """
    generator = torch.Generator().manual_seed(seed)
    controls: list[list[Region]] = [[] for _ in range(n)]
    regions = [Region(part.site, part.row, part.col) for part in parts]
    for site, group in groupby(sorted(regions, key=lambda r: r.site), key=lambda r: r.site):
        mine = list(group)
        size = anatomy.view(site).read().detach().abs().float().cpu()
        mask = torch.zeros(size.shape, dtype=torch.bool)
        for region in mine:
            mask[_index(region.row), _index(region.col)] = True
        if bool(mask.all()):
            raise BadInput(
                f"all of {site} was named, and then nothing is left in it to be a control; name"
                " rows, columns or entries."
            )
        mask = _less_taken(mask, mine, [one for one in taken if one.site == site], n)
        rows = [
            region.row for region in mine if region.geometry == "row" and region.row is not None
        ]
        columns = [
            region.col for region in mine if region.geometry == "column" and region.col is not None
        ]
        singles = [
            Entry(site, r.row, r.col) for r in mine if r.row is not None and r.col is not None
        ]
        for row in rows:
            for control, other in zip(controls, _whole(size, mask, row, n, generator), strict=True):
                control.append(Region(site, other, None))
        for column in columns:
            for control, other in zip(
                controls, _whole(size.T, mask.T, column, n, generator), strict=True
            ):
                control.append(Region(site, None, other))
        for control, entries in zip(
            controls, _entries(site, size, mask, singles, n, generator), strict=True
        ):
            control.extend(entries)
    return controls


def _less_taken(mask: Tensor, mine: Sequence[Region], taken: Sequence[Region], n: int) -> Tensor:
    """The mask with what is taken in it too, of the kinds that the set has, if as much is left as
    there are controls.
    """
    kinds = {region.geometry for region in mine}
    more = mask.clone()
    for region in taken:
        if region.geometry in kinds:
            more[_index(region.row), _index(region.col)] = True
    free = ~more
    left = {"single": free.sum(), "row": free.all(1).sum(), "column": free.all(0).sum()}
    return more if all(int(left[kind]) >= n for kind in kinds) else mask


def _index(line: int | None) -> slice | int:
    return slice(None) if line is None else line


def _whole(size: Tensor, mask: Tensor, line: int, n: int, generator: torch.Generator) -> list[int]:
    """For each control one of the lines nearest in norm of which nothing is in the set; where there
    is none, of those nearest that are not wholly in it.
    """
    norms = size.norm(dim=1)
    distance = (norms - norms[line]).abs()
    used = mask.any(1)
    distance[mask.all(1) if bool(used.all()) else used] = float("inf")
    near = distance.argsort()[: min(int(distance.isfinite().sum()), NEIGHBOURS * n)]
    order = torch.randperm(len(near), generator=generator)
    return [int(line) for line in near[order[torch.arange(n) % len(order)]]]


def _entries(
    site: Site,
    size: Tensor,
    mask: Tensor,
    entries: Sequence[Entry],
    n: int,
    generator: torch.Generator,
) -> list[list[Region]]:
    """Controls for entries; mask: the weights that may not be used."""
    controls: list[list[Region]] = [[] for _ in range(n)]
    if not entries:
        return controls
    rows = torch.tensor([e.row for e in entries])
    cols = torch.tensor([e.col for e in entries])
    # the entries of a norm are matched one by one: it has no other column to take them from
    by_column = size.shape[1] > 1 and len(torch.unique(rows)) > len(torch.unique(cols))
    if by_column:
        size, mask, rows, cols = size.T, mask.T, cols, rows
    for line in torch.unique(rows).tolist():
        within = cols[rows == line]
        drawn = (
            _lines(size, mask, within, line, n, generator)
            if len(within) > 1
            else _singles(size, mask, line, int(within), n, generator)
        )
        for control, (row, picked) in zip(controls, drawn, strict=True):
            control += [Region(site, c, row) if by_column else Region(site, row, c) for c in picked]
    return controls


def _lines(
    size: Tensor, mask: Tensor, within: Tensor, line: int, n: int, generator: torch.Generator
) -> list[tuple[int, list[int]]]:
    """For each control one other line of nearby norm, and in it the entries nearest in |w| to those
    of the set.
    """
    if bool(mask.any(1).all()):  # no line is free; other entries of the same one are all there is
        return [
            (line, torch.randperm(size.shape[1], generator=generator)[: len(within)].tolist())
            for _ in range(n)
        ]
    wanted = size[line, within]
    return [(row, _nearest(size[row], wanted)) for row in _whole(size, mask, line, n, generator)]


def _singles(
    size: Tensor, mask: Tensor, row: int, col: int, n: int, generator: torch.Generator
) -> list[tuple[int, list[int]]]:
    distance = (size - size[row, col]).abs()
    distance[mask] = float("inf")
    near = (
        distance.flatten()
        .topk(min(int(distance.isfinite().sum()), NEIGHBOURS * n), largest=False)
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
