"""What zeroing any weight would cost, estimated for all of them from one pass forward and back."""

# How this works.
#
# Zeroing weights of one matrix changes what the matrix writes, and the loss by about g.dy, where g
# is the gradient of the loss at the write and dy the change. With y[t] = W x[t] at token t, the
# estimate for entry (j, k) is d[t] = -g[t, j] W[j, k] x[t, k], summed over the tokens; for row j it
# is -g[t, j] y[t, j], and for column k -x[t, k] (W'g[t])[k]. Scales and embeddings go likewise.
#
# This first-order estimate ranks badly: the loss bends long before a vital weight reaches zero, and
# what a weight does at one token cancels what it does at another. The empirical Fisher information
# gives the bend: as the loss of one token has a Hessian of about d d', each token adds d[t]^2 / 2.
# A token that would add more than its own first-order change is taken to add no more than that
# (Huber's function), for otherwise a few tokens drown all others. The sum of both terms is the
# estimate here. It is still an estimate: whatever it names has to be measured.
#
# One block is in memory at a time: the states that enter each are kept, and going back each block
# runs again, with watchers on its modules. Weights whose module is not watched (fused experts) get
# the first-order term alone, from their own gradient.
#
# Sources: Molchanov et al. 2017, arXiv:1611.06440, eq. 7 (first order); Theis et al. 2018,
# arXiv:1801.05787, eq. 11 (empirical Fisher). The bound is ours; docs/finding.md compares.

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers.pytorch_utils import Conv1D

from ..anatomy import Anatomy, Region, Site, WeightView
from ..measure.likelihood import logits_of, require_causal
from ..result import record
from ..tap import LayerInput, Tap, layer_calls, resume, returns_tuple

# scale: an entry of a norm's weight or bias; token: a token's line in an embedding or output head,
# or an entry of it
KINDS = ("scale", "entry", "row", "column", "token")
TOKEN_LINES = {
    (role, kind)
    for role, line in (("embed", "column"), ("unembed", "row"))
    for kind in (line, "entry")
}
EACH_SITE = 16  # the most of one kind that one matrix gives
RESCORED = 4  # so many times more entries than that are looked at token by token
TOKENS = 512  # of each kind of place, on which the estimate is made


@record
class Estimate:
    """What zeroing a region would cost in nats per token: the first-order term, and the bend."""

    part: Region
    kind: str
    first: float
    bend: float

    @property
    def nats(self) -> float:
        """Both terms, the first by its size: its sign is often wrong where the bend is large."""
        return abs(self.first) + self.bend


def estimates(anatomy: Anatomy, windows: Int64[Tensor, "n window"]) -> list[Estimate]:
    """Of each matrix the EACH_SITE largest of each kind; over all, largest first.

    All windows go through together. The model, and gradients that it holds, are as before
    afterwards. Raises: BadInput for a model that does not predict the next token.
    """
    require_causal(anatomy.model)
    windows = windows.to(next(anatomy.model.parameters()).device)
    best = _Best(windows[:, 1:].numel())
    with _frozen(anatomy.model):
        _back(anatomy, windows, best)
    return sorted(best.kept, key=lambda one: -one.nats)


