"""The first-order map against plain autograd, and against small real steps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny import CONFIGS, tiny_model

from surgeon.anatomy import Anatomy, Region, Site, WeightView
from surgeon.errors import BadInput
from surgeon.find.damage import zeroed
from surgeon.find.first_order import KINDS, first_order
from surgeon.patch import ablate
from surgeon.tap import Tap

WINDOWS = torch.randint(3, 99, (3, 16), generator=torch.Generator().manual_seed(0))


def loss(model: torch.nn.Module) -> torch.Tensor:
    logits = model(input_ids=WINDOWS).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), WINDOWS[:, 1:].flatten())


def moved(anatomy: Anatomy, part: Region, share: float) -> float:
    """The loss with the part moved by a share of its way to zero; the model is put back."""
    view = anatomy.view(part.site)
    rows, cols = map(torch.tensor, part.rows_cols(view.shape))
    old = view.get(rows, cols).clone()
    view.set_(rows, cols, old + share * (anatomy.stored_zero(part.site) - old))
    with torch.no_grad():
        after = float(loss(anatomy.model))
    view.set_(rows, cols, old)
    return after


@pytest.mark.parametrize("model_type", [t for t in CONFIGS if t != "bert"])
def test_an_estimate_is_the_slope_of_a_small_step(model_type: str):
    """In float64, where a small step shows the slope well; experts multiply in float32 at most."""
    model = tiny_model(model_type)
    share, tolerance = (2e-3, 3e-3) if "experts" in str(model) else (1e-4, 1e-7)
    model = model if share > 1e-3 else model.double()
    anatomy = Anatomy.of(model)
    estimates = first_order(anatomy, WINDOWS, 4)
    known = (
        set(KINDS) if model_type != "olmo" else set(KINDS) - {"scale"}
    )  # its norms store nothing
    assert {one.kind for one in estimates} == known
    for one in estimates:
        both = moved(anatomy, one.part, share), moved(anatomy, one.part, -share)
        assert one.nats == pytest.approx((both[0] - both[1]) / (2 * share), rel=2e-2, abs=tolerance)


def test_the_largest_of_all_are_named():
    model = tiny_model("llama")
    anatomy = Anatomy.of(model)
    estimates = [one for one in first_order(anatomy, WINDOWS, 5) if one.kind == "entry"]
    loss(model.requires_grad_(True)).backward()
    sizes: dict[tuple[Site, int], float] = {}
    for site, address in anatomy.addresses.items():
        weight = model.get_parameter(address.parameter)
        if weight.dim() == 2:
            product = WeightView(site, weight * weight.grad, address.packing).read()
            sizes |= {(site, i): size for i, size in enumerate(product.abs().flatten().tolist())}
    largest = sorted(sizes, key=lambda at: -sizes[at])[:5]
    n_in = {site: anatomy.view(site).shape[1] for site, _ in largest}
    assert [
        (e.part.site, e.part.row * n_in[e.part.site] + e.part.col) for e in estimates
    ] == largest


def test_the_model_is_as_it_was():
    model = tiny_model("llama")
    anatomy = Anatomy.of(model)
    first = next(model.parameters())
    first.grad = torch.ones_like(first)
    before = {name: p.clone() for name, p in model.named_parameters()}
    required = [p.requires_grad for p in model.parameters()]
    first_order(anatomy, WINDOWS, 1)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert [p.requires_grad for p in model.parameters()] == required
    assert [p.grad is not None for p in model.parameters()] == [True] + [False] * (
        len(required) - 1
    )
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_a_masked_model_has_no_next_token():
    with pytest.raises(BadInput, match="next-token"):
        first_order(Anatomy.of(tiny_model("bert")), WINDOWS, 1)


@pytest.mark.parametrize(("model_type", "stored"), [("llama", 0.0), ("gemma2", -1.0)])
def test_a_norms_scale_is_taken_out_whatever_it_stores(model_type: str, stored: float):
    """The channel behind the norm is zero at every token."""
    model = tiny_model(model_type)
    anatomy = Anatomy.of(model)
    part = anatomy.region("final_norm[3, 0]")
    assert anatomy.stored_zero(part.site) == stored
    leaving = []
    for within in (zeroed(anatomy, [part]), ablate(anatomy, [part]).applied(anatomy)):
        with within, Tap() as tap, torch.no_grad():
            tap.on_output(anatomy.module(part.site), leaving.append)
            model(input_ids=WINDOWS)
    assert [float(y[..., 3].abs().max()) for y in leaving] == [0.0, 0.0]
    assert all(float(y[..., 4].abs().max()) > 0 for y in leaving)
