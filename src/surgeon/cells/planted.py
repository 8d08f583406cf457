"""Controls of the screen: a planted fragile weight, which it must find, and a rescaled neuron,
which it must not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from ..errors import BadInput, SurgeonError
from ..tap import Tap
from .damage import Damage, by_cell
from .model import ScGPT
from .parts import Part, mlp_part
from .tokenise import Batch

CHANNELS = 8  # that are tried
LARGEST = 2.0**14  # constant write beyond which the layer holds nothing else in float32


@dataclass(frozen=True)
class Planted:
    """A copy of the model that computes the same, and what was planted in it.

    write: the constant that the weight writes and the bias takes off again. nats: what its removal
    costs. difference: the largest absolute difference between the states of the model and of the
    copy, over all positions that are not padding.
    """

    model: ScGPT
    part: Part
    write: float
    nats: float
    difference: float

    def to_json(self) -> dict[str, Any]:
        return {
            "address": self.part.address,
            "write": self.write,
            "nats": self.nats,
            "max_abs_difference": self.difference,
        }


@dataclass(frozen=True)
class Rescaled:
    """A copy of the model in which one ReLU neuron is `factor` times as large and its output
    weights as many times smaller.
    """

    model: ScGPT
    layer: int
    neuron: int
    factor: float
    difference: float

    def to_json(self) -> dict[str, Any]:
        return {
            "layer": self.layer,
            "neuron": self.neuron,
            "factor": self.factor,
            "max_abs_difference": self.difference,
        }


def plant(
    model: ScGPT,
    batch: Batch,
    masked: Bool[Tensor, "draw cell pos"],
    nats: float = 0.25,
    layer: int | None = None,
    seed: int = 0,
) -> Planted:
    """Add a constant hidden unit to one MLP, whose one output weight a bias takes off again, so
    that the model computes the same.

    Removing that weight leaves the bias alone. The constant is found by bisection, so that this
    costs `nats` per masked value. |w| is that of the matrix's 95% quantile, so that magnitude does
    not give it away. The layer is the middle one unless named.
    Raises: BadInput for a layer that is not there; SurgeonError if no constant costs that much.
    """
    index = len(model.layers) // 2 if layer is None else layer
    if not 0 <= index < len(model.layers):
        raise BadInput(
            f"layer {index} does not exist; the model has {len(model.layers)}, counted from 0."
        )
    weight = model.layers[index].linear2.weight.detach()
    damage = Damage(model, batch, masked)

    def cost(row: int, write: float) -> float:
        with _shifted(model.layers[index].linear2, row, -write):
            return float(by_cell(damage.change(index)).nanmean())

    # not every channel matters so much that any constant would do
    for row in torch.randperm(len(weight), generator=torch.Generator().manual_seed(seed))[
        :CHANNELS
    ].tolist():
        write = solve(partial(cost, row), nats, 1.0, LARGEST)
        if write is not None:
            break
    else:
        raise SurgeonError(
            f"no constant in {CHANNELS} channels of layer {index} costs {nats:g} nats; take another"
            " layer, or ask for less."
        )
    # the quantile by sorting: torch's own takes no more than 16 million values
    size = float(weight.abs().flatten().sort().values[int(0.95 * weight.numel())])
    copy = deepcopy(model)
    block = copy.layers[index]
    block.linear1, block.linear2 = _widened(block.linear1, block.linear2, row, size, write)
    part = mlp_part(copy, index, row, weight.shape[1])
    measured = float(by_cell(Damage(copy, batch, masked).of([part])).nanmean())
    return Planted(copy, part, write, measured, difference(model, copy, batch))


def rescale(
    model: ScGPT, batch: Batch, factor: float = 1000.0, layer: int | None = None
) -> Rescaled:
    """Make a neuron `factor` times as large, and its output weights as many times smaller: the same
    function, for a ReLU.

    Taken is the neuron in the middle of those that fire on these cells, by how high they fire.
    Raises: SurgeonError if none fires.
    """
    index = len(model.layers) // 2 if layer is None else layer
    seen: list[Tensor] = []
    with Tap() as tap, torch.no_grad():
        tap.on_input(model.layers[index].linear2, lambda x: seen.append(x.flatten(0, -2).amax(0)))
        tap.run(model, batch.genes, batch.values, batch.padding)
    height = torch.stack(seen).amax(0)
    live = (height > 0).nonzero().flatten()
    if not len(live):
        raise SurgeonError(
            f"no neuron of layer {index} fires on these cells, so none can be rescaled; give other"
            " cells."
        )
    neuron = int(live[height[live].argsort()[len(live) // 2]])
    copy = deepcopy(model)
    block = copy.layers[index]
    with torch.no_grad():
        block.linear1.weight[neuron] *= factor
        block.linear1.bias[neuron] *= factor
        block.linear2.weight[:, neuron] /= factor
    return Rescaled(copy, index, neuron, factor, difference(model, copy, batch))


@torch.no_grad()
def difference(one: ScGPT, other: ScGPT, batch: Batch) -> float:
    """The largest absolute difference between the states of two models on these cells, padding left
    out.
    """
    states = [
        m(batch.genes, batch.values, batch.padding).states[~batch.padding] for m in (one, other)
    ]
    return float((states[0] - states[1]).abs().max())


def solve(
    cost: Callable[[float], float],
    wanted: float,
    start: float,
    largest: float,
    tolerance: float = 0.02,
    steps: int = 24,
    growth: float = 4.0,
) -> float | None:
    """The x in [start / 64, largest] where `cost(x)` is `wanted`, within `tolerance` of it, by
    growth and then bisection of log x.

    None if the cost stays below up to `largest`.
    """
    low, high = start / 64, start
    while cost(high) < wanted:
        low, high = high, high * growth
        if high > largest:
            return None
    for _ in range(steps):
        middle = (low * high) ** 0.5
        found = cost(middle)
        if abs(found - wanted) <= tolerance * wanted:
            return float(middle)
        low, high = (middle, high) if found < wanted else (low, middle)
    return float(high)


@contextmanager
def _shifted(linear: nn.Linear, row: int, by: float) -> Iterator[None]:
    """The bias of one channel moved within the block."""
    bias = linear.bias.detach()
    old = bias[row].clone()
    bias[row] = old + by
    try:
        yield
    finally:
        bias[row] = old


@torch.no_grad()
def _widened(
    up: nn.Linear, down: nn.Linear, row: int, weight: float, write: float
) -> tuple[nn.Linear, nn.Linear]:
    """Both matrices with one more neuron, which is constant and writes `write` to channel `row`,
    and the bias that takes it off.
    """
    wide_up = nn.Linear(up.in_features, up.out_features + 1).to(up.weight)
    wide_down = nn.Linear(down.in_features + 1, down.out_features).to(down.weight)
    wide_up.weight.copy_(torch.cat([up.weight, torch.zeros_like(up.weight[:1])]))
    wide_up.bias.copy_(torch.cat([up.bias, up.bias.new_tensor([write / weight])]))
    wide_down.weight.copy_(torch.cat([down.weight, torch.zeros_like(down.weight[:, :1])], 1))
    wide_down.bias.copy_(down.bias)
    wide_down.weight[row, -1] = weight
    # what it writes in the model's own precision, so that the two cancel as well as they can
    wide_down.bias[row] -= wide_down.weight[row, -1] * wide_up.bias[-1]
    return wide_up.requires_grad_(False).eval(), wide_down.requires_grad_(False).eval()
