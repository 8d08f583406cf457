"""The map of one model: its layers, its sites, their orientation and sizes."""

# How this works.
#
# A `Layout` says where an architecture keeps its parts. It comes from the table of known ones, by
# `config.model_type`; else it is read off a running model (structure.py). Walking the model with
# the layout gives each site its address: the parameter that stores it, the module that owns the
# parameter, and the packing, which tells how the matrix lies in it. A role that a layer does not
# have is left out, so one layout serves layers of several kinds, as in a mixture of experts with
# some dense layers; a layer without any `mlp.down` is an error.
#
# A map can be wrong in ways that shapes cannot show (a square matrix taken for its transpose).
# Commands therefore prove it by experiment before they use it (probe.py).

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import BadInput, UnknownArchitecture, UnknownSite
from .site import Region, Site
from .structure import layout_by_structure, module_lists
from .table import TABLE, Layout
from .view import Packing, Rows, WeightView


@dataclass(frozen=True)
class Address:
    """Where a site lives: the parameter's full name, its module's path, and how it is packed."""

    parameter: str
    module: str
    packing: Packing


class Anatomy:
    """Every addressable site of `model`; built with `Anatomy.of(model)`.

    layout: where this architecture keeps its parts. source: how the layout was found, "table",
    "structure" or "user".
    """

    def __init__(self, model: nn.Module, layout: Layout, source: str) -> None:
        self.model = model
        self.layout = layout
        self.source = source
        self.config = text_config(model)
        self.layers_path = _find_layers(model, layout, self.config)
        self.addresses: dict[Site, Address] = dict(self._walk())
        self.addresses |= dict(self._walk_norms_outside())

    @classmethod
    def of(cls, model: nn.Module, layout: Layout | None = None) -> Anatomy:
        """Find the sites of `model`: by `layout`, else by the table, else by structure.

        Raises: UnknownArchitecture, which lists what the model has instead.

        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(
        ...     vocab_size=9,
        ...     hidden_size=8,
        ...     intermediate_size=12,
        ...     num_hidden_layers=2,
        ...     num_attention_heads=2,
        ... )
        >>> anatomy = Anatomy.of(LlamaForCausalLM(config))
        >>> anatomy.source, anatomy.d_model
        ('table', 8)
        >>> anatomy.view("L1.mlp.down").shape
        (8, 12)
        """
        if layout is not None:
            return cls(model, layout, "user")
        known = TABLE.get(getattr(text_config(model), "model_type", ""))
        if known is not None:
            return cls(model, known, "table")
        return cls(
            model,
            layout_by_structure(model, getattr(text_config(model), "num_hidden_layers", None)),
            "structure",
        )

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder layers, from the first to the last."""
        layers: Any = self.model.get_submodule(self.layers_path)
        return list(layers)

    @property
    def d_model(self) -> int:
        downs = self.downs()
        return self.view(downs[0]).shape[0]

    def downs(self, layer: int | None = None) -> list[Site]:
        """The `mlp.down` sites, of one layer or of all, experts included, in order."""
        return [
            s
            for s in self.addresses
            if s.role == "mlp.down" and (layer is None or s.layer == layer)
        ]

    def has_experts(self, layer: int) -> bool:
        """Whether the MLP of that layer is a mixture of experts."""
        return any(s.expert is not None for s in self.downs(layer))

    def module(self, site: Site) -> nn.Module:
        """The module that owns the site's parameter; of a fused expert, that of all experts."""
        return self.model.get_submodule(self.addresses[self.resolve(site)].module)

    def resolve(self, site: Site | str) -> Site:
        """The site of that name. Raises: UnknownSite with the nearest names, if there is none."""
        wanted = Site.parse(site) if isinstance(site, str) else site
        if wanted in self.addresses:
            return wanted
        n = len(self.layers)
        if wanted.layer is not None and wanted.layer >= n:
            raise UnknownSite(
                f"{wanted} does not exist: this model has {n} layers, L0 to L{n - 1}."
            )
        names = [str(s) for s in self.addresses]
        near = difflib.get_close_matches(str(wanted), names, n=4, cutoff=0.3) or names[:4]
        raise UnknownSite(
            f"{wanted} does not exist in this model; the nearest sites are {', '.join(near)}."
            " `surgeon sites` lists all."
        )

    def region(self, text: str) -> Region:
        """Parse the address of an entry, row, column or matrix, and check it against this model.

        Raises: BadInput if it has no such form or lies outside the matrix; UnknownSite.
        """
        region = Region.parse(text)
        self.resolve(region.site)
        region.rows_cols(self.view(region.site).shape)
        return region

    def view(self, site: Site | str) -> WeightView:
        """The site's weight as (out, in), sharing memory with the model. Raises: UnknownSite."""
        site = self.resolve(site)
        address = self.addresses[site]
        return WeightView(site, self.model.get_parameter(address.parameter), address.packing)

    def holding(self, layer: int | None) -> AbstractContextManager[None]:
        """Within the block the weights of that layer (None: of the output head) are in memory.

        Here they always are; a streamed model reads them from disk for the block.
        """
        return nullcontext()

    def tied_to(self, site: Site) -> list[Site]:
        """Other sites that share the stored tensor entry for entry (embed and unembed, mostly)."""
        mine = self.addresses[self.resolve(site)]
        stored = self.model.get_parameter(mine.parameter)
        return [
            other
            for other, address in self.addresses.items()
            if other != site
            and address.module != mine.module
            and self.model.get_parameter(address.parameter) is stored
        ]

    def first_changed(self, sites: Iterable[Site]) -> int:
        """The lowest layer whose states a change of these weights may alter; the number of layers
        where only what follows them may.
        """
        return min(self._first_changed(site) for site in sites)

    def _first_changed(self, site: Site) -> int:
        if site.layer is not None:
            return site.layer
        after = site.role == "unembed" or site.role.split(".")[0] == "final_norm"
        return len(self.layers) if after and not self.tied_to(site) else 0

    def stored_zero(self, site: Site) -> float:
        """The stored number at which a weight takes no part: -1 where a norm stores its scale less
        one, as Gemma's do, and 0 for everything else.

        It is read off the norm by experiment. Raises: UnknownArchitecture for a norm that is
        proportional neither to what it stores nor to that plus one.
        """
        address, module = self.addresses[self.resolve(site)], self.module(site)
        is_norm = "norm" in type(module).__name__.lower()
        if not is_norm or not address.parameter.endswith(".weight"):
            return 0.0
        width = self.model.get_parameter(address.parameter).shape
        x = torch.linspace(-1.0, 2.0, width.numel()).expand(1, 1, *width)
        bias = {} if getattr(module, "bias", None) is None else {"bias": torch.zeros(width)}

        def called(stored: float) -> Tensor:
            weights = {"weight": torch.full(width, stored), **bias}
            y: Tensor = torch.func.functional_call(module, weights, (x,))
            return y

        with torch.no_grad():
            at_zero, at_one = called(0.0), called(1.0)
        if torch.allclose(at_zero, torch.zeros_like(at_zero)):
            return 0.0
        if torch.allclose(at_one, 2 * at_zero, rtol=1e-4):
            return -1.0
        raise UnknownArchitecture(
            f"{site} is no plain norm: its output is proportional neither to what is stored nor to"
            " that plus one, so there is no number that takes a scale out."
        )

    # -- how the map is drawn ------------------------------------------------------------------

    def _walk(self) -> Iterator[tuple[Site, Address]]:
        model = self.model
        for role, module in (
            ("embed", _call(model, "get_input_embeddings")),
            ("unembed", _call(model, "get_output_embeddings")),
        ):
            if module is not None and getattr(module, "weight", None) is not None:
                path = _path_of(model, module)
                # an embedding is stored (token, channel), so it is (in, out); an output head is
                # an ordinary Linear
                yield (
                    Site(None, role),
                    Address(f"{path}.weight", path, Packing(transposed=role == "embed")),
                )
        for index, layer in enumerate(self.layers):
            yield from self._walk_layer(index, layer)
        final = self._final_norm()
        if final is not None:
            yield from _norm_sites(None, "final_norm", final, self.model.get_submodule(final))

    def _walk_norms_outside(self) -> Iterator[tuple[Site, Address]]:
        """The norms that act on the residual stream before the layers or beside them, under their
        full names.
        """
        # of the model as it is built: a streamed one cannot be read yet
        width = Anatomy.view(self, self.downs()[0]).shape[0]
        known = {address.module for address in self.addresses.values()}
        for path, module in self.model.named_modules():
            weight = getattr(module, "weight", None)
            if (
                "norm" in type(module).__name__.lower()
                and path not in known
                and not path.startswith(f"{self.layers_path}.")
                and isinstance(weight, Tensor)
                and weight.shape == (width,)
            ):
                yield from _norm_sites(None, f"norm.{path}", path, module)

    def _walk_layer(self, index: int, layer: nn.Module) -> Iterator[tuple[Site, Address]]:
        has_down = False
        prefix = f"{self.layers_path}.{index}"
        for role, location in self.layout.roles.items():
            path, _, part = location.partition("/")
            module = _submodule(layer, path)
            weight = getattr(module, "weight", None)
            if not isinstance(weight, Tensor) or weight.dim() != 2:
                continue
            transposed = isinstance(module, Conv1D) or path in self.layout.transposed
            rows = _rows(part, weight.shape[1 if transposed else 0], self.config)
            has_down = has_down or role == "mlp.down"
            yield (
                Site(index, role),
                Address(
                    f"{prefix}.{path}.weight", f"{prefix}.{path}", Packing(None, transposed, rows)
                ),
            )
        for role, location in (self.layout.experts or {}).items():
            path, _, part = location.partition("/")
            owner, _, name = path.rpartition(".")
            module = _submodule(layer, owner)
            fused = getattr(module, name, None)
            if not isinstance(fused, Tensor) or fused.dim() != 3:
                continue
            transposed = self.layout.expert_orientation == "in_out"
            rows = _rows(part, fused.shape[2 if transposed else 1], self.config)
            has_down = has_down or role == "mlp.down"
            for expert in range(fused.shape[0]):
                yield (
                    Site(index, role, expert),
                    Address(
                        f"{prefix}.{path}", f"{prefix}.{owner}", Packing(expert, transposed, rows)
                    ),
                )
        if not has_down:
            raise UnknownArchitecture(
                f"layer {index} of this {type(self.model).__name__} has no MLP output projection"
                " where the layout says"
                f" ({self.layout.roles.get('mlp.down') or self.layout.experts}); its modules are"
                f" {_names(layer)}. Pass a Layout of your own to Anatomy.of."
            )
        for name, module in layer.named_modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and weight.dim() == 1:
                yield from _norm_sites(index, f"norm.{name}", f"{prefix}.{name}", module)

    def _final_norm(self) -> str | None:
        parent = self.layers_path.rpartition(".")[0]
        if self.layout.final_norm is None:
            return None
        name = self.layout.final_norm.rpartition(".")[2]
        path = f"{parent}.{name}" if parent else name
        return path if getattr(_submodule(self.model, path), "weight", None) is not None else None


