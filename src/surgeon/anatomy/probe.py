"""Prove a map by experiment: nudge a weight, and see that what moves is what the map says.

Shapes cannot tell a square matrix from its transpose, and names can lie; a nudge cannot.
"""

# How this works.
#
# One layer is run on eight tokens, once as it is and once with a weight or an output changed; the
# pass ends with that layer. Each role has an experiment that only the right matrix, the right way
# round, can pass.
#
# * mlp.down, attn.out: add `amount` to entry [r, c]. Channel r of the module's output moves by
#   amount times the activation of neuron c, and no other channel does.
# * mlp.up, mlp.gate: add to all of row r. What the MLP writes moves along column r of mlp.down. Up
#   and gate are told apart by scaling the matrix with -1 and 8: the hidden state is linear in up. A
#   wide open gate is nearly linear upwards and one near zero is nearly odd, but neither is both;
#   doubling alone let a trained SwiGLU gate pass for up.
# * attn.q, k, v: push the output at the first position only. Queries leave later positions alone,
#   keys and values move them, and only values do so linearly. The pushes are strong, since
#   attention is nearly linear in the keys of a freshly initialised model when they are weak.
#
# Of experts, the first one is probed. Where nothing moves (no token was routed to it, or the gate
# of the neuron is shut) the experiment says nothing, and the site is let pass.

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..errors import UnknownArchitecture
from ..tap import Tap
from .anatomy import Anatomy
from .site import Site
from .view import WeightView

N_PROBE_TOKENS = 8

Push = tuple[nn.Module, Callable[[Tensor], Tensor]]  # a module, and what becomes of its output


def prove(anatomy: Anatomy, layers: Iterable[int] | None = None) -> list[Site]:
    """Check every projection of the given layers by experiment, and return the sites proved.

    layers: default, the first layer of each kind, by the roles it has. The model is as it was
    afterwards, bit for bit.
    Raises: UnknownArchitecture naming the site that failed.

    >>> import surgeon
    >>> anatomy = Anatomy.of(surgeon.load_model("patient").model)
    >>> [str(site) for site in prove(anatomy)][:3]
    ['L0.mlp.down', 'L0.attn.out', 'L0.mlp.up']
    """
    was_training = anatomy.model.training
    anatomy.model.eval()
    try:
        with torch.no_grad():
            proved: list[Site] = []
            for layer in layers if layers is not None else _first_of_each_kind(anatomy):
                with anatomy.holding(layer):
                    proved += _Probe(anatomy, layer).run()
            return proved
    finally:
        anatomy.model.train(was_training)


def _first_of_each_kind(anatomy: Anatomy) -> list[int]:
    """The first layer of each set of roles: among experts some layers may be dense, for example."""
    first: dict[frozenset[tuple[str, bool]], int] = {}
    for index in range(len(anatomy.layers)):
        sites = [site for site in anatomy.addresses if site.layer == index]
        kind = frozenset((site.role, site.expert is not None) for site in sites)
        first.setdefault(kind, index)
    return list(first.values())


