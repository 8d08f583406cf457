"""Quantize a model in memory: in place, or for the length of a `with` block, or as a set of tensors
that can be swapped in.

The matrices hold what the codes mean ("fake quant"): the model computes what the quantized one
would, in its own dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from ..anatomy import Anatomy, Entry, Region, Site, WeightView
from ..errors import BadInput, SurgeonError
from ..measure.likelihood import batches
from ..progress import Tell, silent
from ..result import derived, record
from ..tap import Tap
from .config import QuantizeConfig
from .holdout import MatrixReport, treat

DEFAULT = QuantizeConfig()


@record
class RoundedWeights:
    """What was done, matrix by matrix."""

    config: QuantizeConfig
    critical: list[Entry]
    matrices: dict[Site, MatrixReport]

    @derived
    def bits_per_weight(self) -> float:
        """Mean over the entries of the quantized matrices, with scales, offsets and entries put
        back.
        """
        reports = self.matrices.values()
        entries = sum(prod(one.shape) for one in reports)
        return sum(one.bits_per_weight * prod(one.shape) for one in reports) / entries

    @derived
    def held(self) -> int:
        return sum(one.held for one in self.matrices.values())


@dataclass(frozen=True, eq=False)
class Quantization:
    """A model's quantized parameters beside the model.

    tensors: by parameter name, shaped as the model's own.
    """

    anatomy: Anatomy
    result: RoundedWeights
    tensors: Mapping[str, Tensor]

    def applied(self) -> AbstractContextManager[None]:
        """The model computes with the quantized tensors; afterwards it has its own again, the very
        same memory.
        """
        return swapped(self.anatomy, self.tensors)


@contextmanager
def swapped(anatomy: Anatomy, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the context the model computes with `tensors` in the place of its parameters of these
    names.
    """
    own = {name: anatomy.model.get_parameter(name) for name in tensors}
    before = {name: parameter.data for name, parameter in own.items()}
    try:
        for name, tensor in tensors.items():
            own[name].data = tensor
        yield
    finally:
        for name, data in before.items():
            own[name].data = data


def quantize_(
    anatomy: Anatomy,
    config: QuantizeConfig = DEFAULT,
    critical: Sequence[Entry] = (),
    mean_squares: Mapping[Site, Tensor] | None = None,
    progress: Tell = silent,
) -> RoundedWeights:
    """Quantize the model's projections in place, matrix by matrix; what the model computes is what
    the codes mean.

    critical: entries that `config.method` may put back. mean_squares: E[x^2] of each column (in,),
    for `config.weighted`; see `input_mean_squares`. Nothing is changed if a matrix cannot be
    quantized.
    Raises: BadInput, UnknownSite; PackedWeight if the model is quantized already; SurgeonError for
    weights that are not finite.
    """
    views = {site: anatomy.view(site) for site in quantized_sites(anatomy, config)}
    return _quantize(anatomy, config, critical, mean_squares, views, progress)


def prepare(
    anatomy: Anatomy,
    config: QuantizeConfig = DEFAULT,
    critical: Sequence[Entry] = (),
    mean_squares: Mapping[Site, Tensor] | None = None,
    progress: Tell = silent,
) -> Quantization:
    """As `quantize_`, on copies of the tensors; the model stays as it is until they are
    `applied`.
    """
    copies, views = copied(anatomy, quantized_sites(anatomy, config))
    result = _quantize(anatomy, config, critical, mean_squares, views, progress)
    return Quantization(anatomy, result, copies)


def copied(
    anatomy: Anatomy, sites: Sequence[Site]
) -> tuple[dict[str, Tensor], dict[Site, WeightView]]:
    """Copies of the parameters that hold the sites, by name, and the sites in these copies."""
    addresses = {site: anatomy.addresses[site] for site in sites}
    names = sorted({address.parameter for address in addresses.values()})
    copies = {name: anatomy.model.get_parameter(name).detach().clone() for name in names}
    return copies, {
        site: WeightView(site, copies[a.parameter], a.packing) for site, a in addresses.items()
    }


@contextmanager
def quantized(
    anatomy: Anatomy,
    config: QuantizeConfig = DEFAULT,
    critical: Sequence[Entry] = (),
    mean_squares: Mapping[Site, Tensor] | None = None,
) -> Iterator[RoundedWeights]:
    """Within the context the model is quantized; after it, it is as before, bit for bit."""
    ready = prepare(anatomy, config, critical, mean_squares)
    with ready.applied():
        yield ready.result


