"""Which critical sets are links of one chain: they share a channel, and one feeds the other."""

# How this works.
#
# A weight that reads or writes a channel early can be vital only because a later one needs that
# channel. Two measurements tell. Both sets are zeroed: if that costs little more than the dearer of
# them alone, they do the same work. And the early one is zeroed while the channel behind the later
# one is held at its intact values: what damage goes away was done through the later one. Sets that
# share no channel of the residual stream are not asked.

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from itertools import combinations

import torch
from jaxtyping import Int64
from torch import Tensor

from ..anatomy import Anatomy, Region, Site
from ..measure.likelihood import batches, window_nll
from ..patch import record_channel, restored_channel
from ..result import record
from .damage import Damage, Variant
from .zeroed import zeroed

LINK_TOKENS = 128  # on which it is asked
SHARED = 0.5  # of the smaller damage, from which on two sets are links of one chain


@record
class Link:
    """Two sets that do the same work, by their numbers from 1: `first` lies below `then`.

    channel: that both read or write. nats: damage of each alone, and together_nats of both, on a
    sample. restored_nats: what is left of the first's with the channel behind the second at its
    intact values; None where the second writes no one channel.
    """

    first: int
    then: int
    channel: int
    nats: tuple[float, float]
    together_nats: float
    restored_nats: float | None


def links(
    anatomy: Anatomy,
    sets: Sequence[Sequence[Region]],
    windows: Int64[Tensor, "n window"],
    damage: Damage,
) -> list[Link]:
    """Every pair of sets that share a channel and at least SHARED of the smaller damage.

    sets: the regions of each. damage: on these windows, of which a few tokens are read.
    """
    channels = [_channels(anatomy, parts) for parts in sets]
    depths = [anatomy.first_changed(part.site for part in parts) for parts in sets]
    upwards = sorted(range(len(sets)), key=lambda number: depths[number])
    pairs = [(a, b) for a, b in combinations(upwards, 2) if channels[a] & channels[b]]
    # each weight once: a set can hold a part of another
    both = [list(dict.fromkeys([*sets[a], *sets[b]])) for a, b in pairs]

    few = damage.few(LINK_TOKENS)
    measured = damage.of([Variant(parts) for parts in [*sets, *both]], sample=few)
    nats = [float(one.mean()) for one in measured]
    alone, together = nats[: len(sets)], nats[len(sets) :]
    read = windows[few.windows, : few.tokens].to(next(anatomy.model.parameters()).device)
    base = float(damage.base_on(few).mean())

    found = []
    for (first, then), joint in zip(pairs, together, strict=True):
        written = _written(anatomy, sets[then])
        left = None
        if written is not None:
            left = _restored(anatomy, sets[first], *written, read) - base
        mine = alone[first], alone[then]
        overlap = (sum(mine) - joint) / max(min(mine), 1e-9)
        through = 0.0 if left is None else (mine[0] - left) / max(mine[0], 1e-9)
        if max(overlap, through) >= SHARED:
            channel = min(channels[first] & channels[then])
            found.append(Link(first + 1, then + 1, channel, mine, joint, left))
    return found


@torch.no_grad()
def _restored(
    anatomy: Anatomy, parts: Sequence[Region], site: Site, channel: int, windows: Tensor
) -> float:
    """Mean NLL with the parts at zero and one output channel of a site at its intact values."""
    losses = []
    for ids in batches(windows):
        intact = record_channel(anatomy, site, channel, ids)
        with ExitStack() as stack:
            stack.enter_context(zeroed(anatomy, parts))
            stack.enter_context(restored_channel(anatomy, site, channel, intact))
            losses.append(window_nll(anatomy.model, ids))
    return float(torch.cat(losses).mean())


def _written(anatomy: Anatomy, parts: Sequence[Region]) -> tuple[Site, int] | None:
    """The one output channel of the last site that the parts write, if a hook can hold it."""
    last = max((part.site for part in parts), key=lambda site: anatomy.first_changed([site]))
    rows = {part.row for part in parts if part.site == last}
    row = next(iter(rows))
    outside = last.role in ("embed", "unembed")
    if len(rows) > 1 or row is None or last.expert is not None or outside:
        return None
    if anatomy.addresses[last].packing.rows is not None:  # one of several matrices in one
        return None
    return last, row


def _channels(anatomy: Anatomy, parts: Sequence[Region]) -> set[int]:
    """The channels of the residual stream that the parts read or write."""
    width = anatomy.d_model
    channels: set[int] = set()
    for part in parts:
        n_out, n_in = anatomy.view(part.site).shape
        if n_out == width and part.row is not None:
            channels.add(part.row)
        if n_in == width and part.col is not None:
            channels.add(part.col)
    return channels
