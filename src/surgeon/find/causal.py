"""The causal test: ablate the set, but put the super activation back, and see how much of the
damage goes.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from jaxtyping import Float64
from torch import Tensor

from ..anatomy import Anatomy, Region, Site
from ..measure.likelihood import batches, window_nll
from ..patch import record_channel, restored_channel
from .zeroed import zeroed

MAX_CHANNELS = 8  # parts that write more have no one activation that could be put back


def written_channels(parts: Sequence[Region]) -> list[tuple[Site, int]]:
    """The output channels that the parts write, where a hook can hold them: rows of one plain
    mlp.down each; else none.
    """
    channels = {
        (part.site, part.row)
        for part in parts
        if part.row is not None and part.site.role == "mlp.down" and part.site.expert is None
    }
    others = any((part.site, part.row) not in channels for part in parts)
    return [] if others or len(channels) > MAX_CHANNELS else sorted(channels)


@torch.no_grad()
def restored_nll(
    anatomy: Anatomy, parts: Sequence[Region], windows: Tensor
) -> Float64[Tensor, " n"]:
    """NLL of each window with `parts` zeroed and the super activation restored: each of the
    `written_channels` holds its intact value at the position of each window where it peaked, and at
    no other.

    Damage that stays was done at the other positions: the set is then more than a spike. Restoring
    every position of a channel would undo the ablation by construction and show nothing.
    Source: Yu et al. 2024, arXiv:2411.07191, section 3.2.
    """
    channels = written_channels(parts)
    device = next(anatomy.model.parameters()).device
    losses = []
    for ids in batches(windows):
        on_device = ids.to(device)
        intact = [record_channel(anatomy, site, row, on_device) for site, row in channels]
        with zeroed(anatomy, parts), ExitStack() as restored:
            for (site, row), clean in zip(channels, intact, strict=True):
                broken = record_channel(anatomy, site, row, on_device)
                peak = torch.zeros_like(clean, dtype=torch.bool).scatter_(
                    1, clean.abs().argmax(1, keepdim=True), True
                )
                restored.enter_context(
                    restored_channel(anatomy, site, row, torch.where(peak, clean, broken))
                )
            losses.append(window_nll(anatomy.model, ids))
    return torch.cat(losses)
