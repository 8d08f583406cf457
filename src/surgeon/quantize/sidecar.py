"""Export as packed weights and a sidecar patch of a few bytes that puts the critical entries back.

The folder loads with `import surgeon; AutoModelForCausalLM.from_pretrained(folder)`, see
quantizer.py. All bit widths and blocks, and every architecture that Surgeon knows, experts
included; a 4-bit folder is small on disk, in memory the model is dense.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ..anatomy import Anatomy, Entry, Site, WeightView, digest
from ..errors import BadCheckpoint
from ..patch import Patch, save
from ..patch.deltas import Delta, kept_delta
from ..patch.patch import BaseTensor, dtype_name, signed
from .checkpoint import Source
from .export import ExportPlan
from .packed import Stored, covered, dtypes, write_packed
from .packing import parts, pieces
from .quantize import by_site
from .quantizer import CORRECTION, METHOD, PARTS, VERSION


def export_sidecar(plan: ExportPlan) -> None:
    """Write the folder; loaded, it is what `quantize_` makes of the model in memory, bit for bit.

    Raises: as `write_folder`; BadCheckpoint if the quantized matrices are stored in several dtypes.
    """

    source = Source(plan.folder, plan.config)
    packed = [name for name in source.sites if covered(source, name)]
    found = dtypes(source, packed)
    if len(found) != 1:
        raise BadCheckpoint(
            f"{plan.folder} stores its matrices as {', '.join(sorted(map(dtype_name, found)))}, and"
            " a sidecar has one dtype; save the model again with transformers first."
        )
    (dtype,) = found

    def encode(stored: Stored) -> Mapping[str, Tensor]:
        return {f"{stored.name}_{part}": tensor for part, tensor in parts(stored.quantized).items()}

    def finish(source: Source, part: Path) -> None:
        critical = by_site(source.anatomy, plan.critical) if plan.config.restores else {}
        patch = _correction(plan, source, part, packed, critical, dtype)
        if patch is not None:
            save(patch, part / CORRECTION)
        grid = plan.config.grid
        config = json.loads((part / "config.json").read_text())
        if not (config.get("dtype") or config.get("torch_dtype")):
            config["dtype"] = dtype_name(dtype)  # else a loader would take that of the scales
        config["quantization_config"] = {
            "quant_method": METHOD,
            "version": VERSION,
            "bits": grid.bits,
            "symmetric": grid.symmetric,
            "block": str(grid.block),
            "dtype": dtype_name(dtype),
            "packed": sorted({name.rpartition(".")[2] for name in packed}),
            "correction": None if patch is None else patch.digest,
        }
        (part / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

    write_packed(plan, "sidecar", encode, covered, finish)


def _correction(
    plan: ExportPlan,
    source: Source,
    part: Path,
    packed: list[str],
    critical: Mapping[Site, list[Entry]],
    dtype: torch.dtype,
) -> Patch | None:
    """The patch that sets the critical entries of packed matrices to their original values, made on
    what the written file unpacks to.
    """
    shards = {name: shard for shard, names in source.holding.items() for name in names}
    deltas: list[Delta] = []
    bases: dict[Site, BaseTensor] = {}
    for name in packed:
        held = source.sites[name]
        if not any(site in critical for site, _ in held):
            continue
        original = source.read(shards[name], name)
        with safe_open(part / shards[name].name, "pt") as file:
            there = file.keys()
            read = {p: file.get_tensor(f"{name}_{p}") for p in PARTS if f"{name}_{p}" in there}
        for (site, packing), quantized in zip(held, pieces(read, plan.config.grid), strict=True):
            if site in critical:
                view = WeightView(site, original, packing)
                delta, bases[site] = _put_back(
                    view, quantized.dequantize().to(dtype), critical[site], source.anatomy
                )
                deltas.append(delta)
    made_by = {"operation": "hold-out", **plan.config.to_json()}
    return Patch(tuple(deltas), bases, signed(made_by)) if deltas else None


def _put_back(
    view: WeightView, rounded: Tensor, entries: list[Entry], anatomy: Anatomy
) -> tuple[Delta, BaseTensor]:
    """From what the file unpacks to, to the original entries. view: the original matrix."""
    rows, cols = (torch.tensor([getattr(e, axis) for e in entries]) for axis in ("row", "col"))
    delta = kept_delta(view.site, view.shape, rows, cols, rounded[rows, cols], view.get(rows, cols))
    after = rounded.clone()
    delta.apply_(after)
    address = anatomy.addresses[view.site]
    own = tuple(anatomy.model.get_parameter(address.parameter).shape)
    dtype = dtype_name(rounded.dtype)
    return delta, BaseTensor(
        digest(rounded),
        digest(after),
        address.parameter,
        view.shape,
        dtype,
        own,
        address.packing.transposed,
    )
