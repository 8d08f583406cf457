"""Single weights of a cell model: their addresses, and how to take them out for a while.

`L2.mlp.down[5, 17]` is an entry of an MLP's output matrix, row = output channel;
`L2.norm1.scale[5]` and `L2.norm1.shift[5]` belong to a LayerNorm, `encoder.enc_norm.scale[5]` to
one that lies before the first layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from ..errors import BadInput, UnknownSite
from .model import ScGPT

_MLP = re.compile(r"\s*L(\d+)\.mlp\.down\s*\[\s*(\d+)\s*,\s*(\d+)\s*\]\s*")
_NORM = re.compile(r"\s*([\w.]+)\.(scale|shift)\s*\[\s*(\d+)\s*\]\s*")


@dataclass(frozen=True)
class Part:
    """One weight: its address, the parameter that stores it, its place there, and the layer it lies
    in (-1: before the first).
    """

    address: str
    parameter: str
    index: tuple[int, ...]
    layer: int


def part_of(model: ScGPT, text: str) -> Part:
    """The weight of that address.

    Raises: BadInput for another form, UnknownSite for a weight the model does not have.
    """
    if mlp := _MLP.fullmatch(text):
        layer, row, col = map(int, mlp.groups())
        n = len(model.layers)
        if layer >= n:
            raise UnknownSite(
                f"{text.strip()} does not exist: this model has {n} layers, L0 to L{n - 1}."
            )
        rows, cols = model.layers[layer].linear2.weight.shape
        if row >= rows or col >= cols:
            raise UnknownSite(
                f"{text.strip()} does not exist: L{layer}.mlp.down has shape (out {rows}, in"
                f" {cols}), counted from 0."
            )
        return mlp_part(model, layer, row, col)
    if norm := _NORM.fullmatch(text):
        known = {
            norm_part(model, name, norm[2], 0).address.rpartition(".")[0]: (name, module)
            for name, module in norms(model)
        }
        if norm[1] not in known:
            raise UnknownSite(
                f"{norm[1]} is no LayerNorm of this model; there are {', '.join(known)}."
            )
        name, module = known[norm[1]]
        channel = int(norm[3])
        if channel >= module.normalized_shape[0]:
            raise UnknownSite(
                f"{text.strip()} does not exist: {norm[1]} has {module.normalized_shape[0]}"
                " channels, counted from 0."
            )
        return norm_part(model, name, norm[2], channel)
    raise BadInput(
        f"{text!r} is no weight of a cell model; write 'L2.mlp.down[5, 17]', 'L2.norm1.scale[5]' or"
        " 'L2.norm1.shift[5]'."
    )


def mlp_part(model: ScGPT, layer: int, row: int, col: int) -> Part:
    """One entry of an MLP's output matrix."""
    return Part(
        f"L{layer}.mlp.down[{row}, {col}]",
        f"{module_name(model, model.layers[layer].linear2)}.weight",
        (row, col),
        layer,
    )


def norms(model: ScGPT) -> list[tuple[str, nn.LayerNorm]]:
    """Every LayerNorm with its name; not those of a head over cell types, which no likelihood
    reads.
    """
    named = model.named_modules()
    return [
        (name, module)
        for name, module in named
        if isinstance(module, nn.LayerNorm) and not name.startswith("cls_decoder.")
    ]


def norm_part(model: ScGPT, name: str, kind: str, channel: int) -> Part:
    """One scale or shift of the LayerNorm of that name."""
    layer, short = -1, name
    for index, module in enumerate(model.layers):
        prefix = f"{module_name(model, module)}."
        if name.startswith(prefix):
            layer, short = index, f"L{index}.{name.removeprefix(prefix)}"
    return Part(
        f"{short}.{kind}[{channel}]",
        f"{name}.{'weight' if kind == 'scale' else 'bias'}",
        (channel,),
        layer,
    )


def module_name(model: nn.Module, wanted: nn.Module) -> str:
    return str(next(name for name, module in model.named_modules() if module is wanted))


@contextmanager
def scaled(model: nn.Module, parts: Sequence[Part], factor: float = 0.0) -> Iterator[None]:
    """Within the block every part is `factor` times itself; on any exit the original bits are
    back.
    """
    stored = [model.get_parameter(p.parameter).detach() for p in parts]
    kept = [tensor[p.index].clone() for tensor, p in zip(stored, parts, strict=True)]
    try:
        for tensor, part, old in zip(stored, parts, kept, strict=True):
            tensor[part.index] = old * factor
        yield
    finally:
        for tensor, part, old in zip(stored, parts, kept, strict=True):
            tensor[part.index] = old
