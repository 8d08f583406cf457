"""Tapped passes equal plain ones bit for bit, and leave nothing behind, whatever happens."""

import pytest
import torch
from tiny import CONFIGS, tiny_model

from surgeon.anatomy import Anatomy
from surgeon.tap import Tap, capture, first_tensor, resume

IDS = torch.arange(5, 45).view(2, 20)
CAUSAL = [t for t in CONFIGS if t != "bert"]


def hooks(model):
    return [
        m
        for m in model.modules()
        if m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__
    ]


@pytest.mark.parametrize("model_type", CONFIGS)
def test_watching_changes_no_bit(model_type):
    model = tiny_model(model_type)
    anatomy = Anatomy.of(model)
    plain = model(IDS).logits
    seen = []
    with Tap() as tap:
        for layer in anatomy.layers:
            tap.on_input(layer, lambda x: seen.append(x.shape))
            tap.on_output(layer, lambda y: seen.append(y.shape))
        for site in anatomy.downs():
            tap.on_call(anatomy.module(site), lambda args: seen.append(len(args)))
        tapped = tap.run(model, IDS).logits
    assert torch.equal(plain, tapped)
    assert seen.count(torch.Size([2, 20, 32])) == 6
    assert not hooks(model)


@pytest.mark.parametrize("model_type", CAUSAL)
def test_resuming_gives_the_same_bits(model_type):
    model = tiny_model(model_type)
    layers = Anatomy.of(model).layers
    plain = model(IDS, use_cache=False).logits
    for start in (1, 2):
        entry = capture(model, layers, start, input_ids=IDS)
        ran = []
        with resume(layers, entry), Tap() as tap:
            tap.on_output(layers[start], lambda _, ran=ran: ran.append("here"))
            assert torch.equal(model(IDS, use_cache=False).logits, plain)
        assert ran == ["here"]
        assert not hooks(model)


def test_resuming_really_skips_the_lower_layers():
    model = tiny_model("llama")
    anatomy = Anatomy.of(model)
    plain = model(IDS, use_cache=False).logits
    entry = capture(model, anatomy.layers, 1, input_ids=IDS)
    anatomy.view("L0.mlp.down").assign_(torch.zeros(32, 48))
    with resume(anatomy.layers, entry):
        assert torch.equal(model(IDS, use_cache=False).logits, plain)
    assert not torch.equal(model(IDS, use_cache=False).logits, plain)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bloom", "gptj"])
def test_replacing_an_output_acts_downstream(model_type):
    model = tiny_model(model_type)
    layer = Anatomy.of(model).layers[1]
    plain = model(IDS).logits
    with Tap() as tap:
        tap.on_output(layer, torch.zeros_like)
        replaced = tap.run(model, IDS).logits
    assert not torch.allclose(plain, replaced)
    # with the residual stream zeroed after layer 1, no token can matter any more, only positions
    assert torch.allclose(replaced[0], replaced[1], atol=1e-5)
    assert torch.equal(model(IDS).logits, plain)


def test_replacing_an_input_acts():
    model = tiny_model("llama")
    layer = Anatomy.of(model).layers[2]
    with Tap() as tap:
        tap.on_input(layer, lambda x: x * 0)
        seen = []
        tap.on_input(layer, lambda x: seen.append(x))
        tap.run(model, IDS)
    assert seen[0].abs().max() == 0


def test_stopping_early_runs_nothing_further():
    model = tiny_model("llama")
    layers = Anatomy.of(model).layers
    ran = []
    with Tap() as tap:
        for index, layer in enumerate(layers):
            tap.on_output(layer, lambda _, index=index: ran.append(index))
        tap.stop_after(layers[1])
        assert tap.run(model, IDS) is None
    assert ran == [0, 1]
    assert not hooks(model)


def test_an_exception_in_a_watcher_leaves_the_model_clean():
    model = tiny_model("llama")
    layers = Anatomy.of(model).layers
    plain = model(IDS).logits

    def fail(_):
        raise RuntimeError("watcher")

    with Tap() as tap:
        tap.on_output(layers[0], fail)
        with pytest.raises(RuntimeError, match="watcher"):
            tap.run(model, IDS)
    entry = capture(model, layers, 2, input_ids=IDS)
    with pytest.raises(RuntimeError, match="inside"), resume(layers, entry):
        raise RuntimeError("inside")
    assert not hooks(model)
    assert torch.equal(model(IDS).logits, plain)


def test_resume_keeps_a_forward_that_someone_else_set():
    model = tiny_model("llama")
    layers = Anatomy.of(model).layers
    own = layers[0].forward
    layers[0].forward = own
    entry = capture(model, layers, 1, input_ids=IDS)
    with resume(layers, entry):
        pass
    assert layers[0].__dict__["forward"] is own


def test_what_cannot_be_resumed_is_refused():
    model = tiny_model("llama")
    layers = Anatomy.of(model).layers
    for start in (0, 3):
        with pytest.raises(ValueError, match=r"1\.\.2"):
            capture(model, layers, start, input_ids=IDS)
    with pytest.raises(TypeError, match="tensor"):
        first_tensor({"a": 1})
