"""Activations rounded to INT8 or INT4 as the model runs, with the super activation held out or not.

    config = ActivationConfig(bits=8, per="tensor", method="holdout")
    with quantized_activations(anatomy, config, critical):
        mean_nll(anatomy.model, windows)

The model computes with what the codes mean ("fake quant"): a hook on each tensor that is rounded
takes it, as it enters or leaves its module, and hands on the rounded one. `places` says which
tensors these are, and where in each the super activation may be; that follows from the critical
entries alone, so nothing is measured before.

Scales are dynamic and symmetric: the largest magnitude of a sequence (per tensor) or of a token is
the outermost of 2^N - 1 levels. "Per tensor" is one scale for each sequence, as if it ran alone, so
that no number depends on how the windows are batched. Hold-out: the super activation is replaced by
the median, all is quantized and dequantized, and its value is put back.
Source: Yu et al. 2024, arXiv:2411.07191, section 4.1: A' = RESTORE(Q^-1(Q(REPLACE(A)))).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..anatomy import Anatomy, Entry, Site
from ..errors import BadInput
from ..settings import check_values, setting
from ..tap import Tap
from .config import ROLES
from .grid import LEAST_BITS, MOST_BITS
from .quantize import by_site

PER = ("tensor", "token")
METHODS = ("naive", "clip", "holdout", "control", "largest")
CLIPS = ("z", "percentile")
TENSORS = ("inputs", "down", "residual")
# what these read came out of the residual stream
READERS = ("attn.q", "attn.k", "attn.v", "mlp.gate", "mlp.up")


@dataclass(frozen=True)
class ActivationConfig:
    """Which activations are rounded, to how many bits, and what is done about their outliers."""

    bits: int = setting(8, "bits of an activation", low=LEAST_BITS, high=MOST_BITS)
    per: str = setting(
        "token", "what shares a scale: all tokens of a sequence, or one token", choices=PER
    )
    method: str = setting(
        "naive",
        "naive; clip; holdout (the super activation is kept out); control (as many entries of other"
        " channels of the same tensors); largest (as many entries of the same tensors, the largest"
        " wherever they are)",
        choices=METHODS,
    )
    clip: str = setting("z", "how clip sets its limits, of what shares a scale", choices=CLIPS)
    clip_value: float | None = setting(None, "z, or percent of the magnitudes kept")
    hold: int = setting(
        1,
        "entries held out of a tensor per sequence, the largest of their channels; 0: all",
        low=0,
    )
    tensors: tuple[str, ...] = setting(
        ("inputs",),
        "inputs of the projections; down, the outputs of mlp.down; residual, the layers' outputs",
        choices=TENSORS,
    )
    roles: tuple[str, ...] = setting(ROLES, "roles of the projections whose inputs are rounded")

    def __post_init__(self) -> None:
        check_values(self)
        if self.method == "clip" and not self.clip_value:
            raise BadInput(
                "clipping activations needs ‹clip_value›: a z-score, or the percentage that is"
                " kept."
            )
        most = 100 if self.clip == "percentile" else inf
        if self.clip_value is not None and not 0 < self.clip_value <= most:
            raise BadInput(
                f"‹clip_value› {self.clip_value:g} cannot be used with {self.clip}; give a z above"
                " 0, or a percentage up to 100."
            )
        if self.method == "largest" and self.hold == 0:
            raise BadInput("‹hold› 0, all entries, cannot be held out with largest; use 1 or more.")


@dataclass(frozen=True)
class Place:
    """One tensor that is rounded: what enters the module, or what leaves it.

    site: of the projection that it enters or leaves; None for what leaves the layer. channels:
    where the super activation may be, none if nowhere.
    """

    layer: int
    site: Site | None
    tensor: str
    module: str
    channels: tuple[int, ...]

    @property
    def label(self) -> str:
        """The site, or `L2.residual` for what leaves a layer."""
        return f"L{self.layer}.residual" if self.site is None else str(self.site)

    @property
    def after_norm(self) -> bool:
        """Whether it came out of the residual stream, through a norm in most architectures."""
        return self.tensor == "inputs" and self.site is not None and self.site.role in READERS


def places(
    anatomy: Anatomy, config: ActivationConfig, critical: Sequence[Entry] = ()
) -> list[Place]:
    """The tensors that `config` rounds, in the order of the model, and where in them the super
    activation is.

    In what enters the `mlp.down` of a critical entry: the neurons that are the entry's columns. In
    its output, in the residual stream from there on, and in what later layers read from it: the
    channels that are the entry's rows. The other tensors have none. What enters the `mlp.down` of
    fused experts is out of reach of hooks and stays as it is.
    Raises: UnknownSite; BadInput if the model has none of the roles, or for an entry outside its
    matrix.
    """
    entries = [entry for group in by_site(anatomy, critical).values() for entry in group]
    by_module: dict[str, Site] = {}
    for site, address in anatomy.addresses.items():
        if site.role in config.roles and (site.expert is None or site.role != "mlp.down"):
            by_module.setdefault(address.module, Site(site.layer, site.role))
    if not by_module:
        raise BadInput(
            f"this model has no projection of role {', '.join(config.roles)} whose input can be"
            " reached."
        )
    in_downs = [e for e in entries if e.site.role == "mlp.down"]

    def rows(layers: range) -> tuple[int, ...]:
        return _sorted(e.row for e in in_downs if (e.site.layer or 0) in layers)

    def cols(layer: int) -> tuple[int, ...]:
        return _sorted(e.col for e in in_downs if e.site.layer == layer)

    rounded: list[Place] = []
    for module, site in by_module.items():
        layer, is_down = site.layer or 0, site.role == "mlp.down"
        if "inputs" in config.tensors:
            read = rows(range(layer)) if site.role in READERS else ()
            channels = cols(layer) if is_down else read
            rounded.append(Place(layer, site, "inputs", module, channels))
        if "down" in config.tensors and is_down:
            rounded.append(Place(layer, site, "down", module, rows(range(layer, layer + 1))))
    if "residual" in config.tensors:
        for layer in range(len(anatomy.layers)):
            module = f"{anatomy.layers_path}.{layer}"
            rounded.append(Place(layer, None, "residual", module, rows(range(layer + 1))))
    return sorted(rounded, key=lambda place: place.layer)


def _sorted(channels: Iterable[int]) -> tuple[int, ...]:
    return tuple(sorted(set(channels)))


@contextmanager
def quantized_activations(
    anatomy: Anatomy,
    config: ActivationConfig,
    critical: Sequence[Entry] = (),
    only: Callable[[Place], bool] = lambda _: True,
    watch: Callable[[Place, Tensor, Tensor, Tensor], None] | None = None,
) -> Iterator[list[Place]]:
    """Within the context every pass rounds the tensors of `places`; no weight is touched, and
    afterwards nothing is left.

    only: which of them. watch: called with each place, its tensor before and after, and the mask of
    held entries, each of shape (batch, pos, channels).
    Raises: as `places`.
    """
    chosen = [place for place in places(anatomy, config, critical) if only(place)]
    sequences = [1]  # of the running pass: some architectures hand on (batch * pos, channels)
    # q, k and v read one tensor, which is rounded once
    latest: list[tuple[Tensor, tuple[int, ...], Tensor, Tensor]] = []

    def count(ids: Tensor) -> None:
        sequences[0] = ids.shape[0]

    def watcher(place: Place) -> Callable[[Tensor], Tensor]:
        def rounded(x: Tensor) -> Tensor:
            states = x.reshape(sequences[0], -1, x.shape[-1])
            if latest and latest[0][0] is x and latest[0][1] == place.channels:
                new, held = latest[0][2:]
            else:
                held = held_entries(states, _channels(place, config, x.shape[-1]), config.hold)
                new = quantize_activation(states, config, held)
                latest[:] = [(x, place.channels, new, held)]
            if watch is not None:
                watch(place, states, new, held)
            return new.reshape(x.shape)

        return rounded

    with Tap() as tap:
        tap.on_input(anatomy.module(Site(None, "embed")), count)
        for place in chosen:
            module = anatomy.model.get_submodule(place.module)
            (tap.on_input if place.tensor == "inputs" else tap.on_output)(module, watcher(place))
        yield chosen


def _channels(place: Place, config: ActivationConfig, width: int) -> list[int]:
    """Where entries are held out; for the control as many other channels, from half the width away
    on.
    """
    if config.method == "holdout":
        return list(place.channels)
    if config.method == "largest":
        return list(range(width)) if place.channels else []
    if config.method != "control":
        return []
    taken, others = set(place.channels), []
    for channel in place.channels:
        moved = next(
            (c for i in range(width) if (c := (channel + width // 2 + i) % width) not in taken),
            None,
        )
        if moved is not None:
            taken.add(moved)
            others.append(moved)
    return others


def held_entries(
    x: Float[Tensor, "batch pos channels"], channels: Sequence[int], hold: int
) -> Bool[Tensor, "batch pos channels"]:
    """The `hold` largest magnitudes of each sequence in these channels, or all of them if `hold` is
    0.
    """
    mask = torch.zeros_like(x, dtype=torch.bool)
    if not channels:
        return mask
    at = torch.tensor(list(channels), device=x.device)
    if hold == 0:
        mask[..., at] = True
        return mask
    sizes = x[..., at].abs().flatten(1)
    largest = sizes.topk(min(hold, sizes.shape[1]), 1).indices
    chosen = torch.zeros_like(sizes, dtype=torch.bool).scatter_(1, largest, True)
    mask[..., at] = chosen.view(x.shape[0], x.shape[1], -1)
    return mask


@torch.no_grad()
def quantize_activation(
    x: Float[Tensor, "batch pos channels"],
    config: ActivationConfig,
    held: Bool[Tensor, "batch pos channels"] | None = None,
) -> Float[Tensor, "batch pos channels"]:
    """The states as their codes mean, in their own dtype; computed in float32.

    held: entries that are replaced by the median of what shares their scale before, and put back
    after.
    """
    shape = (x.shape[0], -1) if config.per == "tensor" else (x.shape[0] * x.shape[1], -1)
    groups = x.float().reshape(shape)
    if held is not None and bool(held.any()):
        groups = torch.where(held.reshape(shape), groups.median(1, keepdim=True).values, groups)
    if config.method == "clip":
        low, high = _limits(groups, config)
        groups = torch.minimum(torch.maximum(groups, low), high)
    last = 2 ** (config.bits - 1) - 1  # symmetric: the code -2^(N-1) is not used
    scale = groups.abs().amax(1, keepdim=True) / last
    scale = torch.where(scale > 0, scale, 1.0)  # of zeros
    result = ((groups / scale).round().clamp(-last, last) * scale).to(x.dtype).view(x.shape)
    return result if held is None else torch.where(held, x, result)


def _limits(groups: Tensor, config: ActivationConfig) -> tuple[Tensor, Tensor]:
    """Limits (n, 1) of each group (n, entries)."""
    value = config.clip_value or 0.0
    if config.clip == "z":
        mean, sd = groups.mean(1, keepdim=True), groups.std(1, keepdim=True, correction=0)
        return mean - value * sd, mean + value * sd
    kept = max(1, round(groups.shape[1] * value / 100))
    high = groups.abs().kthvalue(kept, 1, keepdim=True).values
    return -high, high
