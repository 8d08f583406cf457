"""Attention heads and MLP blocks, ranked by what their removal costs: each writes nothing, the rest
is as it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..measure.bootstrap import interval
from ..tap import Tap
from .damage import Damage, Progress, by_cell


@dataclass(frozen=True)
class Component:
    """`L2.head3` or `L2.mlp`, and its damage in nats per masked value with an interval over
    cells.
    """

    name: str
    layer: int
    nats: float
    ci95: tuple[float, float]

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "layer": self.layer, "nats": self.nats, "ci95": list(self.ci95)}


def components(damage: Damage, seed: int = 0, progress: Progress | None = None) -> list[Component]:
    """Every head (what it gives to the output projection set to zero) and every MLP block (its
    write set to zero), worst first.
    """
    layers = damage.model.layers
    heads = damage.model.n_heads
    found = []
    for index, layer in enumerate(layers):
        width = layer.linear2.out_features // heads
        for head in range(heads + 1):
            with Tap() as tap:
                if head < heads:
                    name = f"L{index}.head{head}"
                    tap.on_input(
                        layer.self_attn.out_proj, _without(slice(head * width, (head + 1) * width))
                    )
                else:
                    name = f"L{index}.mlp"
                    tap.on_output(layer.linear2, torch.zeros_like)
                cells = by_cell(damage.change(index))
            cells = cells[~cells.isnan()]
            found.append(Component(name, index, float(cells.mean()), interval(cells, seed)))
            if progress:
                progress("heads and blocks", len(found), len(layers) * (heads + 1))
    return sorted(found, key=lambda c: (-c.nats, c.name))


def _without(channels: slice) -> Any:
    def watch(states: Tensor) -> Tensor:
        states = states.clone()
        states[..., channels] = 0
        return states

    return watch
