"""What the exports of packed weights have in common: shard by shard, each tensor of quantized
matrices is replaced by its parts.

How this works. A tensor of the checkpoint may hold several matrices (fused q, k and v), a matrix
may be stored in parts of a model's parameter (experts), and a format may know nothing but whole
Linear layers. So a tensor is read with all the views on it, each view is quantized by itself, as in
memory, and then the format's `encode` makes of the tensor and its codes the tensors that stand in
its place; a tensor that is not encoded is written as it is, or as what its codes mean. Formats
without room for single entries keep the matrices that hold critical ones at 8 bits or dense, by
`keeper`; and where a format wants one matrix of a fused tensor, `whole` joins the codes again,
which works because blocks of a channel or a group never reach from one matrix into the next.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ...anatomy import Site, WeightView
from ...errors import BadInput
from ..config import QuantizeConfig
from ..grid import Grid, Quantized
from ..holdout import treat
from ..quantize import by_site, quantize_view_
from .export import Done, ExportPlan, Reports, Source, write_folder

KEEP = ("8bit", "dense")


@dataclass(frozen=True, eq=False)
class Rounded:
    """One tensor of the checkpoint, its matrices, and their codes; views and quantized in the same
    order.
    """

    name: str
    tensor: Tensor
    views: list[WeightView]
    quantized: list[Quantized]


Encode = Callable[[Rounded], Mapping[str, Tensor]]
Save = Callable[[Mapping[str, Tensor], Path], None]


def save_plain(tensors: Mapping[str, Tensor], path: Path) -> None:
    save_file({name: t.contiguous() for name, t in tensors.items()}, path, {"format": "pt"})


def write_packed(
    plan: ExportPlan,
    kind: str,
    encode: Encode,
    packs: Callable[[Source, str], bool],
    finish: Callable[[Source, Path], None],
    config_of: Callable[[Site], QuantizeConfig | None] | None = None,
    save: Save = save_plain,
) -> Reports:
    """Write the folder with the tensors that `encode` makes of each stored one; the others stay.

    packs(source, name): whether the tensor of that name is encoded; what it holds is quantized all
    the same. config_of: settings for one matrix, None to leave it as it is. One shard is in memory
    at a time, packed.
    Raises: as `write_folder`.
    """
    choose = config_of or (lambda site: plan.config)

    def write_shard(source: Source, shard: str, output: Path, tell: Done) -> Reports:
        critical = by_site(source.anatomy, plan.critical)
        tensors: dict[str, Tensor] = {}
        reports: Reports = {}
        for name in source.shards.within(shard):
            tensor = source.shards.read(name)
            views = source.views(name, tensor)
            rounded = Rounded(name, tensor, views, [])
            for view in views:
                site, config = view.site, choose(view.site)
                mean_square, entries = plan.mean_squares.get(site), critical.get(site, ())
                if config is None:
                    reports[site] = None
                elif packs(source, name):
                    known = replace(config, weighted=config.weighted and mean_square is not None)
                    treated = treat(view.read(), known, entries, mean_square)
                    rounded.quantized.append(treated.quantized)
                    reports[site] = treated.report
                else:
                    reports[site] = quantize_view_(view, config, entries, mean_square)
                tell(site)
            tensors |= encode(rounded) if rounded.quantized else {name: tensor}
        save(tensors, output)
        return reports

    return write_folder(plan, kind, write_shard, finish)


def covered(source: Source, name: str) -> bool:
    """Whether all of the tensor is quantized, rather than some rows of it."""
    site, packing = source.sites[name][0]
    address = source.anatomy.addresses[site]
    if address.packing.expert is not None and packing.expert is None:
        return True  # an expert that the checkpoint stores apart
    shapes = [source.anatomy.view(site).shape for site, _ in source.sites[name]]
    return sum(map(prod, shapes)) == source.anatomy.model.get_parameter(address.parameter).numel()


def keeper(plan: ExportPlan, kind: str, source: Source) -> Callable[[Site], QuantizeConfig | None]:
    """How each matrix is quantized by a format without room for single entries: those with critical
    ones at 8 bits, unclipped, or not.

    Matrices that are stored as one are treated as one.
    Raises: BadInput for another `plan.keep`.
    """
    if plan.keep not in KEEP:
        raise BadInput(
            f"critical matrices cannot be kept {plan.keep!r} in a {kind} export; use"
            f" {' or '.join(KEEP)}."
        )
    kept: set[Site] = set()
    for places in source.sites.values():
        together = {site for site, _ in places}
        if together & _kept(plan):
            kept |= together
    # unclipped, so that the critical entry keeps its size
    eight = replace(plan.config, grid=replace(plan.config.grid, bits=8), method="rtn")
    # nothing is put back in any of these formats
    others = replace(plan.config, method="clip" if plan.config.clips else "rtn")
    for_kept = eight if plan.keep == "8bit" else None
    return lambda site: for_kept if site in kept else others


def linear_layers(
    source: Source, plan: ExportPlan, kind: str, experts: bool = False
) -> dict[str, str]:
    """The module in the model of each tensor to be packed, by the tensor's name, where a format
    knows nothing but `nn.Linear`.

    experts: whether the format also knows experts that are stored apart, as Linear layers would be;
    not those with critical entries.
    Raises: BadInput for a model that keeps its matrices in anything else.
    """
    kept = _kept(plan)
    modules = {}
    for name, places in source.sites.items():
        site, packing = places[0]
        if experts and site.expert is not None and packing.expert is None:
            if site in kept:
                raise BadInput(
                    f"{site} holds critical entries, and an expert cannot be kept apart from the"
                    f" others in a {kind} export; use ‹export› sidecar, or ‹method› clip."
                )
            modules[name] = name.removesuffix(".weight")
            continue
        address = source.anatomy.addresses[site]
        module = source.anatomy.model.get_submodule(address.module)
        # a subclass may use its weight in ways that a packed one cannot follow
        if type(module) is not nn.Linear:
            what = (
                "part of one tensor for all experts"
                if site.expert is not None
                else f"the weight of a {type(module).__name__}"
            )
            raise BadInput(
                f"{site} is {what}, and {kind} packs nothing but plain Linear layers; use ‹export›"
                " sidecar or dense."
            )
        if not covered(source, name):
            raise BadInput(
                f"only some rows of {address.parameter} are to be quantized, and {kind} packs it"
                " whole; name all of its roles."
            )
        if len(places) > 1 and plan.config.grid.block.kind not in ("channel", "group"):
            raise BadInput(
                f"{address.parameter} holds {', '.join(str(s) for s, _ in places)}, and blocks of"
                f" {plan.config.grid.block} would reach from one into the other in a {kind} export;"
                " use channel or group:N."
            )
        modules[name] = address.module
    return modules


def whole(rounded: Rounded) -> Quantized:
    """The matrices of one Linear layer as one; its blocks lie within rows, if there are several."""
    if len(rounded.quantized) == 1:
        return rounded.quantized[0]
    first = rounded.quantized[0]
    shape = (rounded.tensor.shape[0], rounded.tensor.shape[1])
    codes = torch.empty(shape, dtype=first.codes.dtype)
    scale, zero = (torch.empty(shape[0], first.scale.shape[1]) for _ in range(2))
    for view, quantized in zip(rounded.views, rounded.quantized, strict=True):
        rows = slice(None) if view.packing.rows is None else view.packing.rows
        codes[rows], scale[rows], zero[rows] = quantized.codes, quantized.scale, quantized.zero
    return Quantized(codes, scale, zero, first.grid, shape)


def divided(source: Source, grid: Grid, kind: str) -> None:
    """Raises: BadInput if the blocks reach over the edge of a matrix, for which a format has no
    room.
    """
    for places in source.sites.values():
        for site, _ in places:
            n_out, n_in = source.anatomy.view(site).shape
            if not grid.block.divides((n_out, n_in)):
                raise BadInput(
                    f"blocks of {grid.block} do not divide {site} of shape (out {n_out}, in"
                    f" {n_in}), and a {kind} export has no room for padding; choose a size that"
                    " does, or ‹export› sidecar."
                )


def critical_modules(plan: ExportPlan, modules: Mapping[str, str], source: Source) -> list[str]:
    """The modules that hold critical entries, if the method keeps them."""
    kept = _kept(plan)
    holding = [n for n, places in source.sites.items() if any(site in kept for site, _ in places)]
    return sorted({modules[name] for name in holding})


def _kept(plan: ExportPlan) -> set[Site]:
    return {entry.site for entry in plan.critical} if plan.config.restores else set()
