"""Controls of the screen: a planted fragile weight, which it must find, and a rescaled neuron,
which it must not.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial

import torch
from torch import Tensor, nn

from ..anatomy import Region, Site
from ..errors import SurgeonError
from ..result import record
from ..tap import Tap
from .likelihood import MaskedNLL, Masks, by_cell
from .model import ScGPT
from .tokenise import Batch

CHANNELS = 8  # that are tried
LARGEST = 2.0**14  # constant write beyond which the layer holds nothing else in float32


@record
class Planted:
    """A fragile weight in a copy of the model that computes the same.

    max_abs_difference: the largest between states of the model and of the copy. write: the constant
    that the weight writes and the bias takes off again. nats: what its removal costs.
    """

    max_abs_difference: float
    address: Region
    write: float
    nats: float


@record
class Rescaled:
    """A ReLU neuron, in a copy of the model that computes the same, that is `factor` times as large
    and its output weights as many times smaller.
    """

    max_abs_difference: float
    layer: int
    neuron: int
    factor: float

    def holds(self, region: Region) -> bool:
        """Whether an entry is one of the output weights."""
        return region.site == Site(self.layer, "mlp.down") and region.col == self.neuron


def plant(
    model: ScGPT, batch: Batch, masked: Masks, nats: float = 0.25, seed: int = 0
) -> tuple[ScGPT, Planted]:
    """A copy of the model with a constant hidden unit in one MLP, whose one output weight a bias
    takes off again, so that it computes the same.

    Removing that weight leaves the bias alone. The constant is found by bisection, so that this
    costs `nats` per masked value. |w| is that of the matrix's 95% quantile, so that magnitude does
    not give it away. The layer is the middle one.
    Raises: SurgeonError if no constant costs that much.
    """
    index = len(model.layers) // 2
    down = model.layers[index].linear2
    nll = MaskedNLL(model.anatomy, batch, masked)

    def cost(row: int, write: float) -> float:
        with Tap() as tap:
            tap.on_output(down, partial(_shifted, row, -write))
            return float(by_cell(nll.values(index) - nll.intact).mean())

    # not every channel matters so much that any constant would do
    order = torch.randperm(down.out_features, generator=torch.Generator().manual_seed(seed))
    for row in order[:CHANNELS].tolist():
        write = solve(partial(cost, row), nats, 1.0, LARGEST)
        if write is not None:
            break
    else:
        raise SurgeonError(
            f"no constant in {CHANNELS} channels of layer {index} costs {nats:g} nats; ask for"
            " less."
        )
    # the quantile by sorting: torch's own takes no more than 16 million values
    size = float(down.weight.abs().flatten().sort().values[int(0.95 * down.weight.numel())])
    copy = deepcopy(model)
    _widen_(copy, index, row, size, write)
    planted = Region(Site(index, "mlp.down"), row, down.in_features)
    measured = MaskedNLL(copy.anatomy, batch, masked).cost([planted])
    return copy, Planted(difference(model, copy, batch), planted, write, measured)


def rescale(model: ScGPT, batch: Batch, factor: float = 1000.0) -> tuple[ScGPT, Rescaled]:
    """A copy with a neuron `factor` times as large, and its output weights as many times smaller:
    the same function, for a ReLU.

    Taken is the neuron in the middle of those that fire on these cells, by how high they fire, in
    the middle layer.
    Raises: SurgeonError if none fires.
    """
    index = len(model.layers) // 2
    heights: list[Tensor] = []
    with Tap() as tap, torch.no_grad():
        down = model.layers[index].linear2
        tap.on_input(down, lambda x: heights.append(x.flatten(0, -2).amax(0)))
        tap.run(model, batch.genes, batch.values, batch.padding)
    [height] = heights
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
    return copy, Rescaled(difference(model, copy, batch), index, neuron, factor)


@torch.no_grad()
def difference(one: ScGPT, other: ScGPT, batch: Batch) -> float:
    """The largest absolute difference between the states of two models on these cells, padding left
    out.
    """
    first, second = (m(batch.genes, batch.values, batch.padding).states for m in (one, other))
    return float((first - second)[~batch.padding].abs().max())


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
        reached = cost(middle)
        if abs(reached - wanted) <= tolerance * wanted:
            return float(middle)
        low, high = (middle, high) if reached < wanted else (low, middle)
    return float(high)


def _shifted(row: int, by: float, states: Tensor) -> Tensor:
    states = states.clone()
    states[..., row] += by
    return states


@torch.no_grad()
def _widen_(model: ScGPT, layer: int, row: int, weight: float, write: float) -> None:
    """One more neuron, which is constant and writes `write` to channel `row`, and the bias that
    takes it off.
    """
    block = model.layers[layer]
    up, down = block.linear1, block.linear2
    column = torch.zeros_like(down.weight[:, :1])
    column[row] = weight
    up.weight = _grown(up.weight, torch.zeros_like(up.weight[:1]))
    up.bias = _grown(up.bias, up.bias.new_tensor([write / weight]))
    down.weight = _grown(down.weight, column, 1)
    # what it writes in the model's own precision, so that the two cancel as well as they can
    down.bias[row] -= column[row, 0] * up.bias[-1]
    up.out_features, down.in_features = up.out_features + 1, down.in_features + 1


def _grown(old: Tensor, more: Tensor, axis: int = 0) -> nn.Parameter:
    return nn.Parameter(torch.cat([old, more], axis), requires_grad=False)
