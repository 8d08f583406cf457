"""The first-order map: what the loss of any weight would cost, estimated from one backward pass."""

# How this works.
#
# Zeroing a weight w changes the loss by about -w g, where g is its gradient. One backward pass
# gives g of every weight at once, and the sum of -w g over a row or a column is the estimate for
# the whole line. The pass never holds more than one parameter's gradient: as soon as a gradient is
# complete it is turned into estimates, the largest are kept, and it is dropped.
#
# The estimate ranks well and measures badly. Where the loss bends before w reaches zero, as it does
# for the weights that matter most, it is too small by a factor of two to twenty, and sometimes has
# the wrong sign. So what it names by size, whatever the sign, has to be measured.
#
# Source: first-order saliency as in Molchanov et al. 2017, arXiv:1611.06440, eq. 7.

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from ..anatomy import Anatomy, Packing, Region, Site, WeightView
from ..measure.likelihood import logits_of, require_causal
from ..result import record

KINDS = ("scale", "entry", "row", "column")  # scale: an entry of a norm's weight or bias
EACH_SITE = 8  # the most of one kind that one matrix gives


@record
class Estimate:
    """What zeroing a region would cost in nats per token, to first order."""

    part: Region
    kind: str
    nats: float


def first_order(anatomy: Anatomy, windows: Int64[Tensor, "n window"], most: int) -> list[Estimate]:
    """The `most` largest estimates of each kind, by size, over all sites of the model.

    All windows go through the model at once, forward and back. The model, and gradients that it
    holds already, are as before afterwards.
    Raises: BadInput for a model that does not predict the next token.
    """
    require_causal(anatomy.model)
    estimates: dict[str, list[Estimate]] = defaultdict(list)

    def keep(places: Sequence[tuple[Site, Packing]], product: Tensor) -> None:
        for site, packing in places:
            for one in _largest(site, WeightView(site, product, packing).read()):
                estimates[one.kind].append(one)

    with _gradients(anatomy, keep):
        logits = logits_of(anatomy.model, windows)[:, :-1].float()
        targets = windows[:, 1:].to(logits.device)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()  # type: ignore[no-untyped-call]
    return [
        one
        for kind in KINDS
        for one in heapq.nlargest(most, estimates[kind], key=lambda e: abs(e.nats))
    ]


def _largest(site: Site, product: Float[Tensor, "out in"]) -> Iterator[Estimate]:
    """The largest estimates of each kind within one matrix. product: -w g."""
    n_out, n_in = product.shape
    flat = product.flatten()
    for index in flat.abs().topk(min(EACH_SITE, len(flat))).indices.tolist():
        part = Region(site, index // n_in, index % n_in)
        yield Estimate(part, "scale" if n_in == 1 else "entry", float(flat[index]))
    if n_in == 1:
        return
    rows, columns = product.sum(1), product.sum(0)
    for row in rows.abs().topk(min(EACH_SITE, n_out)).indices.tolist():
        yield Estimate(Region(site, row, None), "row", float(rows[row]))
    for column in columns.abs().topk(min(EACH_SITE, n_in)).indices.tolist():
        yield Estimate(Region(site, None, column), "column", float(columns[column]))


@contextmanager
def _gradients(anatomy: Anatomy, keep: Callable[..., None]) -> Iterator[None]:
    """Within the block a backward pass hands -w g of every parameter that holds sites to `keep`,
    and leaves no gradient behind.
    """
    places: dict[str, list[tuple[Site, Packing]]] = defaultdict(list)
    for site, address in anatomy.addresses.items():
        places[address.parameter].append((site, address.packing))
    # a tied parameter has several names, and is one tensor with one gradient
    parameters = {
        id(p): (name, p) for name, p in anatomy.model.named_parameters() if name in places
    }
    ours = [(name, parameter) for name, parameter in parameters.values()]
    before = [(p, p.requires_grad, p.grad) for p in anatomy.model.parameters()]

    def hand_over(name: str, parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        zero = anatomy.stored_zero(places[name][0][0])
        product = (zero - parameter.detach().float()) * parameter.grad.float()
        parameter.grad = None
        keep(places[name], product)

    handles = []
    try:
        for p, _, _ in before:
            p.requires_grad_(False)
            p.grad = None
        for name, parameter in ours:
            parameter.requires_grad_(True)
            handed = partial(hand_over, name)
            handle = parameter.register_post_accumulate_grad_hook(handed)  # type: ignore[no-untyped-call]
            handles.append(handle)
        with torch.enable_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for p, required, gradient in before:
            p.requires_grad_(required)
            p.grad = gradient