def _norm_sites(
    layer: int | None, role: str, path: str, module: nn.Module
) -> Iterator[tuple[Site, Address]]:
    """The scale of a norm, and the bias where it has one, each as a matrix of one column."""
    for kind, name in (("", "weight"), (".bias", "bias")):
        if getattr(module, name, None) is not None:
            yield Site(layer, f"{role}{kind}"), Address(f"{path}.{name}", path, Packing())


def text_config(model: nn.Module) -> Any:
    """The configuration of the language model, also where a multimodal one nests it.

    None for a plain module.
    """
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _find_layers(model: nn.Module, layout: Layout, config: Any) -> str:
    """The path of the ModuleList of decoder layers.

    It is the one written in the layout, or the only one of that length that ends in the same name:
    a model without a head, or one inside a multimodal model, has another prefix.
    """
    lists = module_lists(model)
    if layout.layers in lists:
        return layout.layers
    count = getattr(config, "num_hidden_layers", None)
    last = layout.layers.rpartition(".")[2]
    close = [p for p, m in lists.items() if p.rpartition(".")[2] == last and len(m) == count]
    if len(close) == 1:
        return close[0]
    raise UnknownArchitecture(
        f"no list of {count} layers named {layout.layers!r} in this {type(model).__name__}; its"
        f" module lists are {', '.join(lists) or 'none'}. Pass a Layout of your own to Anatomy.of."
    )


