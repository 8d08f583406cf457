"""Find the parts of an unknown decoder by what feeds what: no names, no shapes.

One decoder layer is run on random states and every linear map in it is watched. The map whose input
mixes positions is `attn.out`; those that feed it are q, k, v; the last map that does not mix is
`mlp.down`; those that feed it are `mlp.up` and `mlp.gate`. Each conclusion is drawn from gradients
or from scaling one output and looking at the next input.
"""

from __future__ import annotations

from typing import Any

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

    Raises: UnknownArchitecture with what was found instead.
    """
    lists = module_lists(model)
    fitting = [p for p, m in lists.items() if len(m) == num_layers] or (
        [] if num_layers else list(lists)
    )
    kind = type(model).__name__
    if len(fitting) != 1:
        raise UnknownArchitecture(
            f"{kind} has no single list of {num_layers or 'its'} layers; its module lists are"
            f" {', '.join(f'{p} ({len(m)})' for p, m in lists.items()) or 'none'}. Pass a Layout of"
            " your own to Anatomy.of."
        )
    path = fitting[0]
    layer = lists[path][0]
    linears: dict[str, nn.Module] = {
        n: m for n, m in layer.named_modules() if isinstance(m, nn.Linear | Conv1D)
    }
    roles = _classify(model, layer, linears)
    if "mlp.down" not in roles:
        raise UnknownArchitecture(
            f"no MLP output projection could be recognised in {kind}; the linear maps of a layer"
            f" are {', '.join(linears) or 'none'}. Pass a Layout of your own to Anatomy.of."
        )
    return Layout(path, _norm_after(model, path), roles)


def _classify(model: nn.Module, layer: nn.Module, linears: dict[str, nn.Module]) -> dict[str, str]:
    calls = _Calls(model, layer, linears)
    if not calls.order:
        return {}
    parents = {name: calls.parents(name) for name in calls.order}
    mixing = [n for n in calls.order if any(calls.mixes(p, n) for p in parents[n])]
    roles: dict[str, str] = {}
    for out in mixing:
        # later maps inherit the mixing through the residual; attn.out is fed by maps that nothing
        # mixed before
        feeders = parents[out]
        if any(f in mixing for f in feeders):
            continue
        roles["attn.out"] = out
        keys_values = [f for f in feeders if calls.mixes(f, out)]
        if len(feeders) == 3 and len(keys_values) == 2:
            roles["attn.q"] = next(f for f in feeders if f not in keys_values)
            linear = [f for f in keys_values if calls.is_linear_in(f, out)]
            if len(linear) == 1:
                roles["attn.v"] = linear[0]
                roles["attn.k"] = next(f for f in keys_values if f != linear[0])
    attention = set(roles.values())
    rest = [n for n in calls.order if n not in attention]
    for down in reversed(rest):
        feeders = [p for p in parents[down] if p in rest]
        if not feeders:
            continue
        roles["mlp.down"] = down
        if (
            len(feeders) == 1
            and calls.outputs[feeders[0]].shape[-1] == calls.inputs[down].shape[-1]
        ):
            roles["mlp.up"] = feeders[
                0
            ]  # a wider one is up and gate fused, in an order that cannot be seen from here
        elif len(feeders) == 2:
            ups = [f for f in feeders if calls.is_linear_in(f, down)]
            if len(ups) == 1:
                roles["mlp.up"] = ups[0]
                roles["mlp.gate"] = next(f for f in feeders if f != ups[0])
        break
    return roles


class _Calls:
    """The linear maps of one layer in the order they run, and how each input depends on earlier
    outputs.
    """

    def __init__(self, model: nn.Module, layer: nn.Module, linears: dict[str, nn.Module]) -> None:
        self.model, self.layer, self.linears = model, layer, linears
        self.order: list[str] = []
        self.inputs, self.outputs = self._run()

    def _run(self, scale: str | None = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """One pass over four tokens; with `scale`, the output of that map is doubled."""
        inputs: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}
        order: list[str] = []

        def seen(name: str) -> Any:
            def watch(x: Tensor) -> None:
                inputs[name] = x
                order.append(name)

            return watch

        def left(name: str) -> Any:
            def watch(y: Tensor) -> Tensor:
                y = y * 2 if name == scale else y
                # a leaf copy would cut the graph; a fresh non-leaf keeps it and can be
                # differentiated against
                outputs[name] = y + 0 if y.requires_grad else (y + 0).requires_grad_()
                return outputs[name]

            return watch

        device = next(self.model.parameters()).device
        with torch.enable_grad(), Tap() as tap:
            for name, module in self.linears.items():
                tap.on_input(module, seen(name))
                tap.on_output(module, left(name))
            tap.stop_after(self.layer)
            tap.run(self.model, torch.tensor([[1, 2, 3, 4]], device=device))
        self.order = order
        return inputs, outputs

    def _slope(self, source: str, target: str, source_pos: int | None, target_pos: int) -> bool:
        """Does target's input at target_pos depend on source's output (at source_pos)?"""
        generator = torch.Generator().manual_seed(0)
        probe = torch.randn(self.inputs[target][..., target_pos, :].shape, generator=generator).to(
            self.inputs[target].device
        )
        (grad,) = torch.autograd.grad(
            (self.inputs[target][..., target_pos, :] * probe).sum(),
            self.outputs[source],
            retain_graph=True,
            allow_unused=True,
        )
        if grad is None:
            return False
        return bool((grad if source_pos is None else grad[..., source_pos, :]).abs().sum() > 0)

    def ancestors(self, name: str) -> set[str]:
        earlier = self.order[: self.order.index(name)]
        if not self.inputs[name].requires_grad:
            return set()
        return {e for e in earlier if self._slope(e, name, None, -1)}

    def parents(self, name: str) -> list[str]:
        """The maps that feed this one without another in between."""
        above = self.ancestors(name)
        indirect = {a for b in above for a in self.ancestors(b)}
        return [e for e in self.order if e in above and e not in indirect]

    def mixes(self, source: str, target: str) -> bool:
        return self._slope(source, target, source_pos=0, target_pos=-1)

    def is_linear_in(self, source: str, target: str) -> bool:
        """Doubling the output of `source` doubles the input of `target`."""
        doubled, _ = self._run(scale=source)
        return torch.allclose(doubled[target], 2 * self.inputs[target], rtol=1e-3, atol=1e-6)


def _norm_after(model: nn.Module, layers: str) -> str | None:
    """The norm that follows the layers: the last sibling of the list whose only weight is a
    vector.
    """
    parent = layers.rpartition(".")[0]
    siblings = list((model.get_submodule(parent) if parent else model).named_children())
    vectors = [
        name
        for name, m in siblings
        if [p.dim() for n, p in m.named_parameters() if n.endswith("weight")] == [1]
    ]
    return f"{parent}.{vectors[-1]}".lstrip(".") if vectors else None
