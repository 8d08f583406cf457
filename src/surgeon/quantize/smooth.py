"""SmoothQuant: part of the spread of an input's channels is moved into the weights that read it; in
float the model stays the same.

    ready = smoothing(anatomy, windows, alpha=0.5)
    with ready.applied():
        ...

An input x is divided by s_j = max|x_j|^alpha / max|W_j|^(1 - alpha) per channel j, and the column j
of every matrix that reads it is multiplied. The division is folded into the norm before, at no
cost, where experiment shows that this norm feeds nothing else; elsewhere it is done as the model
runs.
Source: Xiao et al. 2022, arXiv:2211.10438, eq. 4, which smooths what a norm feeds and leaves the
inputs of attn.out and mlp.down.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.func import functional_call

from ..anatomy import Anatomy, Site, WeightView
from ..errors import BadInput, TiedWeight
from ..measure.likelihood import batches, logits_of
from ..tap import Tap
from .activations import READERS
from .config import ROLES
from .quantize import swapped

LEAST = 1e-5  # of a scale, as in the published code
# how far logits may move, beside the largest, when a fold is tried; it is tried with powers of two,
# which round nothing
SAME = 1e-4
PROBE = 8  # tokens


@dataclass(frozen=True, eq=False)
class Smoothing:
    """A smoothed model beside the model. tensors: parameters by name. divisors: by module, what its
    input is divided by as it runs, (in,). folded: the norms that took a division in, by path."""

    anatomy: Anatomy
    alpha: float
    tensors: Mapping[str, Tensor]
    divisors: Mapping[str, Tensor]
    folded: tuple[str, ...]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model computes the same through smoothed weights; afterwards it has its own again,
        the very same memory.
        """
        with swapped(self.anatomy, self.tensors), Tap() as tap:
            for module, scale in self.divisors.items():
                tap.on_input(self.anatomy.model.get_submodule(module), _divider(scale))
            yield


@dataclass(frozen=True)
class _Group:
    """Modules that read one tensor.

    norm: the path of the norm that made it, None if there is none or it feeds more than these.
    """

    modules: tuple[str, ...]
    norm: str | None


@torch.no_grad()
def smoothing(
    anatomy: Anatomy,
    windows: Int64[Tensor, "n window"],
    alpha: float = 0.5,
    everywhere: bool = False,
    roles: Sequence[str] = ROLES,
) -> Smoothing:
    """Smooth the inputs of the projections of `roles` by what they are on a calibration text.

    alpha: 1 moves all of the spread into the weights, 0 evens out the weights. everywhere: also the
    inputs of attn.out and mlp.down, which no norm makes. What enters the `mlp.down` of fused
    experts is out of reach and stays.
    Raises: BadInput for alpha outside 0..1; TiedWeight if a matrix belongs to two modules.
    """
    if not 0 <= alpha <= 1:
        raise BadInput(
            f"alpha {alpha:g} cannot be used; it shares the spread between activations (0) and"
            " weights (1)."
        )
    sites = _by_module(anatomy)
    wanted = {
        m for m, own in sites.items() if any(_smoothed(site, roles, everywhere) for site in own)
    }
    maxima = _input_maxima(anatomy, windows, wanted)
    tensors: dict[str, Tensor] = {}
    divisors: dict[str, Tensor] = {}
    folded: list[str] = []
    for group in _groups(anatomy, wanted & set(maxima), sites):
        # a group may have readers that are not rounded; they are multiplied, but have no say
        quantized = [m for m in group.modules if m in maxima]
        scale = _scale(
            maxima[quantized[0]],
            _column_maxima(anatomy, [s for m in quantized for s in sites[m]]),
            alpha,
        )
        tensors |= _multiplied(anatomy, sites, group.modules, scale)
        if group.norm is None:
            divisors |= dict.fromkeys(group.modules, scale)
        else:
            tensors |= _divided_norm(anatomy, group.norm, scale)
            folded.append(group.norm)
    return Smoothing(anatomy, alpha, tensors, divisors, tuple(folded))


def _smoothed(site: Site, roles: Sequence[str], everywhere: bool) -> bool:
    reachable = site.expert is None or site.role != "mlp.down"
    return site.role in roles and reachable and (everywhere or site.role in READERS)


def _by_module(anatomy: Anatomy) -> dict[str, list[Site]]:
    """The matrices of the layers by the module whose input they read.

    Raises: TiedWeight if one belongs to two modules.
    """
    sites: dict[str, list[Site]] = {}
    owner: dict[int, str] = {}
    for site, address in anatomy.addresses.items():
        if (
            site.layer is None
            or site.role.startswith("norm.")
            or (site.expert is not None and site.role == "mlp.down")
        ):
            continue
        parameter = id(anatomy.model.get_parameter(address.parameter))
        if owner.setdefault(parameter, address.module) != address.module:
            raise TiedWeight(
                f"{address.parameter} is also {owner[parameter]}'s, whose input has scales of its"
                " own; it cannot be smoothed."
            )
        sites.setdefault(address.module, []).append(site)
    return sites


def _input_maxima(anatomy: Anatomy, windows: Tensor, modules: set[str]) -> dict[str, Tensor]:
    """Largest magnitude of each channel, (in,) float32, of what enters each module."""
    maxima: dict[str, Tensor] = {}

    def watcher(name: str) -> Callable[[Tensor], None]:
        def look(x: Tensor) -> None:
            here = x.abs().flatten(0, -2).amax(0).float()
            maxima[name] = torch.maximum(maxima[name], here) if name in maxima else here

        return look

    with Tap() as tap:
        for name in sorted(modules):
            tap.on_input(anatomy.model.get_submodule(name), watcher(name))
        for ids in batches(windows):
            logits_of(anatomy.model, ids)
    return maxima


