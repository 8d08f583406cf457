"""Export as packed weights and a sidecar patch of a few bytes that puts the critical entries back.

After `import surgeon.quantize.formats.sidecar_loader` the folder loads with
`AutoModelForCausalLM.from_pretrained(folder)`. All bit widths and blocks, and every architecture
that Surgeon knows, experts included; a 4-bit folder is small on disk, in memory the model is dense.

How this works. Each tensor of quantized matrices is replaced by four: the packed codes of all its
matrices, one after the other, their scales, their offsets where there are any, and their shapes. A
tensor of which only some rows are quantized is written as what its codes mean. When the shards are
written, the packed ones are read back, and a patch is made on what they unpack to, which sets the
critical entries to their original values; it lies beside the weights, and config.json names its
digest. So the loader can tell that codes and patch belong together, and applying it checks the
hash of every matrix that it touches.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ...anatomy import Anatomy, Entry, Shards, Site, WeightView, digest
from ...anatomy.folder import PLAIN, config_json
from ...errors import BadCheckpoint
from ...patch import Patch, save
from ...patch.deltas import Delta, kept_delta
from ...patch.patch import BaseTensor, dtype_name, signed
from ...settings import values_of
from ..quantize import by_site
from .export import ExportPlan, Reports, Source, set_quantization
from .packed import Rounded, covered, write_packed
from .packing import parts, pieces

METHOD = "surgeon"
VERSION = 1
# safetensors, but not named so: loaders take all of those for weights
CORRECTION = "surgeon_correction.patch"
PARTS = ("codes", "scale", "zero", "shapes")


def export_sidecar(plan: ExportPlan) -> Reports:
    """Write the folder; loaded, it is what `quantize_` makes of the model in memory, bit for bit.

    Raises: as `write_folder`; BadCheckpoint if the quantized matrices are stored in several dtypes.
    """

    source = plan.source
    packed = [name for name in source.sites if covered(source, name)]
    dtypes = {PLAIN[source.shards.stored[name].dtype] for name in packed}
    if len(dtypes) != 1:
        raise BadCheckpoint(
            f"{plan.folder} stores its matrices as {', '.join(sorted(map(dtype_name, dtypes)))},"
            " and a sidecar has one dtype; save the model again with transformers first."
        )
    (dtype,) = dtypes

    def encode(rounded: Rounded) -> Mapping[str, Tensor]:
        return {
            f"{rounded.name}_{part}": tensor for part, tensor in parts(rounded.quantized).items()
        }

    def finish(source: Source, part: Path) -> None:
        critical = by_site(source.anatomy, plan.critical) if plan.config.restores else {}
        patch = _correction(plan, source, part, packed, critical, dtype)
        if patch is not None:
            save(patch, part / CORRECTION)
        grid = plan.config.grid
        config = config_json(part)
        named = config.get("dtype") or config.get("torch_dtype")
        # else a loader would take that of the scales
        more = {} if named else {"dtype": dtype_name(dtype)}
        settings = {
            "quant_method": METHOD,
            "version": VERSION,
            "bits": grid.bits,
            "symmetric": grid.symmetric,
            "block": str(grid.block),
            "dtype": dtype_name(dtype),
            "packed": sorted({name.rpartition(".")[2] for name in packed}),
            "correction": None if patch is None else patch.digest,
        }
        set_quantization(part, settings, **more)

    return write_packed(plan, "sidecar", encode, covered, finish)


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
    written = Shards(str(part), part, source.shards.files)
    deltas: list[Delta] = []
    bases: dict[Site, BaseTensor] = {}
    for name in packed:
        places = source.sites[name]
        if not any(site in critical for site, _ in places):
            continue
        original = source.shards.read(name)
        read = {p: written.read(f"{name}_{p}") for p in PARTS if f"{name}_{p}" in written}
        for (site, packing), quantized in zip(places, pieces(read, plan.config.grid), strict=True):
            if site in critical:
                view = WeightView(site, original, packing)
                delta, bases[site] = _put_back(
                    view, quantized.dequantize().to(dtype), critical[site], source.anatomy
                )
                deltas.append(delta)
    made_by = {"operation": "hold-out", **values_of(plan.config)}
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
