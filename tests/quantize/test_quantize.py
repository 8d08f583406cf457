"""A model quantized in place, for the length of a block, and as tensors to swap in; the mean
squares against hooks by hand.
"""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_model

from surgeon import Anatomy, Entry
from surgeon.errors import BadInput, SurgeonError, UnknownSite
from surgeon.quantize import (
    Block,
    Grid,
    QuantizeConfig,
    RoundedWeights,
    input_mean_squares,
    prepare,
    quantize_,
    quantize_matrix,
    quantized,
    quantized_sites,
)
from surgeon.result import as_json, of_json

IDS = torch.arange(3, 35).view(2, 16)
RTN = QuantizeConfig(Grid(3, block=Block.parse("group:8")), "rtn")
HOLD = QuantizeConfig(Grid(3, block=Block.parse("flat:64")))


def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize(
    "kind", ["llama", "gpt2", "gpt_neox", "falcon", "phi3", "mixtral", "gpt_oss"]
)
def test_every_projection_is_rounded_and_the_model_comes_back(kind: str):
    """Fused, transposed and stacked weights: each site's (out, in) matrix is on its own grid, and
    all else is as it was.
    """
    model = tiny_model(kind)
    anatomy = Anatomy.of(model)
    entry = Entry(anatomy.downs()[0], 3, 5)
    before = {name: p.clone() for name, p in model.named_parameters()}
    intact = {site: anatomy.view(site).read().clone() for site in anatomy.addresses}
    own = logits(model)
    with quantized(anatomy, RTN, [entry]) as result:
        for site in anatomy.addresses:
            expected = (
                quantize_matrix(intact[site], RTN.grid).dequantize()
                if site in result.matrices
                else intact[site]
            )
            assert torch.equal(anatomy.view(site).read(), expected), site
        inside = logits(model)
    assert {s.role for s in result.matrices} >= {"attn.q", "attn.out", "mlp.up", "mlp.down"}
    assert not any(
        s.role in ("mlp.router", "embed", "unembed") or "norm" in s.role for s in result.matrices
    )
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert torch.equal(logits(model), own)
    assert not torch.allclose(inside, own)
    assert quantize_(anatomy, RTN, [entry]) == result
    assert torch.equal(logits(model), inside)


def test_the_model_comes_back_after_an_exception():
    model = tiny_model("llama")
    before = {name: (p.data_ptr(), p.clone()) for name, p in model.named_parameters()}
    with pytest.raises(ZeroDivisionError), quantized(Anatomy.of(model), RTN):
        raise ZeroDivisionError
    assert all(
        (p.data_ptr(), True) == (before[n][0], torch.equal(p, before[n][1]))
        for n, p in model.named_parameters()
    )


def test_held_entries_keep_their_bits_in_bfloat16():
    model = tiny_model("llama").to(torch.bfloat16)
    anatomy = Anatomy.of(model)
    site = anatomy.downs()[0]
    entries = [Entry(site, 3, 5), Entry(site, 4, 7), Entry(site, 3, 5)]
    old = anatomy.view(site).get(torch.tensor([3, 4]), torch.tensor([5, 7]))
    with quantized(anatomy, HOLD, entries) as result:
        assert torch.equal(anatomy.view(site).get(torch.tensor([3, 4]), torch.tensor([5, 7])), old)
        assert anatomy.view(site).dtype == torch.bfloat16
    assert result.matrices[site].held == result.held == 2  # named twice, held once
    per = {s: m.bits_per_weight for s, m in result.matrices.items()}
    assert per[site] == pytest.approx(3 + 16 * 24 / 1536 + 2 * 48 / 1536)
    assert next(iter(as_json(result)["matrices"])) == "L0.attn.q"
    assert of_json(RoundedWeights, as_json(result), "weights") == result


def test_two_preparations_do_not_meet():
    model = tiny_model("llama")
    anatomy = Anatomy.of(model)
    one, two = prepare(anatomy, RTN), prepare(anatomy, HOLD)
    with one.applied():
        first = logits(model)
    with two.applied():
        second = logits(model)
    with one.applied():
        assert torch.equal(logits(model), first)
    assert not torch.equal(first, second)


def test_mean_squares_are_those_of_the_inputs():
    model = tiny_model("llama")
    anatomy = Anatomy.of(model)
    sites = quantized_sites(anatomy, RTN)
    seen: dict[str, list[torch.Tensor]] = {}
    handles = [
        anatomy.module(s).register_forward_pre_hook(
            lambda _, args, s=s: seen.setdefault(str(s), []).append(args[0].flatten(0, 1))
        )
        for s in sites
    ]
    logits(model)
    for handle in handles:
        handle.remove()
    found = input_mean_squares(anatomy, IDS, sites)
    assert set(map(str, found)) == set(seen)
    for site, values in found.items():
        torch.testing.assert_close(values, torch.cat(seen[str(site)]).square().mean(0))


@pytest.mark.parametrize("kind", ["gpt2", "mixtral"])
def test_mean_squares_leave_out_what_is_out_of_reach(kind: str):
    anatomy = Anatomy.of(tiny_model(kind))
    sites = quantized_sites(anatomy, RTN)
    found = input_mean_squares(anatomy, IDS, sites)
    assert {s for s in sites if s not in found} == {
        s for s in sites if s.expert is not None and s.role == "mlp.down"
    }
    assert all(values.shape == (anatomy.view(s).shape[1],) for s, values in found.items())
    weighted = QuantizeConfig(Grid(3, block=Block("channel")), weighted=True)
    with quantized(anatomy, weighted, (), found) as result:
        assert {s: m.weighted for s, m in result.matrices.items()} == {s: s in found for s in sites}


def test_nothing_is_changed_by_what_cannot_be_done():
    model = tiny_model("llama")
    anatomy = Anatomy.of(model)
    site = anatomy.downs()[0]
    broken = model.get_parameter("model.layers.2.mlp.down_proj.weight")
    before = {name: p.clone() for name, p in model.named_parameters()}
    refused = [
        (QuantizeConfig(Grid(4, block=Block("group", 7), pad=False)), [], BadInput),
        (RTN, [Entry(site, 99, 0)], BadInput),
        (RTN, [Entry.parse("L9.mlp.down[0, 0]")], UnknownSite),
        (QuantizeConfig(weighted=True), [], BadInput),
        (QuantizeConfig(roles=("mlp.wide",)), [], BadInput),
    ]
    for config, entries, error in refused:
        with pytest.raises(error):
            quantize_(anatomy, config, entries)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    broken[0, 0] = torch.nan
    with pytest.raises(SurgeonError, match=r"L2\.mlp\.down holds NaN"):
        quantize_(anatomy, RTN)
    assert torch.equal(
        model.get_parameter("model.layers.0.mlp.down_proj.weight"),
        before["model.layers.0.mlp.down_proj.weight"],
    )


def test_only_the_roles_asked_for():
    anatomy = Anatomy.of(tiny_model("llama"))
    with quantized(anatomy, QuantizeConfig(roles=("mlp.down",))) as result:
        assert list(map(str, result.matrices)) == ["L0.mlp.down", "L1.mlp.down", "L2.mlp.down"]