class _Probe:
    """The experiments on one layer."""

    def __init__(self, anatomy: Anatomy, layer: int) -> None:
        self.anatomy = anatomy
        self.layer = layer
        self.block = anatomy.layers[layer]
        self.sites = {
            site.role: site
            for site in anatomy.addresses
            if site.layer == layer and site.expert in (None, 0)
        }
        vocab = N_PROBE_TOKENS + 1
        if Site(None, "embed") in anatomy.addresses:
            vocab = anatomy.view("embed").shape[1]
        device = next(anatomy.model.parameters()).device
        self.ids = (torch.arange(1, N_PROBE_TOKENS + 1) % vocab)[None].to(device)
        self.random = torch.Generator().manual_seed(0)

    def run(self) -> list[Site]:
        experiments = {
            "mlp.down": self.down,
            "attn.out": self.down,
            "mlp.up": self.neuron,
            "mlp.gate": self.neuron,
            "attn.q": self.attention,
            "attn.k": self.attention,
            "attn.v": self.attention,
        }
        proved = []
        for role, experiment in experiments.items():
            if role in self.sites:
                experiment(self.sites[role])
                proved.append(self.sites[role])
        return proved

    def fail(self, site: Site, what: str) -> None:
        raise UnknownArchitecture(
            f"{site} is not what the map of this {type(self.anatomy.model).__name__} says: {what}."
            " Pass a corrected Layout to Anatomy.of, and please report it."
        )

    # -- experiments ---------------------------------------------------------------------------

    def down(self, site: Site) -> None:
        """One entry moves one output channel, by one neuron's activation."""
        module, view = self.anatomy.module(site), self.anatomy.view(site)
        is_expert = site.expert is not None
        before = self.watch(module)
        row, col = view.shape[0] // 3, 0
        if not is_expert:
            col = _most_active(before.inputs)
        with _nudged(view, row, col) as amount:
            after = self.watch(module)
        change = after.outputs - before.outputs
        moved = _moved(change)
        if is_expert and not moved:
            return  # no token of the probe was routed to this expert
        nudge = f"nudging entry [{row}, {col}]"
        if moved != {row}:
            channels = sorted(moved)[:6]
            self.fail(
                site, f"{nudge} moved the output channels {channels}, not channel {row} alone"
            )
        if is_expert:
            return  # the inputs of one expert are out of reach
        expected = before.inputs[:, col].float() * amount
        if not _close(change[:, row].float(), expected):
            self.fail(site, f"{nudge} did not act through input neuron {col}")

    def neuron(self, site: Site) -> None:
        """Row r of up or gate acts through column r of mlp.down, and linearly for up."""
        down = self.sites["mlp.down"]
        writer, columns = self.anatomy.module(down), self.anatomy.view(down).read().float()
        view = self.anatomy.view(site)
        before = self.watch(writer)
        row = view.shape[0] // 3 if site.expert is not None else _most_active(before.inputs)
        with _nudged(view, row, None):
            after = self.watch(writer)
        change = (after.outputs - before.outputs).float()
        strongest = change[change.norm(dim=1).argmax()]
        usual = before.outputs.float().norm(dim=1).max()
        if strongest.norm() < 1e-3 * usual:
            return  # an expert without a token, or a shut gate: nothing above rounding to judge by
        cosine = torch.nn.functional.cosine_similarity(strongest, columns[:, row], dim=0).abs()
        if cosine < 0.99:
            self.fail(
                site,
                f"row {row} does not act through neuron {row} of {down}"
                f" (cosine {cosine:.2f} with its column)",
            )
        if "mlp.gate" in self.sites and site.expert is None:
            self.up_or_gate(site, view, writer, before.inputs.float())

    def up_or_gate(self, site: Site, view: WeightView, writer: nn.Module, hidden: Tensor) -> None:
        """The hidden state (pos, d_mlp) is linear in up and not in gate."""
        linear = True
        for factor in (-1.0, 8.0):
            with _put_back(view) as weight:
                view.assign_(weight * factor)
                scaled = self.watch(writer)
            linear = linear and _close(scaled.inputs.float(), factor * hidden)
        if linear and site.role == "mlp.gate":
            self.fail(site, "up and gate are exchanged")
        if not linear and site.role == "mlp.up":
            self.fail(site, "the MLP's hidden state is not linear in it")

    def attention(self, site: Site) -> None:
        """Push the site's channels at the first position and look at later positions."""
        if "attn.out" not in self.sites:
            return
        out, module = self.anatomy.module(self.sites["attn.out"]), self.anatomy.module(site)
        view = self.anatomy.view(site)
        channels = view._stored_rows(torch.arange(view.shape[0])).cpu()
        direction = torch.randn(len(channels), generator=self.random)

        def push(amount: float) -> Push:
            def pushed(y: Tensor) -> Tensor:
                y = y.clone()
                step = amount * direction * y.float().std().cpu()
                y[..., 0, channels.to(y.device)] += step.to(y)
                return y

            return module, pushed

        plain = self.watch(out).inputs.float()
        once = (self.watch(out, push(100.0)).inputs.float() - plain)[1:]
        tenfold = (self.watch(out, push(1000.0)).inputs.float() - plain)[1:]
        size = plain.abs().max()
        if site.role == "attn.q":
            if once.abs().max() > 1e-3 * size:
                self.fail(
                    site,
                    "changing it at the first position changes later ones, as keys and values do",
                )
        elif once.abs().max() <= 1e-6 * size:
            self.fail(
                site, "changing it at the first position leaves later ones alone, as queries do"
            )
        elif _close(tenfold, 10 * once) != (site.role == "attn.v"):
            self.fail(site, "keys and values are exchanged")

    # -- instruments ---------------------------------------------------------------------------

    def watch(self, module: nn.Module, push: Push | None = None) -> _Recording:
        """Run the layer and record `module`, with the output of another one pushed."""
        recording = _Recording()
        with Tap() as tap:
            if push:
                tap.on_output(*push)
            tap.on_input(module, recording.keep_input)
            tap.on_output(module, recording.keep_output)
            tap.stop_after(self.block)
            tap.run(self.anatomy.model, self.ids)
        return recording


class _Recording:
    """What entered and left a module. Shapes: inputs (pos, in), outputs (pos, out)."""

    inputs: Tensor
    outputs: Tensor

    def keep_input(self, x: Tensor) -> None:
        self.inputs = x.flatten(0, -2).clone()

    def keep_output(self, y: Tensor) -> None:
        self.outputs = y.flatten(0, -2).clone()


@contextmanager
def _put_back(view: WeightView) -> Iterator[Tensor]:
    """Gives a copy of the weight (out, in), and puts it back after the block, bit for bit."""
    weight = view.read().clone()
    try:
        yield weight
    finally:
        view.assign_(weight)


@contextmanager
def _nudged(view: WeightView, row: int, col: int | None) -> Iterator[float]:
    """Within the block entry [row, col], or the whole row, is larger by several usual weights.

    Gives by how much, after rounding to the dtype of the weight.
    """
    cols = torch.arange(view.shape[1]) if col is None else torch.tensor([col])
    rows = torch.full_like(cols, row)
    with _put_back(view) as weight:
        old = weight[row, cols.to(weight.device)].float()
        rms = float(weight.float().square().mean().sqrt())
        view.set_(rows, cols, old + 8 * max(rms, 1e-3))
        yield float((view.get(rows, cols).float() - old)[0])


def _most_active(inputs: Tensor) -> int:
    """The neuron with the largest activation of all, in (pos, in)."""
    return int(inputs.abs().amax(0).argmax())


def _moved(change: Tensor) -> set[int]:
    """The channels that changed, apart from rounding in the others."""
    size = change.float().abs().amax(0)
    largest = size.max()
    if largest == 0:
        return set()
    return set((size > 1e-2 * largest).nonzero().flatten().tolist())


def _close(actual: Tensor, expected: Tensor) -> bool:
    """Equal within what bfloat16 leaves of a difference of two larger numbers."""
    return bool((actual - expected).abs().max() <= 0.05 * expected.abs().max() + 1e-6)
