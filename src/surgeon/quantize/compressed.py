"""Export in the pack-quantized format of compressed-tensors, which transformers and vLLM read.

2 to 8 bits, symmetric, per channel or per group, Linear layers and experts. The format has no room
for single entries, so a matrix with critical ones is kept at 8 bits or dense; transformers unpacks
all experts alike, so an expert cannot be kept. transformers 5 cannot load packed offsets, so
asymmetric grids are refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BadInput, MissingExtra
from .checkpoint import Source
from .export import ExportPlan
from .grid import Grid
from .packed import Stored, critical_modules, divided, keeper, linear_layers, whole, write_packed

_KIND = "compressed-tensors"


def export_compressed(plan: ExportPlan) -> None:
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
            " or --export sidecar."
        )
    source = Source(plan.folder, plan.config)
    divided(source, grid, _KIND)
    modules = linear_layers(source, plan, _KIND, experts=True)
    critical = critical_modules(plan, modules, source)

    def encode(stored: Stored) -> Mapping[str, Tensor]:
        matrix = whole(stored)
        return {
            f"{stored.name}_packed": pack_to_int32(matrix.codes, matrix.grid.bits),
            f"{stored.name}_scale": matrix.scale.to(stored.tensor.dtype),
            f"{stored.name}_shape": torch.tensor(matrix.shape),
        }

    def finish(source: Source, part: Path) -> None:
        config = json.loads((part / "config.json").read_text())
        linear = [
            name
            for name, module in source.anatomy.model.named_modules()
            if isinstance(module, nn.Linear)
        ]
        dense = sorted(set(linear) - set(modules.values())) + (
            critical if plan.keep == "dense" else []
        )
        # the named matrices come first, or the library warns that it found none of them; as
        # patterns, or transformers takes theirs for
        # the group of the experts
        patterns = [f"re:^{re.escape(name)}$" for name in critical]
        named = (
            [_group(Grid(8, block=grid.block), patterns)]
            if critical and plan.keep == "8bit"
            else []
        )
        groups = {f"group_{i}": group for i, group in enumerate([*named, _group(grid, ["Linear"])])}
        config["quantization_config"] = {
            "quant_method": _KIND,
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": dense,
        }
        (part / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

    kind = f"{_KIND}, critical matrices {plan.keep}"
    write_packed(plan, kind, encode, lambda *_: True, finish, keeper(plan, _KIND, source))


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
