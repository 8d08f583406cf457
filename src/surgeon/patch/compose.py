"""Two patches as one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from ..anatomy import Site
from ..errors import WrongBase
from .deltas import Delta, LowRankDelta, differ, kept_delta
from .patch import Patch, dtype_name, signed


def compose(p: Patch, q: Patch, made_by: Mapping[str, Any] | None = None) -> Patch:
    """One patch equal to applying `p`, then `q`. Patches of different sites always compose.

    made_by: default, {"operation": "compose", "of": [what made p, what made q]}.
    Raises: WrongBase if on a site that both change, q was made neither on p's result nor on p's
    base with other entries.
    """
    deltas: list[Delta] = []
    base = {**p.base, **q.base}
    for site in base:
        if site not in p.base or site not in q.base:
            deltas += p.on(site) + q.on(site)
            continue
        first, second = p.base[site], q.base[site]
        chained = second.digest == first.result
        apart = second.digest == first.digest and not bool(
            (p.touched(site) & q.touched(site)).any()
        )
        if first.shape != second.shape or not (chained or apart):
            raise WrongBase(
                f"{site}: the second patch ({q}) was made neither on what the first ({p}) leaves,"
                " nor on the same base with other entries; apply the first to the model and make"
                " the second on that."
            )
        dtype = torch.promote_types(getattr(torch, first.dtype), getattr(torch, second.dtype))
        base[site] = replace(
            first, result=second.result if chained else "", dtype=dtype_name(dtype)
        )
        deltas += _joined(site, first.shape, p.on(site) + q.on(site), dtype)
    signature = made_by or {"operation": "compose", "of": [p.made_by, q.made_by]}
    return Patch(tuple(deltas), base, signed(signature))


def _joined(
    site: Site, shape: tuple[int, int], deltas: list[Delta], dtype: torch.dtype
) -> list[Delta]:
    """The deltas as one if all keep values, else as they are, in one dtype."""
    kept = [d for d in deltas if not isinstance(d, LowRankDelta)]
    if len(kept) < len(deltas):
        return [
            (
                d
                if isinstance(d, LowRankDelta)
                else replace(d, old=d.old.to(dtype), new=d.new.to(dtype))
            )
            for d in deltas
        ]
    old, new, named = (
        torch.empty(shape, dtype=dtype),
        torch.empty(shape, dtype=dtype),
        torch.zeros(shape, dtype=torch.bool),
    )
    for delta in kept:
        rows, cols = delta.points()
        # the old value is that of the first delta that names an entry, the new one of the last
        # that changes it
        first = ~named[rows, cols]
        write = first | differ(delta.old, delta.new)
        old[rows[first], cols[first]] = delta.old[first].to(dtype)
        new[rows[write], cols[write]] = delta.new[write].to(dtype)
        named[rows, cols] = True
    rows, cols = named.nonzero(as_tuple=True)
    return [kept_delta(site, shape, rows, cols, old[named], new[named])]
