"""Export in the pack-quantized format of compressed-tensors, which transformers and vLLM read.

How this works. The weight of a Linear layer becomes three tensors: its codes, packed into 32-bit
words by the library's own function, its scales and its shape. config.json has groups, each with the
grid of the layers that it names: one for all Linear layers, and where critical matrices are kept at
8 bits, one for these. What stays dense, the output head for one, is listed as ignored. The format
has no room for single entries, so a matrix with critical ones is kept at 8 bits or dense.

2 to 8 bits, symmetric, per channel or per group, Linear layers and experts. transformers unpacks
all experts alike, so an expert cannot be kept; and it cannot load packed offsets (5.x), so
asymmetric grids are refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import BadInput, MissingExtra
from ..grid import Grid
from .export import ExportPlan, Reports, Source, set_quantization
from .packed import Rounded, critical_modules, divided, keeper, linear_layers, whole, write_packed

_KIND = "compressed-tensors"


def export_compressed(plan: ExportPlan) -> Reports:
    """Write the folder. The library keeps scales in the model's dtype: loaded, float32 weights are
    what `quantize_` makes of them, bit for bit, and bfloat16 ones differ by their rounding, by less
    than 2^-7 of the weight.

    Raises: as `write_folder`; MissingExtra; BadInput for a grid or a model that the format cannot
    hold.
    """
    try:
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    except ImportError as error:
        raise MissingExtra("an export to compressed-tensors", "quantize") from error
    grid = plan.config.grid
    if not grid.symmetric or grid.block.kind not in ("channel", "group"):
        asked = f"{'symmetric' if grid.symmetric else 'asymmetric'} blocks of {grid.block}"
        raise BadInput(
            f"{asked} cannot be loaded from compressed-tensors; use symmetric channel or group:N,"
            " or ‹export› sidecar."
        )
    source = plan.source
    divided(source, grid, _KIND)
    modules = linear_layers(source, plan, _KIND, experts=True)
    critical = critical_modules(plan, modules, source)

    def encode(rounded: Rounded) -> Mapping[str, Tensor]:
        matrix = whole(rounded)
        return {
            f"{rounded.name}_packed": pack_to_int32(matrix.codes, matrix.grid.bits),
            f"{rounded.name}_scale": matrix.scale.to(rounded.tensor.dtype),
            f"{rounded.name}_shape": torch.tensor(matrix.shape),
        }

    def finish(source: Source, part: Path) -> None:
        named_modules = source.anatomy.model.named_modules()
        linear = {name for name, module in named_modules if isinstance(module, nn.Linear)}
        dense = sorted(linear - set(modules.values()))
        groups = [_group(grid, ["Linear"])]
        if plan.keep == "dense":
            dense += critical
        elif critical:
            # as patterns, or transformers takes theirs for the group of the experts; before the
            # others, or the library warns that it found none of them
            patterns = [f"re:^{re.escape(name)}$" for name in critical]
            groups.insert(0, _group(Grid(8, block=grid.block), patterns))
        settings = {
            "quant_method": _KIND,
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {f"group_{place}": group for place, group in enumerate(groups)},
            "ignore": dense,
        }
        set_quantization(part, settings)

    kind = f"{_KIND}, critical matrices {plan.keep}"
    keep = keeper(plan, _KIND, source)
    return write_packed(plan, kind, encode, lambda *_: True, finish, keep)


def _group(grid: Grid, targets: list[str]) -> dict[str, Any]:
    weights = {
        "num_bits": grid.bits,
        "type": "int",
        "symmetric": True,
        "strategy": grid.block.kind,
        "group_size": grid.block.size,
        "dynamic": False,
    }
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
    }
