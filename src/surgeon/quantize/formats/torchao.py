"""Export for torchao, as safetensors that transformers loads through its torchao integration.

How this works. The codes of a Linear layer become a tensor class of torchao, which torchao itself
takes apart into plain tensors for the file; what it needs to put them together again stands in the
metadata of the file. config.json holds torchao's configuration, which says to transformers which
modules are of that class, and would quantize the base model in the same places.

torchao runs codes of 2 to 8 bits on any device in one form only, `IntxUnpackedToInt8Tensor`, which
spends a byte on each: the folder is as large at 2 bits as at 8. Its denser forms need kernels that
exist for GPUs alone. Per channel or per group; symmetric, or with offsets where the model is
float32, since torchao subtracts them in the model's dtype. Matrices with critical entries are kept
at 8 bits, which costs nothing here, or dense.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ...anatomy import Site
from ...anatomy.folder import PLAIN
from ...errors import BadInput, MissingExtra
from ..grid import Grid, Quantized
from .export import ExportPlan, Reports, Source, set_quantization
from .packed import (
    Rounded,
    critical_modules,
    divided,
    keeper,
    linear_layers,
    whole,
    write_packed,
)

_KIND = "torchao"


def export_torchao(plan: ExportPlan) -> Reports:
    """Write the folder; loaded, each weight is what its code means, rounded to the model's dtype.

    Raises: as `write_folder`; MissingExtra; BadInput for a grid or a model that torchao cannot
    hold.
    """
    try:
        from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    except ImportError as error:
        raise MissingExtra("an export to torchao", "quantize") from error
    grid = plan.config.grid
    if grid.block.kind not in ("channel", "group"):
        raise BadInput(
            f"blocks of {grid.block} cannot be loaded by torchao; use channel or group:N, or"
            " ‹export› sidecar."
        )
    source = plan.source
    divided(source, grid, _KIND)
    modules = linear_layers(source, plan, _KIND)
    dtypes = {PLAIN[source.shards.stored[name].dtype] for name in modules}
    if not grid.symmetric and (narrow := dtypes - {torch.float32}):
        raise BadInput(
            f"{plan.folder} holds {', '.join(map(str, narrow))}, in which torchao would round the"
            " offsets; quantize symmetrically, or ‹export› sidecar."
        )
    critical = critical_modules(plan, modules, source)
    dense = set(critical) if plan.keep == "dense" else set()
    # transformers reads the metadata of all shards into one, so each has to list the tensors of all
    listed = json.dumps(
        sorted(f"{module}.weight" for module in modules.values() if module not in dense)
    )
    metadata: dict[str, str] = {}

    def encode(rounded: Rounded) -> Mapping[str, Tensor]:
        module = modules[rounded.name]
        flat, described = flatten_tensor_state_dict(
            {f"{module}.weight": _torchao_tensor(whole(rounded), rounded.tensor.dtype)}
        )
        metadata[f"{module}.weight"] = described[f"{module}.weight"]
        # the file's own names, which may lack the prefix of the model
        prefix = rounded.name.removesuffix(".weight")
        return {prefix + name.removeprefix(module): tensor for name, tensor in flat.items()}

    def save(tensors: Mapping[str, Tensor], path: Path) -> None:
        own = {"format": "pt", "tensor_names": listed, **metadata}
        metadata.clear()
        save_file({name: t.contiguous() for name, t in tensors.items()}, path, own)
        _sort_metadata(path)

    def finish(source: Source, part: Path) -> None:
        set_quantization(part, _config(plan, list(modules.values()), critical, source))

    return write_packed(
        plan,
        f"{_KIND}, critical matrices {plan.keep}",
        encode,
        lambda *_: True,
        finish,
        keeper(plan, _KIND, source),
        save,
    )


def _torchao_tensor(matrix: Quantized, dtype: torch.dtype) -> Tensor:
    from torchao.quantization import IntxUnpackedToInt8Tensor

    bits = matrix.grid.bits
    # torchao's codes are signed; ours are, if they are symmetric
    shift = 0 if matrix.grid.symmetric else 2 ** (bits - 1)
    block = (1, matrix.grid.block.size or matrix.shape[1])
    tensor: Tensor = IntxUnpackedToInt8Tensor(
        qdata=(matrix.codes - shift).to(torch.int8),
        scale=matrix.scale,
        zero_point=matrix.zero - shift,
        target_dtype=getattr(torch, f"int{bits}"),
        block_size=block,
        dtype=dtype,
        activation_quantization=None,
    )
    return tensor


def _config(
    plan: ExportPlan, modules: list[str], critical: list[str], source: Source
) -> dict[str, Any]:
    """transformers' TorchAoConfig as JSON.

    For the base model it is a recipe: torchao's own rounding, with the same matrices kept.
    """
    from torchao.quantization import FqnToConfig
    from transformers import TorchAoConfig

    grid = plan.config.grid
    layer = re.compile(re.escape(source.anatomy.layers_path) + r"\.\d+\.")
    ends = "|".join(sorted({re.escape(layer.sub("", module)) for module in modules}))
    kept = (
        {name: _intx(Grid(8, grid.symmetric, grid.block)) for name in critical}
        if plan.keep == "8bit"
        else {}
    )
    head = source.anatomy.addresses.get(Site(None, "unembed"))
    skipped = ([] if head is None else [head.module]) + (critical if plan.keep == "dense" else [])
    config: Any = TorchAoConfig(
        FqnToConfig({**kept, f"re:{layer.pattern}({ends})": _intx(grid)}),
        modules_to_not_convert=skipped,
    )
    settings: dict[str, Any] = config.to_dict()
    return settings


def _intx(grid: Grid) -> Any:
    from torchao.quantization import IntxWeightOnlyConfig, MappingType, PerAxis, PerGroup

    return IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{grid.bits}"),
        granularity=PerAxis(0) if grid.block.size is None else PerGroup(grid.block.size),
        mapping_type=MappingType.SYMMETRIC if grid.symmetric else MappingType.ASYMMETRIC,
    )


def _sort_metadata(path: Path) -> None:
    """Order the metadata in a file's header in place: safetensors writes several keys in random
    order.
    """
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(raw) <= length, "the same header in another order is as long as before"
        file.seek(8)
        file.write(raw.ljust(length))
