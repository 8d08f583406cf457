"""The super activation of both models: how large the channels grow that the critical entries
write.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from ..anatomy import Address, Entry, Site
from ..result import derived, record
from ..tap import Tap

_BATCH = 4  # windows at a time: only peaks are kept, and small batches keep memory low


@record
class SuperActivation:
    """The largest |value| that the module of `site` writes to output channel `row`, over all tokens
    of a text, in both models.
    """

    site: Site
    row: int
    base: float
    other: float

    @derived
    def ratio(self) -> float | None:
        return self.other / self.base if self.base else None


def channels(entries: Sequence[Entry]) -> list[tuple[Site, int]]:
    """The channels that the entries write, where one module writes them: experts that share a
    module are left out.
    """
    return sorted({(entry.site, entry.row) for entry in entries if entry.site.expert is None})


@torch.no_grad()
def peaks(
    model: nn.Module,
    addresses: Sequence[Address],
    rows: Sequence[int],
    windows: Int64[Tensor, "batch pos"],
) -> list[float]:
    """The largest |output| of channel `rows[i]` of the module at `addresses[i]`, in one pass over
    the windows.
    """
    device = next(model.parameters()).device
    highest = [0.0] * len(rows)
    with Tap() as tap:
        for path in dict.fromkeys(address.module for address in addresses):
            here = [i for i, address in enumerate(addresses) if address.module == path]

            def look(output: Tensor, here: list[int] = here) -> None:
                for i in here:
                    highest[i] = max(highest[i], float(output[..., rows[i]].abs().max()))

            tap.on_output(model.get_submodule(path), look)
        for batch in torch.split(windows, _BATCH):
            tap.run(model, input_ids=batch.to(device), use_cache=False)
    return highest