def _column_maxima(anatomy: Anatomy, sites: Sequence[Site]) -> Tensor:
    return torch.stack([anatomy.view(site).read().abs().amax(0).float() for site in sites]).amax(0)


def _scale(
    inputs: Float[Tensor, " channels"], columns: Float[Tensor, " channels"], alpha: float
) -> Float[Tensor, " channels"]:
    scale = (inputs.pow(alpha) / columns.clamp_min(LEAST).pow(1 - alpha)).clamp_min(LEAST)
    # a dead channel or column tells nothing
    return torch.where((inputs > 0) & (columns > 0), scale, 1.0)


def _groups(anatomy: Anatomy, wanted: set[str], sites: Mapping[str, list[Site]]) -> list[_Group]:
    """The wanted modules, those together that read the output of one norm, with all its other
    readers where it can be folded into.
    """
    # any tokens do, as long as they differ
    ids = torch.arange(PROBE)[None] * 7 % anatomy.view("embed").shape[1]
    norm_of: dict[tuple[int, int], str] = {}
    read: dict[str, tuple[int, int]] = {}
    alive: list[Tensor] = []  # so that no address is used twice

    def key(x: Tensor) -> tuple[int, int]:
        alive.append(x)
        return x.data_ptr(), x.numel()

    def made_by(name: str) -> Callable[[Tensor], None]:
        def note(y: Tensor) -> None:
            norm_of.setdefault(key(y), name)

        return note

    def read_by(name: str) -> Callable[[Tensor], None]:
        def note(x: Tensor) -> None:
            read[name] = key(x)

        return note

    norms = {
        address.module
        for site, address in anatomy.addresses.items()
        if site.role.startswith("norm.") and site.layer is not None
    }
    with Tap() as tap:
        for name in norms:
            tap.on_output(anatomy.model.get_submodule(name), made_by(name))
        for name in sites:
            tap.on_input(anatomy.model.get_submodule(name), read_by(name))
        before = logits_of(anatomy.model, ids)
    together: dict[tuple[int, int], list[str]] = {}
    for name, tensor in read.items():
        together.setdefault(tensor, []).append(name)
    groups = []
    for tensor, modules in together.items():
        mine = tuple(m for m in modules if m in wanted)
        norm = norm_of.get(tensor)
        if mine and norm is not None and _feeds_only(anatomy, sites, norm, modules, ids, before):
            groups.append(_Group(tuple(modules), norm))
        elif mine:
            groups.append(_Group(mine, None))
    return groups


def _feeds_only(
    anatomy: Anatomy,
    sites: Mapping[str, list[Site]],
    norm: str,
    modules: Sequence[str],
    ids: Tensor,
    before: Tensor,
) -> bool:
    """Whether the model computes the same when the norm's channels are divided by some powers of
    two, and these readers' multiplied.
    """
    width = anatomy.view(sites[modules[0]][0]).shape[1]
    generator = torch.Generator().manual_seed(0)
    scale = (2.0 ** torch.randint(-1, 2, (width,), generator=generator)).to(before.device)
    with swapped(
        anatomy, _multiplied(anatomy, sites, modules, scale) | _divided_norm(anatomy, norm, scale)
    ):
        moved = logits_of(anatomy.model, ids) - before
    return bool(moved.abs().max() <= SAME * before.abs().max())


def _multiplied(
    anatomy: Anatomy, sites: Mapping[str, list[Site]], modules: Sequence[str], scale: Tensor
) -> dict[str, Tensor]:
    """Copies of the modules' matrices with their columns multiplied, by parameter name."""
    copies: dict[str, Tensor] = {}
    for site in (site for module in modules for site in sites[module]):
        address = anatomy.addresses[site]
        if address.parameter not in copies:
            copies[address.parameter] = (
                anatomy.model.get_parameter(address.parameter).detach().clone()
            )
        view = WeightView(site, copies[address.parameter], address.packing)
        view.assign_(view.read().float() * scale)
    return copies


def _divided_norm(anatomy: Anatomy, path: str, scale: Tensor) -> dict[str, Tensor]:
    """Copies of the norm's parameters, by name, that make its output `scale` times smaller."""
    norm = anatomy.model.get_submodule(path)
    weight, bias = (
        p.detach() if isinstance(p := getattr(norm, name, None), Tensor) else None
        for name in ("weight", "bias")
    )
    assert weight is not None  # sites of norms have one
    offset = _offset(norm, weight, bias)
    new = {f"{path}.weight": ((weight.float() + offset) / scale - offset).to(weight.dtype)}
    return new if bias is None else {**new, f"{path}.bias": (bias.float() / scale).to(bias.dtype)}


def _offset(norm: nn.Module, weight: Tensor, bias: Tensor | None) -> float:
    """0 for a norm that multiplies by its weight, 1 for one that multiplies by 1 + weight
    (Gemma's): seen by setting the weight to zero.
    """
    x = torch.linspace(-1, 1, weight.shape[0], dtype=weight.dtype, device=weight.device)[None]
    silent = functional_call(norm, {"weight": torch.zeros_like(weight)}, (x,))
    return (
        0.0
        if torch.equal(silent, torch.zeros_like(x) if bias is None else bias.expand_as(x))
        else 1.0
    )


def _divider(scale: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: (x / scale).to(x.dtype)