def quantized_sites(anatomy: Anatomy, config: QuantizeConfig) -> list[Site]:
    """The matrices that are quantized: those of `config.roles`, experts included.

    Raises: BadInput if the model has none.
    """
    sites = [site for site in anatomy.addresses if site.role in config.roles]
    if not sites:
        there = sorted({site.role for site in anatomy.addresses})
        raise BadInput(
            f"this model has no matrix of role {', '.join(config.roles)}; its roles are"
            f" {', '.join(there)}."
        )
    return sites


def by_site(anatomy: Anatomy, critical: Sequence[Entry]) -> dict[Site, list[Entry]]:
    """The entries, sorted by matrix, each once.

    Raises: UnknownSite; BadInput for an entry outside its matrix.
    """
    entries: dict[Site, list[Entry]] = {}
    for entry in dict.fromkeys(critical):
        Region(entry.site, entry.row, entry.col).rows_cols(anatomy.view(entry.site).shape)
        entries.setdefault(entry.site, []).append(entry)
    return entries


def _quantize(
    anatomy: Anatomy,
    config: QuantizeConfig,
    critical: Sequence[Entry],
    mean_squares: Mapping[Site, Tensor] | None,
    views: Mapping[Site, WeightView],
    progress: Tell,
) -> RoundedWeights:
    """Quantize what the views hold, in place."""
    if config.weighted and not mean_squares:
        raise BadInput(
            "a weighted search needs the mean square of every input: take input_mean_squares on a"
            " text, or do not weigh."
        )
    entries = by_site(anatomy, critical)
    # all checks before the first change, so that nothing is half quantized
    for site, view in views.items():
        config.grid.check(view.shape)
        if not bool(torch.isfinite(view.read()).all()):
            raise SurgeonError(
                f"{site} holds NaN or infinity, which no grid can hold; download or write the"
                " checkpoint again."
            )
    reports: dict[Site, MatrixReport] = {}
    for done, (site, view) in enumerate(views.items()):
        reports[site] = quantize_view_(
            view, config, entries.get(site, ()), (mean_squares or {}).get(site)
        )
        progress("quantize", done + 1, len(views))
    return RoundedWeights(config, list(critical), reports)


def quantize_view_(
    view: WeightView, config: QuantizeConfig, critical: Sequence[Entry], mean_square: Tensor | None
) -> MatrixReport:
    """Quantize one matrix where it lies.

    Without its input's mean square the search is by weights alone, and the report says so.
    """
    known = replace(config, weighted=config.weighted and mean_square is not None)
    treated = treat(view.read().cpu(), known, critical, mean_square)
    view.assign_(treated.matrix)
    return treated.report


@torch.no_grad()
def input_mean_squares(
    anatomy: Anatomy, windows: Tensor, sites: Sequence[Site], progress: Tell = silent
) -> dict[Site, Tensor]:
    """E[x^2] of every input column of the sites, (in,) float32, over all tokens of `windows` (n,
    window), in one pass.

    Experts that are stored in one tensor share the input of their block; what enters their
    `mlp.down` is out of reach, so those sites are left out.
    """
    addresses = {site: anatomy.addresses[site] for site in sites}
    reachable = {
        s: a.module
        for s, a in addresses.items()
        if a.packing.expert is None or s.role != "mlp.down"
    }
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def watcher(name: str) -> Callable[[Tensor], None]:
        def add(x: Tensor) -> None:
            # in float64: sums over all tokens of a text
            rows = x.detach().double().flatten(0, -2)
            sums[name] = sums.get(name, 0) + rows.square().sum(0).cpu()
            counts[name] = counts.get(name, 0) + len(rows)

        return add

    device = next(anatomy.model.parameters()).device
    parts = batches(windows)
    with Tap() as tap:
        # fused q, k and v are one module, and so are the experts of a layer
        for name in sorted(set(reachable.values())):
            tap.on_input(anatomy.model.get_submodule(name), watcher(name))
        for done, ids in enumerate(parts):
            tap.run(anatomy.model, input_ids=ids.to(device), use_cache=False)
            progress("inputs", done + 1, len(parts))
    return {
        site: (sums[name] / counts[name]).float()
        for site, name in reachable.items()
        if name in sums
    }
