"""A model larger than memory: the embedding and the norms are there, every other part is read when
it runs and dropped after it.

How this works. The model is an ordinary transformers model, built from its configuration on the
meta device. Each decoder layer, and the output head where it is not the embedding, is a part: its
`forward` is replaced by one that puts the part's weights in their slots, runs, and puts the empty
parameters back. So everything that only runs the model works on it unchanged, at the price of
reading the checkpoint once for every forward pass. `holding` keeps a part in memory for a block,
so that several passes over one layer read it once; it counts, since blocks can be nested.

A weight that is read anew for every pass cannot be changed in place. `zeroed` therefore keeps a
list of regions and zeroes them in whatever is held and whatever is read; any other write is
refused, by a view that is a copy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from ..errors import PackedWeight, Refused, UnknownArchitecture
from .anatomy import Anatomy
from .folder import Shards
from .hub import open_shards
from .load import (
    DTYPES,
    Loaded,
    check_dtype,
    device_named,
    lacking,
    load_tokenizer,
    read_config,
    unloaded,
)
from .names import TensorNames
from .site import Region, Site
from .table import TABLE, Layout
from .view import WeightView


def open_stream(
    name: str, dtype: str = "auto", device: str = "auto", whole: bool = True
) -> tuple[Loaded, StreamedAnatomy]:
    """Open MODEL (`patient`, a folder, or a Hub id) without reading its layers.

    The fingerprint is the anatomy's to tell, see there for `whole`, and "" here. On the Hub only
    the bytes that are read are fetched.
    Raises: BadInput, BadCheckpoint; UnknownArchitecture outside the table of architectures,
    PackedWeight for quantized weights.
    """
    check_dtype(dtype)
    where = device_named(device)
    shards = open_shards(name)
    config = read_config(shards.folder)
    kind = config.get_text_config().model_type
    if kind not in TABLE:
        raise UnknownArchitecture(
            f"{name} is a {kind} model, which is not in Surgeon's table of architectures, and only"
            " those can be streamed; find reads it without ‹stream›, if it fits into memory."
        )
    if getattr(config, "quantization_config", None) is not None:
        raise PackedWeight(
            f"{name} is quantized, and only plain weights can be streamed; give the model it was"
            " made from."
        )
    number = DTYPES.get(dtype) or getattr(config, "dtype", None) or shards.dtype()
    model = _skeleton(name, config, number, where)
    anatomy = StreamedAnatomy(model, TABLE[kind], shards, where, whole)
    return Loaded(model, load_tokenizer(shards.folder), name, shards.folder, ""), anatomy


class StreamedAnatomy(Anatomy):
    """The map of a streamed model. `view` gives the weights of a part that is held, else a copy
    from the checkpoint to read.

    model: on the meta device, but for its buffers. whole: whether it may have a fingerprint, which
    takes every byte of a local folder. tell: called with (part, of how many) before a part is read.
    Raises: BadCheckpoint if the shards lack a weight of it.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: Layout,
        shards: Shards,
        device: torch.device,
        whole: bool = True,
    ) -> None:
        super().__init__(model, layout, "table")
        self.shards, self.device, self.whole = shards, device, whole
        self.names = TensorNames(self, shards.stored)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        if wrong := sorted(n for n, p in parameters.items() if not self._stored(n, p)):
            raise lacking(shards.name, wrong)
        self._parts = [f"{self.layers_path}.{i}" for i in range(len(self.layers))]
        head = self.addresses.get(Site(None, "unembed"))
        if head is not None and not self.tied_to(Site(None, "unembed")):
            self._parts.append(head.module)
        self._empty = {part: self._slots_of(part, parameters) for part in self._parts}
        self.tell: Callable[[int, int], None] | None = None
        self._held: Counter[str] = Counter()
        self._zeroed: list[Region] = []
        self._last: WeightView | None = None
        within = {name for slots in self._empty.values() for name, *_ in slots}
        self._load_outside({n: p for n, p in parameters.items() if n not in within})
        for part in self._parts:
            self._stream(part)

    @property
    def depth(self) -> int:
        return len(self.layers)

    def fingerprint(self) -> str | None:
        """Of the checkpoint; None unless `whole`. What was read through is not read again."""
        return self.shards.fingerprint() if self.whole else None

    @contextmanager
    def holding(self, layer: int | None) -> Iterator[None]:
        """Within the block the weights of one layer (None: of the output head) are in memory, read
        once. Can be nested.
        """
        part = (
            self._parts[layer]
            if layer is not None
            else self._parts[-1]
            if len(self._parts) > self.depth
            else None
        )
        if part is None:  # the head is the embedding, which is always there
            yield
            return
        with self._holding(part):
            yield

    @contextmanager
    def zeroed(self, regions: Sequence[Region]) -> Iterator[None]:
        """Within the block all of `regions` are zero, in the layers that are held and in those that
        are read. Can be nested.
        """
        before, self._last = self._zeroed, None
        self._zeroed = [*before, *regions]
        undo = [
            (view, rows, cols, view.get(rows, cols)) for view, rows, cols in self._live(regions)
        ]
        try:
            for view, rows, cols, old in undo:
                view.set_(rows, cols, torch.full_like(old, self.stored_zero(view.site)))
            yield
        finally:
            for view, rows, cols, old in reversed(undo):
                view.set_(rows, cols, old)
            self._zeroed, self._last = before, None

    def view(self, site: Site | str) -> WeightView:
        """The site's weight as (out, in): that of the model where it is held, else a copy that
        refuses to be written.
        """
        site = self.resolve(site)
        address = self.addresses[site]
        live = self.model.get_parameter(address.parameter)
        if not live.is_meta:
            return WeightView(site, live, address.packing)
        if self._last is None or self._last.site != site:
            name, packing = self.names.find(site)
            stored = self.shards.read_plain(name).to(self.device, live.dtype)
            for rows, cols in _places(
                [r for r in self._zeroed if r.site == site], WeightView(site, stored, packing)
            ):
                zeros = torch.full((len(rows),), self.stored_zero(site))
                WeightView(site, stored, packing).set_(rows, cols, zeros)
            self._last = _Copy(site, stored, packing)
        return self._last

    # -- reading and dropping ------------------------------------------------------------------

    @contextmanager
    def _holding(self, part: str) -> Iterator[None]:
        if not self._held[part]:
            self._load_(part)
        self._held[part] += 1
        try:
            yield
        finally:
            self._held[part] -= 1
            if not self._held[part]:
                self._drop_(part)

    def _load_(self, part: str) -> None:
        self._last = None  # what `view` read last; the part itself is in memory from now on
        if self.tell:
            self.tell(self._parts.index(part) + 1, len(self._parts))
        try:
            for name, owner, leaf, empty in self._empty[part]:
                owner._parameters[leaf] = nn.Parameter(self._read(name, empty), requires_grad=False)
            mine = [
                r
                for r in self._zeroed
                if self.addresses[r.site].parameter in {name for name, *_ in self._empty[part]}
            ]
            for view, rows, cols in self._live(mine):
                view.set_(rows, cols, torch.full((len(rows),), self.stored_zero(view.site)))
        except BaseException:
            self._drop_(part)
            raise

    def _drop_(self, part: str) -> None:
        for _, owner, leaf, empty in self._empty[part]:
            owner._parameters[leaf] = empty

    def _read(self, parameter: str, like: Tensor) -> Tensor:
        slots = self.names.slots(parameter)
        if slots[0][1] == ():
            return self.shards.read_plain(slots[0][0]).to(self.device, like.dtype)
        stacked = torch.empty(like.shape, dtype=like.dtype, device=self.device)
        for name, at in slots:
            stacked[at] = self.shards.read_plain(name).to(self.device, like.dtype)
        return stacked

    def _live(self, regions: Sequence[Region]) -> list[tuple[WeightView, Tensor, Tensor]]:
        """Those of `regions` that lie in weights in memory, one triple a site: (view, rows,
        cols).
        """
        live: list[tuple[WeightView, Tensor, Tensor]] = []
        for site in dict.fromkeys(r.site for r in regions):
            address = self.addresses[self.resolve(site)]
            weight = self.model.get_parameter(address.parameter)
            if weight.is_meta:
                continue
            view = WeightView(site, weight, address.packing)
            here = [r for r in regions if r.site == site]
            live += [(view, rows, cols) for rows, cols in _places(here, view)]
        return live

    # -- building ------------------------------------------------------------------------------

    def _stored(self, name: str, parameter: Tensor) -> bool:
        """Whether the checkpoint holds a parameter of the model, in its shape."""
        slots = self.names.slots(name)
        shapes = [self.shards.stored[n].shape for n, _ in slots]
        if len(slots) == 1 and slots[0][1] == ():
            return shapes[0] == tuple(parameter.shape)
        return bool(slots) and all(
            shape == tuple(torch.empty(parameter.shape, device="meta")[at].shape)
            for (_, at), shape in zip(slots, shapes, strict=True)
        )

    def _slots_of(
        self, part: str, parameters: dict[str, nn.Parameter]
    ) -> list[tuple[str, nn.Module, str, nn.Parameter]]:
        """The parameters of a part: name, owner, name within the owner, and what stands there while
        the part is not held.
        """
        slots = []
        for name, empty in parameters.items():
            if name.startswith(f"{part}."):
                owner, _, leaf = name.rpartition(".")
                slots.append((name, self.model.get_submodule(owner), leaf, empty))
        return slots

    def _load_outside(self, parameters: dict[str, nn.Parameter]) -> None:
        """Read what is outside the streamed parts; a tied weight once, for all its names."""
        read: dict[int, nn.Parameter] = {}
        for name, empty in parameters.items():
            if id(empty) not in read:
                read[id(empty)] = nn.Parameter(self._read(name, empty), requires_grad=False)
            owner, _, leaf = name.rpartition(".")
            self.model.get_submodule(owner)._parameters[leaf] = read[id(empty)]
        for name in dict(self.model.named_buffers()):
            if name in self.names.whole and name in self.model.state_dict():
                self.model.get_buffer(name).copy_(self.shards.read_plain(self.names.whole[name]))

    def _stream(self, part: str) -> None:
        """Let a module read its weights when it is called, unless they are held already."""
        module = self.model.get_submodule(part)
        forward: Callable[..., Any] = module.forward

        def run(*args: Any, **kwargs: Any) -> Any:
            with self._holding(part):
                return forward(*args, **kwargs)

        # on the instance: what nn.Module does around `forward`, hooks above all, stays as it is
        module.__dict__["forward"] = run


