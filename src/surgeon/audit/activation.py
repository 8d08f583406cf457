"""The super activation of both models: how large the channels grow that the critical entries
write.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from ..anatomy import Address, Entry, Site
from ..tap import Tap

_BATCH = 4


@dataclass(frozen=True)
class SuperActivation:
    """The largest |value| that the module of `site` writes to output channel `row`, over all tokens
    of a text.
    """

    site: Site
    row: int
    base: float
    other: float

    @property
    def ratio(self) -> float | None:
        return self.other / self.base if self.base else None

    def to_json(self) -> dict[str, Any]:
        return {
            "site": str(self.site),
            "row": self.row,
            "base": self.base,
            "other": self.other,
            "ratio": self.ratio,
        }


def channels(entries: Sequence[Entry]) -> list[tuple[Site, int]]:
    """The channels that the entries write, where one module writes them: experts that share a
    module are left out.
    """
    return sorted({(e.site, e.row) for e in entries if e.site.expert is None})


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
        for path in dict.fromkeys(a.module for a in addresses):
            mine = [i for i, a in enumerate(addresses) if a.module == path]

            def look(y: Tensor, mine: list[int] = mine) -> None:
                for i in mine:
                    highest[i] = max(highest[i], float(y[..., rows[i]].abs().max()))

            tap.on_output(model.get_submodule(path), look)
        for batch in torch.split(windows, _BATCH):
            tap.run(model, input_ids=batch.to(device), use_cache=False)
    return highest