def _back(anatomy: Anatomy, windows: Tensor, best: _Best) -> None:
    """Forward through the blocks, keeping the states between them; then back, block by block."""
    model, layers = anatomy.model, anatomy.layers
    as_tuple = returns_tuple(model, layers, input_ids=windows[:1, :2])
    with torch.no_grad():
        states, calls = layer_calls(model, layers, as_tuple, input_ids=windows)
        entering = [states]
        for index, layer in enumerate(layers):
            with anatomy.holding(index):
                entering.append(calls[index](layer, entering[-1]))

    with anatomy.holding(None):
        last = entering.pop().requires_grad_()
        entry = LayerInput(len(layers), last, as_tuple)
        with best.watching(anatomy, None), resume(layers, entry), torch.enable_grad():
            logits = logits_of(model, windows)[:, :-1].float()
            loss = cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
            torch.autograd.backward(loss)
    for index in reversed(range(len(layers))):
        states = entering.pop().requires_grad_()
        with anatomy.holding(index), best.watching(anatomy, index), torch.enable_grad():
            torch.autograd.backward(calls[index](layers[index], states), last.grad)
        last = states
    with anatomy.holding(None), best.watching(anatomy, None), torch.enable_grad():
        states, _ = layer_calls(model, layers, as_tuple, input_ids=windows)
        torch.autograd.backward(states, last.grad)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Within the block no parameter takes a gradient; afterwards all are as they were."""
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    try:
        for p, _, _ in before:
            p.requires_grad_(False)
            p.grad = None
        yield
    finally:
        for p, required, gradient in before:
            p.requires_grad_(required)
            p.grad = gradient


class _Best:
    """The largest estimates seen. n: the predicted tokens, over which the loss is a mean."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.kept: list[Estimate] = []

    @contextmanager
    def watching(self, anatomy: Anatomy, layer: int | None) -> Iterator[None]:
        """Within the block what the modules of this layer do is turned into estimates as a gradient
        comes back; None: those outside the layers.
        """
        sites: dict[str, list[Site]] = defaultdict(list)
        for site, address in anatomy.addresses.items():
            if site.layer == layer:
                sites[address.module].append(site)
        others: list[nn.Parameter] = []
        with Tap() as tap:
            for path, mine in sites.items():
                module = anatomy.model.get_submodule(path)
                inputs: list[Tensor] = []
                if isinstance(module, nn.Linear | Conv1D):
                    # under another name, so that its gradient is of this module alone
                    tap.on_input(module, partial(_aliased, inputs))
                    written = partial(self._linear, anatomy, mine, inputs, module.bias)
                elif isinstance(module, nn.Embedding):
                    tap.on_input(module, inputs.append)
                    tap.on_output(module, Tensor.requires_grad_)  # where the way back ends
                    written = partial(self._embedding, anatomy, mine[0], inputs)
                elif "norm" in type(module).__name__.lower():
                    written = partial(self._norm, anatomy, mine)
                else:
                    names = {anatomy.addresses[site].parameter for site in mine}
                    others += [anatomy.model.get_parameter(name) for name in sorted(names)]
                    continue
                tap.on_output(module, partial(_when_back, written))
            for parameter in others:
                parameter.requires_grad_(True)
            yield
        for parameter in others:
            parameter.requires_grad_(False)
        self._unwatched(anatomy, sites, others)

    @torch.no_grad()
    def _linear(
        self,
        anatomy: Anatomy,
        sites: Sequence[Site],
        inputs: list[Tensor],
        bias: Tensor | None,
        y: Tensor,
        g: Tensor,
    ) -> None:
        """Rows and entries now; columns once the gradient has gone through the matrix."""
        read = inputs.pop()
        x = read.detach().flatten(0, -2).float()
        y, g = (y if bias is None else y - bias).flatten(0, -2).float(), g.flatten(0, -2).float()
        for site in sites:
            weight = anatomy.view(site).read().float()  # (out, in)
            rows = anatomy.addresses[site].packing.rows
            mine = g if rows is None else g[:, rows]
            self._lines(site, "row", -mine * (y if rows is None else y[:, rows]))
            if rows is None:
                _when_back(partial(self._columns, site), read)
            else:  # one of several matrices in one
                self._lines(site, "column", -x * (mine @ weight))
            size = (mine.square().T @ x.square()).mul_(weight.square()).mul_(self.n / 2)
            size.add_((mine.T @ x).mul_(weight).abs_())
            at = size.flatten().topk(min(RESCORED * EACH_SITE, size.numel())).indices
            row, col = at // weight.shape[1], at % weight.shape[1]
            self._keep(
                -mine[:, row] * x[:, col] * weight[row, col],
                "entry",
                [Region(site, r, c) for r, c in zip(row.tolist(), col.tolist(), strict=True)],
            )

    @torch.no_grad()
    def _columns(self, site: Site, x: Tensor, g: Tensor) -> None:
        self._lines(site, "column", -(x * g).flatten(0, -2).float())

    @torch.no_grad()
    def _norm(self, anatomy: Anatomy, sites: Sequence[Site], y: Tensor, g: Tensor) -> None:
        y, g = y.flatten(0, -2).float(), g.flatten(0, -2).float()
        bias = {site: anatomy.view(site).read().float()[:, 0] for site in sites if _is_bias(site)}
        scaled = y - sum(bias.values())
        for site in sites:
            d = -g * bias.get(site, scaled)
            self._lines(site, "scale", d)

    @torch.no_grad()
    def _embedding(
        self, anatomy: Anatomy, site: Site, inputs: list[Tensor], y: Tensor, g: Tensor
    ) -> None:
        ids = inputs.pop().flatten()
        d = -(g * y).flatten(0, -2).float()  # (position, channel)
        self._lines(site, "row", d)
        tokens, which = torch.unique(ids, return_inverse=True)
        whole = d.sum(1)
        first = torch.zeros(len(tokens), dtype=d.dtype, device=d.device)
        bend = first.clone()
        first.index_add_(0, which, whole)
        bend.index_add_(0, which, self._bends(whole))
        columns = [Region(site, None, token) for token in tokens.tolist()]
        self._keep_sums(first, bend, "column", columns)

    def _unwatched(
        self, anatomy: Anatomy, sites: dict[str, list[Site]], parameters: Sequence[nn.Parameter]
    ) -> None:
        """First-order estimates of parameters that took a gradient of their own, fused experts."""
        gradients = {id(p): p.grad for p in parameters}
        for site in (site for mine in sites.values() for site in mine):
            address = anatomy.addresses[site]
            parameter = anatomy.model.get_parameter(address.parameter)
            gradient = gradients.get(id(parameter))
            if gradient is None:
                continue
            slope = WeightView(site, gradient, address.packing).read()
            first = -slope.float() * anatomy.view(site).read().float()
            n_in = first.shape[1]
            none = torch.zeros(())
            for kind, sums in (("row", first.sum(1)), ("column", first.sum(0))):
                self._keep_sums(sums, none.expand(len(sums)), kind, _regions(site, kind, len(sums)))
            flat = first.flatten()
            at = flat.abs().topk(min(EACH_SITE, len(flat))).indices
            entries = [Region(site, i // n_in, i % n_in) for i in at.tolist()]
            self._keep_sums(flat[at], none.expand(len(at)), "entry", entries)
        for parameter in parameters:
            parameter.grad = None

    def _lines(self, site: Site, kind: str, d: Float[Tensor, "token line"]) -> None:
        self._keep(d, kind, _regions(site, kind, d.shape[1]))

    def _keep(self, d: Float[Tensor, "token part"], kind: str, parts: Sequence[Region]) -> None:
        self._keep_sums(d.sum(0), self._bends(d).sum(0), kind, parts)

    def _bends(self, d: Tensor) -> Tensor:
        """What each token adds beyond the first order: Huber's function of its own change."""
        change = (d * self.n).abs()
        return torch.where(change < 1, change.square() / 2, change - 0.5) / self.n

    def _keep_sums(self, first: Tensor, bend: Tensor, kind: str, parts: Sequence[Region]) -> None:
        size = first.abs() + bend
        if parts and (parts[0].site.role, kind) in TOKEN_LINES:
            kind = "token"
        for index in size.topk(min(EACH_SITE, len(size))).indices.tolist():
            one = Estimate(parts[index], kind, float(first[index]), float(bend[index]))
            self.kept.append(one)


def _when_back(written: partial[None], y: Tensor) -> None:
    """Call `written(y, g)` once the gradient g of y is known."""
    if y.requires_grad:
        now = y.detach().clone()  # some models add to it in place
        y.register_hook(lambda g: written(now, g))  # type: ignore[no-untyped-call]


def _aliased(into: list[Tensor], x: Tensor) -> Tensor:
    """The same states as another tensor, kept in `into`."""
    alias = x.view_as(x)
    into.append(alias)
    return alias


def _is_bias(site: Site) -> bool:
    return site.role.endswith(".bias")


def _regions(site: Site, kind: str, count: int) -> Sequence[Region]:
    if kind == "row":
        return [Region(site, i, None) for i in range(count)]
    if kind == "column":
        return [Region(site, None, i) for i in range(count)]
    return [Region(site, i, 0) for i in range(count)]