class _Copy(WeightView):
    """A weight read from the checkpoint: a change of it would reach no model."""

    def set_(self, rows: Tensor, cols: Tensor, values: Tensor) -> None:
        raise Refused(
            f"{self.site} belongs to a streamed model, whose weights are read anew for every pass;"
            " load the model to change it."
        )

    def assign_(self, matrix: Tensor) -> None:
        self.set_(matrix, matrix, matrix)


def _places(regions: Sequence[Region], view: WeightView) -> list[tuple[Tensor, Tensor]]:
    """Rows and columns (n,) of every entry of `regions`, all of one site, as one pair; nothing for
    no region.
    """
    both = [r.rows_cols(view.shape) for r in regions]
    rows, cols = ([i for pair in both for i in pair[axis]] for axis in (0, 1))
    return [(torch.tensor(rows), torch.tensor(cols))] if rows else []


def _skeleton(
    name: str, config: Any, dtype: torch.dtype, device: torch.device
) -> transformers.PreTrainedModel:
    """The model without its weights: parameters on the meta device, buffers real."""
    model = unloaded(name, config, dtype)
    model.eval()  # type: ignore[no-untyped-call]
    model.requires_grad_(False)
    # some architectures keep parts, like a router, in float32 whatever the dtype
    plan = model._get_dtype_plan(dtype)
    for path, parameter in model.named_parameters():
        wanted = next((d for part, d in plan.items() if part in path.split(".")), None)
        if wanted is not None:
            parameter.data = parameter.data.to(wanted)
    # transformers computes the buffers that no checkpoint holds (rotary frequencies, masks)
    # where it initialises weights
    for module in model.modules():
        if module._buffers:
            module._buffers = {
                n: b if b is None else torch.empty_like(b, device=device)
                for n, b in module._buffers.items()
            }
            model._init_weights(module)  # type: ignore[no-untyped-call]
    return model
