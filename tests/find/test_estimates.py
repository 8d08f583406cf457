"""Estimates against plain autograd, and against small real steps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny import CONFIGS, tiny_model

from surgeon.anatomy import Anatomy, Region, Site, open_stream
from surgeon.errors import BadInput
from surgeon.find.estimates import EACH_SITE, KINDS, estimates
from surgeon.find.zeroed import zeroed
from surgeon.patch import ablate
from surgeon.tap import Tap

WINDOWS = torch.randint(3, 99, (3, 16), generator=torch.Generator().manual_seed(0))
TOKENS = WINDOWS[:, 1:].numel()


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
def test_the_first_term_is_the_slope_of_a_small_step(model_type: str):
    anatomy = Anatomy.of(tiny_model(model_type, tie_word_embeddings=False))
    named = estimates(anatomy, WINDOWS)
    known = set(KINDS)
    assert {one.kind for one in named} == known - ({"scale"} if model_type == "olmo" else set())
    for one in named:
        # a router can send a token elsewhere at any step, however small
        slopes = [slope(anatomy, one.part, share) for share in (2e-3, 2e-4)]
        assert any(one.first == pytest.approx(other, rel=2e-2, abs=3e-3) for other in slopes)


def slope(anatomy: Anatomy, part: Region, share: float) -> float:
    return (moved(anatomy, part, share) - moved(anatomy, part, -share)) / (2 * share)


def by_token(anatomy: Anatomy, part: Region) -> torch.Tensor:
    """The change of the loss by what the part writes at each token, to first order: the slope of
    the loss in a factor on it.
    """
    module, site = anatomy.module(part.site), part.site
    factor = torch.ones(WINDOWS.shape, requires_grad=True)
    weight = anatomy.view(site).read()
    inputs: list[torch.Tensor] = []

    def scaled(y: torch.Tensor) -> torch.Tensor:
        if weight.shape[1] == 1:  # a norm
            lost = torch.zeros_like(y)
            lost[..., part.row] = y[..., part.row]
        else:
            masked = torch.zeros_like(weight)
            rows = slice(None) if part.row is None else part.row
            cols = slice(None) if part.col is None else part.col
            masked[rows, cols] = weight[rows, cols]
            lost = inputs[-1] @ masked.T
        return y + (factor[..., None] - 1) * lost

    with Tap() as tap, torch.enable_grad():
        tap.on_input(module, inputs.append)
        tap.on_output(module, scaled)
        (slope,) = torch.autograd.grad(loss(anatomy.model), factor)
    return -slope


@pytest.mark.parametrize("kind", ["row", "column", "entry", "scale"])
def test_the_bend_is_that_of_each_token(kind: str):
    anatomy = Anatomy.of(tiny_model("llama", tie_word_embeddings=False))
    named = [one for one in estimates(anatomy, WINDOWS) if one.kind == kind]
    compared = 0
    for one in named:
        if one.part.site.role == "embed":
            continue
        change = by_token(anatomy, one.part)
        size = (change * TOKENS).abs()
        bend = torch.where(size < 1, size**2 / 2, size - 0.5).sum() / TOKENS
        assert one.first == pytest.approx(float(change.sum()), rel=1e-3, abs=1e-5)
        assert one.bend == pytest.approx(float(bend), rel=1e-3, abs=1e-6)
        compared += 1
    assert compared >= 20


def test_the_largest_are_named():
    """Of all entries of mlp.down those with the largest sum of both terms, by brute force."""
    anatomy = Anatomy.of(tiny_model("llama"))
    named = [one for one in estimates(anatomy, WINDOWS) if one.kind == "row"]
    site = Site(1, "mlp.down")
    sizes = {}
    for row in range(32):
        change = by_token(anatomy, Region(site, row, None))
        size = (change * TOKENS).abs()
        bend = torch.where(size < 1, size**2 / 2, size - 0.5).sum() / TOKENS
        sizes[row] = float(change.sum().abs() + bend)
    largest = sorted(sizes, key=lambda row: -sizes[row])[:EACH_SITE]
    assert [one.part.row for one in named if one.part.site == site] == largest


def test_a_streamed_model_gives_the_same(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    loaded = estimates(Anatomy.of(model), WINDOWS)
    streamed = estimates(open_stream(str(tmp_path))[1], WINDOWS)
    assert [one.part for one in streamed] == [one.part for one in loaded]
    nats = [one.nats for one in loaded]
    assert [one.nats for one in streamed] == pytest.approx(nats, rel=1e-4)


def test_the_model_is_as_it_was():
    model = tiny_model("mixtral")
    anatomy = Anatomy.of(model)
    first = next(model.parameters())
    first.grad = torch.ones_like(first)
    before = {name: p.clone() for name, p in model.named_parameters()}
    required = [p.requires_grad for p in model.parameters()]
    estimates(anatomy, WINDOWS)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert [p.requires_grad for p in model.parameters()] == required
    kept = [p.grad is not None for p in model.parameters()]
    assert kept == [True] + [False] * (len(required) - 1)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_masked_model_has_no_next_token():
    with pytest.raises(BadInput, match="next-token"):
        estimates(Anatomy.of(tiny_model("bert")), WINDOWS)


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
