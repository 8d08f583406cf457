"""The model with weights at zero, within a block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ..anatomy import Anatomy, Region, Site, StreamedAnatomy, WeightView


@contextmanager
def zeroed(anatomy: Anatomy, regions: Sequence[Region]) -> Iterator[None]:
    """Within the block all of `regions` are zero, also in a streamed model.

    No patch is made, since nothing is to be kept: the entries are read, zeroed and written back,
    bit for bit. A tied weight is zero in both of its places.
    """
    if isinstance(anatomy, StreamedAnatomy):
        with anatomy.zeroed(regions):
            yield
        return
    places: dict[Site, tuple[list[int], list[int]]] = {}
    for region in regions:
        rows, cols = region.rows_cols(anatomy.view(region.site).shape)
        mine = places.setdefault(anatomy.resolve(region.site), ([], []))
        mine[0].extend(rows)
        mine[1].extend(cols)
    kept: list[tuple[WeightView, Tensor, Tensor, Tensor]] = []
    try:
        for site, (rows, cols) in places.items():
            view, at = anatomy.view(site), (torch.tensor(rows), torch.tensor(cols))
            kept.append((view, *at, view.get(*at)))
            view.set_(*at, torch.full((len(rows),), anatomy.stored_zero(site)))
        yield
    finally:
        for view, row, col, values in kept:
            view.set_(row, col, values)
