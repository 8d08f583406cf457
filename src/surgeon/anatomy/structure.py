"""Find the parts of an unknown decoder by what feeds what: no names, no shapes."""

# How this works.
#
# One decoder layer is run on four tokens, and the input and the output of every linear map in it
# are kept, with the graph of gradients between them. Two questions then tell the maps apart.
# "Does the input of B at a position depend on the output of A?" is a gradient that is not zero.
# "Is it linear in it?" is a second run with the output of A doubled.
#
# * The parents of a map are those that feed it without another in between.
# * A map mixes if its input at the last position depends on a parent's output at the first one.
#   The first map that mixes is `attn.out`; its parents are q, k, v. Only k and v carry the mixing,
#   since a query acts at its own position, and the attention's output is linear in v, not in k.
# * The last map outside the attention that has such maps among its parents is `mlp.down`. A single
#   parent of the same width is `mlp.up`; of two, the hidden state is linear in `mlp.up` and not in
#   `mlp.gate`.
#
# What cannot be told in this way (fused q, k, v; fused up and gate) stays without a site. The
# result is proved afterwards like any other map (probe.py).

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import UnknownArchitecture
from ..tap import Tap
from .table import Layout


def module_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Every ModuleList of the model by its path."""
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList)}


def layout_by_structure(model: nn.Module, num_layers: int | None) -> Layout:
    """A layout read off the running model.

    num_layers: how many decoder layers there are; None if that is not known, which will do for a
    model with a single ModuleList.
    Raises: UnknownArchitecture with what the model has instead.

    >>> import surgeon
    >>> layout = layout_by_structure(surgeon.load_model("patient").model, 2)
    >>> layout.layers, layout.roles["mlp.down"], layout.roles["attn.v"]
    ('model.layers', 'mlp.down_proj', 'self_attn.v_proj')
    """
    kind = type(model).__name__
    lists = module_lists(model)
    fitting = [p for p, modules in lists.items() if not num_layers or len(modules) == num_layers]
    if len(fitting) != 1:
        lengths = ", ".join(f"{path} ({len(modules)})" for path, modules in lists.items())
        raise UnknownArchitecture(
            f"{kind} has no single list of {num_layers or 'its'} layers;"
            f" its module lists are {lengths or 'none'}. Pass a Layout of your own to Anatomy.of."
        )
    path = fitting[0]
    layer = lists[path][0]
    linears: dict[str, nn.Module] = {
        name: m for name, m in layer.named_modules() if isinstance(m, nn.Linear | Conv1D)
    }
    roles = _classify(model, layer, linears)
    if "mlp.down" not in roles:
        raise UnknownArchitecture(
            f"no MLP output projection could be recognised in {kind}; the linear maps of a layer"
            f" are {', '.join(linears) or 'none'}. Pass a Layout of your own to Anatomy.of."
        )
    return Layout(path, _norm_after(model, path), roles)


def _classify(model: nn.Module, layer: nn.Module, linears: dict[str, nn.Module]) -> dict[str, str]:
    """The role of each linear map of the layer that can be told, role to name."""
    calls = _Calls(model, layer, linears)
    parents = {name: calls.parents(name) for name in calls.order}
    attention = _attention_roles(calls, parents)
    rest = [name for name in calls.order if name not in attention.values()]
    return attention | _mlp_roles(calls, parents, rest)


def _attention_roles(calls: _Calls, parents: dict[str, list[str]]) -> dict[str, str]:
    mixing = [name for name in calls.order if any(calls.mixes(p, name) for p in parents[name])]
    roles: dict[str, str] = {}
    for out in mixing:
        # maps after the attention inherit its mixing through the residual stream
        if any(parent in mixing for parent in parents[out]):
            continue
        roles["attn.out"] = out
        roles |= _query_key_value(calls, parents[out], out)
    return roles


def _query_key_value(calls: _Calls, feeders: list[str], out: str) -> dict[str, str]:
    keys_values = [name for name in feeders if calls.mixes(name, out)]
    queries = [name for name in feeders if name not in keys_values]
    if len(queries) != 1 or len(keys_values) != 2:
        return {}
    values = [name for name in keys_values if calls.is_linear_in(name, out)]
    if len(values) != 1:
        return {"attn.q": queries[0]}
    keys = [name for name in keys_values if name not in values]
    return {"attn.q": queries[0], "attn.v": values[0], "attn.k": keys[0]}


def _mlp_roles(calls: _Calls, parents: dict[str, list[str]], rest: list[str]) -> dict[str, str]:
    for down in reversed(rest):
        feeders = [name for name in parents[down] if name in rest]
        if feeders:
            return {"mlp.down": down} | _up_gate(calls, feeders, down)
    return {}


def _up_gate(calls: _Calls, feeders: list[str], down: str) -> dict[str, str]:
    if len(feeders) == 1:
        (up,) = feeders
        same_width = calls.outputs[up].shape[-1] == calls.inputs[down].shape[-1]
        # a wider one is up and gate fused, in an order that cannot be seen from here
        return {"mlp.up": up} if same_width else {}
    if len(feeders) != 2:
        return {}
    ups = [name for name in feeders if calls.is_linear_in(name, down)]
    if len(ups) != 1:
        return {}
    gates = [name for name in feeders if name not in ups]
    return {"mlp.up": ups[0], "mlp.gate": gates[0]}


class _Calls:
    """The linear maps of one layer as they run: their order, and what each input depends on.

    Shapes: inputs[name] (batch, pos, in), outputs[name] (batch, pos, out).
    """

    def __init__(self, model: nn.Module, layer: nn.Module, linears: dict[str, nn.Module]) -> None:
        self.model, self.layer, self.linears = model, layer, linears
        self.order: list[str] = []
        self.inputs, self.outputs = self._run()

    def _run(self, doubled: str | None = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """One pass over four tokens, with the output of the map `doubled` times two."""
        inputs: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}
        order: list[str] = []

        def keep_input(name: str) -> Callable[[Tensor], None]:
            def watch(x: Tensor) -> None:
                inputs[name] = x
                order.append(name)

            return watch

        def keep_output(name: str) -> Callable[[Tensor], Tensor]:
            def watch(y: Tensor) -> Tensor:
                y = y * 2 if name == doubled else y
                # a new tensor in the graph, to take gradients by: a detached copy would cut the
                # graph here, and a frozen weight may not have begun one
                y = y + 0
                outputs[name] = y if y.requires_grad else y.requires_grad_()
                return outputs[name]

            return watch

        device = next(self.model.parameters()).device
        with torch.enable_grad(), Tap() as tap:
            for name, module in self.linears.items():
                tap.on_input(module, keep_input(name))
                tap.on_output(module, keep_output(name))
            tap.stop_after(self.layer)
            tap.run(self.model, torch.tensor([[1, 2, 3, 4]], device=device))
        self.order = order
        return inputs, outputs

    def _depends(self, target: str, source: str, at_first: bool) -> bool:
        """Does the input of `target` at the last position depend on the output of `source`?

        at_first: on its output at the first position; else at any.
        """
        last = self.inputs[target][..., -1, :]
        generator = torch.Generator().manual_seed(0)
        # a random combination, so that slopes of opposite sign do not cancel
        weights = torch.randn(last.shape, generator=generator).to(last.device)
        (grad,) = torch.autograd.grad(
            (last * weights).sum(), self.outputs[source], retain_graph=True, allow_unused=True
        )
        if grad is None:
            return False
        slope = grad[..., 0, :] if at_first else grad
        return bool(slope.abs().sum() > 0)

    def ancestors(self, name: str) -> set[str]:
        """The maps that feed this one, by whatever way."""
        earlier = self.order[: self.order.index(name)]
        if not self.inputs[name].requires_grad:
            return set()
        return {other for other in earlier if self._depends(name, other, at_first=False)}

    def parents(self, name: str) -> list[str]:
        """The maps that feed this one without another in between, in the order they run."""
        above = self.ancestors(name)
        indirect = {further for other in above for further in self.ancestors(other)}
        return [other for other in self.order if other in above and other not in indirect]

    def mixes(self, source: str, target: str) -> bool:
        """Whether what `source` puts out at the first position reaches `target` at the last."""
        return self._depends(target, source, at_first=True)

    def is_linear_in(self, source: str, target: str) -> bool:
        """Whether doubling the output of `source` doubles the input of `target`."""
        inputs, _ = self._run(doubled=source)
        return torch.allclose(inputs[target], 2 * self.inputs[target], rtol=1e-3, atol=1e-6)


def _norm_after(model: nn.Module, layers: str) -> str | None:
    """The norm after the layers: the last sibling of their list whose only weight is a vector."""
    parent = layers.rpartition(".")[0]
    owner = model.get_submodule(parent) if parent else model
    norms = []
    for name, module in owner.named_children():
        weights = [p for n, p in module.named_parameters() if n.endswith("weight")]
        if [weight.dim() for weight in weights] == [1]:
            norms.append(name)
    return f"{parent}.{norms[-1]}".lstrip(".") if norms else None
