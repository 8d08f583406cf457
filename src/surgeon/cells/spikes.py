"""Where to look: weights with the largest |w·x| among what MLPs write, and among LayerNorm scales
and shifts.

|w·x| and never |w| or |x|: a neuron scaled by 1000 whose output weights are divided by 1000 is the
same neuron. Post-norm encoders carry their outliers in the LayerNorms, so every scale (what it
multiplies is the standardised state) and shift is looked at too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..tap import Tap
from .damage import CHUNK, cells_of
from .model import ScGPT
from .parts import Part, mlp_part, module_name, norm_part, norms
from .tokenise import Batch


@dataclass(frozen=True)
class Spike:
    """A candidate.

    kind: "mlp", "scale" or "shift". write: the largest |w·x| over all positions of all cells.
    height: the same over the root mean square of that figure in its matrix or vector.
    """

    part: Part
    kind: str
    weight: float
    write: float
    height: float


@torch.no_grad()
def spikes(model: ScGPT, batch: Batch, each: int) -> list[Spike]:
    """The `each` entries of every MLP output matrix, and of every LayerNorm's scale and shift, that
    write most on these cells.

    Returns the candidates, largest height first. What stands at padding is not looked at.
    """
    inputs, outputs = _largest(model, batch)
    found = []
    for index, layer in enumerate(model.layers):
        weight = layer.linear2.weight.detach()
        name = module_name(model, layer.linear2)
        write = weight.abs() * inputs[name]
        for flat in _top(write, each):
            part = mlp_part(model, index, *divmod(flat, weight.shape[1]))
            found.append(_spike(part, "mlp", weight, write))
    for name, norm in norms(model):
        for kind, stored, write in (
            ("scale", norm.weight, outputs[name]),
            ("shift", norm.bias, norm.bias.detach().abs()),
        ):
            for flat in _top(write, each):
                found.append(
                    _spike(norm_part(model, name, kind, flat), kind, stored.detach(), write)
                )
    return sorted(found, key=lambda s: (-s.height, s.part.address))


def _largest(model: ScGPT, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """By module name: the largest |x| of each neuron that enters a `linear2`, and the largest
    |scale·x̂| of each LayerNorm channel.
    """
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    kept = Tensor()

    def watch(into: dict[str, Tensor], name: str, shift: Tensor | None, states: Tensor) -> None:
        real = states if shift is None else states - shift
        largest = real.reshape(-1, real.shape[-1])[kept].abs().amax(0)
        into[name] = torch.maximum(into[name], largest) if name in into else largest

    with Tap() as tap:
        for layer in model.layers:
            name = module_name(model, layer.linear2)
            tap.on_input(layer.linear2, _watcher(watch, inputs, name, None))
        for name, norm in norms(model):
            tap.on_output(norm, _watcher(watch, outputs, name, norm.bias.detach()))
        for at in range(0, len(batch.cell_names), CHUNK):
            piece = cells_of(batch, slice(at, at + CHUNK))
            kept = ~piece.padding.flatten()
            tap.run(model, piece.genes, piece.values, piece.padding)
    return inputs, outputs


def _watcher(watch: Callable[..., None], *fixed: object) -> Callable[[Tensor], None]:
    return partial(watch, *fixed)


def _top(write: Tensor, n: int) -> list[int]:
    found: list[int] = write.flatten().topk(min(n, write.numel())).indices.tolist()
    return found


def _spike(part: Part, kind: str, stored: Tensor, write: Tensor) -> Spike:
    usual = float(write.double().square().mean().sqrt())
    at = float(write[part.index])
    return Spike(part, kind, float(stored[part.index]), at, at / usual if usual > 0 else 0.0)