def _rows(part: str, n_out: int, config: Any) -> Rows:
    """Which of `n_out` stored output channels a part of a fused weight means, see table.py."""
    kind, _, number = part.partition(":")
    if not kind:
        return None
    if kind in ("even", "odd"):
        return slice(0 if kind == "even" else 1, None, 2)
    index = int(number)
    if kind == "gate_up":
        half = n_out // 2
        return slice(index * half, (index + 1) * half)
    heads = config.num_attention_heads
    if kind == "qkv":
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        d_head = n_out // (heads + 2 * kv_heads)
        bounds = [0, heads * d_head, (heads + kv_heads) * d_head, n_out]
        return slice(bounds[index], bounds[index + 1])
    if kind == "groups":
        groups = _kv_groups(config, heads)
        queries = heads // groups
        d_head = n_out // (heads + 2 * groups)
        # each group is laid out as its queries, one key, one value
        channels = torch.arange(n_out).view(groups, queries + 2, d_head)
        return (channels[:, :queries], channels[:, queries], channels[:, queries + 1])[
            index
        ].reshape(-1)
    raise BadInput(
        f"{part!r} is not a part of a fused weight; use gate_up:0-1, even, odd, qkv:0-2 or"
        " groups:0-2."
    )


def _kv_groups(config: Any, heads: int) -> int:
    """How many groups of heads share a key and a value, where q, k and v are interleaved."""
    if getattr(config, "new_decoder_architecture", False):  # falcon 40B and later
        return int(config.num_kv_heads)
    return 1 if getattr(config, "multi_query", False) else heads


def _submodule(root: nn.Module, path: str) -> nn.Module | None:
    try:
        return root.get_submodule(path)
    except AttributeError:
        return None


def _call(model: nn.Module, method: str) -> nn.Module | None:
    """The part of the model that the method gives; None where it has none."""
    try:
        return getattr(model, method)() if hasattr(model, method) else None
    except NotImplementedError:  # what transformers raises here of a model without such a part
        return None


def _path_of(model: nn.Module, wanted: nn.Module) -> str:
    return str(next(name for name, module in model.named_modules() if module is wanted))


def _names(layer: nn.Module) -> str:
    return ", ".join(
        name for name, module in layer.named_modules() if name and not list(module.children())
    )
