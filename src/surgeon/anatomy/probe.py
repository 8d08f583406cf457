"""Prove a map by experiment: nudge a weight, and see that what moves is what the map says.

Shapes cannot tell a square matrix from its transpose and names can lie; a nudge cannot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ..errors import UnknownArchitecture
from ..tap import Tap
from .anatomy import Anatomy
from .site import Site
from .view import WeightView

N_PROBE_TOKENS = 8


def prove(anatomy: Anatomy, layers: Iterable[int] | None = None) -> list[Site]:
    """Check every projection of the given layers (default: the first layer of each kind) by
    experiment; return what was proved.

    * mlp.down[r, c]: nudging it moves channel r of the MLP's output, by the nudge times neuron c's
    activation, and no other.
    * mlp.up and mlp.gate, row r: the MLP's output moves along column r of mlp.down and in no other
    direction;
      it is linear in up and not in gate.
    * attn.q, k, v: at the first position, q leaves later positions alone; k and v move them, v
    linearly.
    * attn.out, embed, unembed: like mlp.down, where they are plain projections.

    The model is as it was afterwards, bit for bit. Raises: UnknownArchitecture naming the site that
    failed.
    """
    was_training = anatomy.model.training
    anatomy.model.eval()
    try:
        with torch.no_grad():
            proved: list[Site] = []
            for layer in layers if layers is not None else _kinds(anatomy):
                with anatomy.holding(layer):
                    proved += _Probe(anatomy, layer).run()
            return proved
    finally:
        anatomy.model.train(was_training)


def _kinds(anatomy: Anatomy) -> list[int]:
    """The first layer of each set of roles; a mixture of experts may have dense layers among its
    own.
    """
    kinds: dict[frozenset[tuple[str, bool]], int] = {}
    for index in range(len(anatomy.layers)):
        kinds.setdefault(
            frozenset(
                (s.role, s.expert is not None) for s in anatomy.addresses if s.layer == index
            ),
            index,
        )
    return list(kinds.values())


class _Probe:
    def __init__(self, anatomy: Anatomy, layer: int) -> None:
        self.anatomy = anatomy
        self.block = anatomy.layers[layer]
        self.sites = {
            s.role: s for s in anatomy.addresses if s.layer == layer and s.expert in (None, 0)
        }
        self.layer = layer
        vocab = (
            anatomy.view("embed").shape[1]
            if Site(None, "embed") in anatomy.addresses
            else N_PROBE_TOKENS + 1
        )
        device = next(anatomy.model.parameters()).device
        self.ids = (torch.arange(1, N_PROBE_TOKENS + 1) % vocab)[None].to(device)
        self.random = torch.Generator().manual_seed(0)

    def run(self) -> list[Site]:
        proved = []
        for role, check in (
            ("mlp.down", self.down),
            ("attn.out", self.down),
            ("mlp.up", self.neuron),
            ("mlp.gate", self.neuron),
            ("attn.q", self.attention),
            ("attn.k", self.attention),
            ("attn.v", self.attention),
        ):
            if role in self.sites:
                check(self.sites[role])
                proved.append(self.sites[role])
        return proved

    def fail(self, site: Site, what: str) -> None:
        raise UnknownArchitecture(
            f"{site} is not what the map of this {type(self.anatomy.model).__name__} says: {what}. "
            "Pass a corrected Layout to Anatomy.of, and please report it."
        )

    # -- experiments ---------------------------------------------------------------------------

    def down(self, site: Site) -> None:
        module, view = self.anatomy.module(site), self.anatomy.view(site)
        before = self.watch(module)
        expert = site.expert is not None
        row, col = view.shape[0] // 3, 0
        if not expert:
            col = int(before.inputs.abs().amax(0).argmax())
        with _nudged(view, row, col) as amount:
            after = self.watch(module)
        moved = _moved(after.outputs - before.outputs)
        if expert and not moved:
            return  # no token of the probe was routed to this expert
        if moved != {row}:
            self.fail(
                site,
                f"nudging entry [{row}, {col}] moved the output channels {sorted(moved)[:6]}, not"
                f" channel {row} alone",
            )
        if not expert:
            want = before.inputs[:, col].float() * amount
            got = (after.outputs - before.outputs)[:, row].float()
            if not _close(got, want):
                self.fail(
                    site, f"nudging entry [{row}, {col}] did not act through input neuron {col}"
                )

    def neuron(self, site: Site) -> None:
        """Row r of up or gate acts through neuron r: through column r of mlp.down, and linearly for
        up.
        """
        down = self.sites["mlp.down"]
        writer, matrix = self.anatomy.module(down), self.anatomy.view(down).read().float()
        view = self.anatomy.view(site)
        before = self.watch(writer)
        row = (
            view.shape[0] // 3
            if site.expert is not None
            else int(before.inputs.abs().amax(0).argmax())
        )
        with _nudged(view, row, None):
            after = self.watch(writer)
        change = (after.outputs - before.outputs).float()
        strongest = change[change.norm(dim=1).argmax()]
        if strongest.norm() < 1e-3 * before.outputs.float().norm(dim=1).max():
            # an expert without a token, or a neuron whose gate is shut: nothing above rounding to
            # judge by
            return
        cosine = torch.nn.functional.cosine_similarity(strongest, matrix[:, row], dim=0).abs()
        if cosine < 0.99:
            self.fail(
                site,
                f"row {row} does not act through neuron {row} of {down} (cosine {cosine:.2f} with"
                " its column)",
            )
        if "mlp.gate" in self.sites and site.expert is None:
            linear = True
            for factor in (
                -1.0,
                8.0,
            ):  # an open gate is nearly linear upwards, one close to 0 nearly odd; none is both
                with _scaled(view, factor):
                    scaled = self.watch(writer)
                linear = linear and _close(scaled.inputs.float(), factor * before.inputs.float())
            if linear != (site.role == "mlp.up"):
                self.fail(
                    site,
                    (
                        "up and gate are exchanged"
                        if linear
                        else "the MLP's hidden state is not linear in it"
                    ),
                )

    def attention(self, site: Site) -> None:
        """Perturb the site's channels at the first position and look at the attention's output
        further on.
        """
        if "attn.out" not in self.sites:
            return
        out, module = self.anatomy.module(self.sites["attn.out"]), self.anatomy.module(site)
        view = self.anatomy.view(site)
        channels = view._stored_rows(torch.arange(view.shape[0])).cpu()
        push = torch.randn(len(channels), generator=self.random)

        def pushed(amount: float) -> Callable[[Tensor], Tensor]:
            def watch(y: Tensor) -> Tensor:
                y = y.clone()
                y[..., 0, channels.to(y.device)] += (amount * push * y.float().std().cpu()).to(y)
                return y

            return watch

        plain = self.watch(out).inputs.float()
        # strong pushes: under weak ones attention is nearly linear in the keys of a freshly
        # initialised model
        once, tenfold = (
            (self.watch(out, (module, pushed(a))).inputs.float() - plain)[1:]
            for a in (100.0, 1000.0)
        )
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

    def watch(
        self, module: nn.Module, push: tuple[nn.Module, Callable[[Tensor], Tensor]] | None = None
    ) -> _Seen:
        """Input (pos, in) and output (pos, out) of `module`; the pass ends with this layer."""
        seen = _Seen()
        with Tap() as tap:
            if push:
                tap.on_output(*push)
            tap.on_input(module, seen.keep_input)
            tap.on_output(module, seen.keep_output)
            tap.stop_after(self.block)
            tap.run(self.anatomy.model, self.ids)
        return seen


class _Seen:
    inputs: Tensor
    outputs: Tensor

    def keep_input(self, x: Tensor) -> None:
        self.inputs = x.flatten(0, -2).clone()

    def keep_output(self, y: Tensor) -> None:
        self.outputs = y.flatten(0, -2).clone()


class _changed:
    """A weight changed inside a `with`, put back bit for bit."""

    def __init__(self, view: WeightView) -> None:
        self.view = view
        self.kept = view.read().clone()

    def __exit__(self, *_: object) -> None:
        self.view.assign_(self.kept)


class _nudged(_changed):
    """Entry [row, col], or the whole row, moved by several times the usual weight; gives the amount
    after rounding.
    """

    def __init__(self, view: WeightView, row: int, col: int | None) -> None:
        super().__init__(view)
        self.row, self.cols = (
            row,
            torch.arange(view.shape[1]) if col is None else torch.tensor([col]),
        )

    def __enter__(self) -> float:
        rows = torch.full_like(self.cols, self.row)
        old = self.kept[self.row, self.cols.to(self.kept.device)].float()
        amount = 8 * max(float(self.kept.float().square().mean().sqrt()), 1e-3)
        self.view.set_(rows, self.cols, old + amount)
        return float((self.view.get(rows, self.cols).float() - old)[0])


class _scaled(_changed):
    def __init__(self, view: WeightView, factor: float) -> None:
        super().__init__(view)
        self.factor = factor

    def __enter__(self) -> None:
        self.view.assign_(self.kept * self.factor)


def _moved(change: Tensor) -> set[int]:
    """The channels that changed, apart from rounding in the others."""
    size = change.float().abs().amax(0)
    return set((size > 1e-2 * size.max()).nonzero().flatten().tolist()) if size.max() > 0 else set()


def _close(got: Tensor, want: Tensor) -> bool:
    """Equal within what bfloat16 leaves of a difference of two larger numbers."""
    return bool((got - want).abs().max() <= 0.05 * want.abs().max() + 1e-6)
