"""A streamed model is the same function as the loaded one, and holds one layer at a time."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import CONFIGS, tiny_model

from surgeon.anatomy import Anatomy, Region, Site, load_model, open_stream, prove
from surgeon.errors import BadCheckpoint, BadInput, PackedWeight, Refused, UnknownArchitecture
from surgeon.measure import mean_nll
from surgeon.patch import ablate
from surgeon.tap import LayerInput, Tap, layer_calls, resume, returns_tuple

IDS = torch.arange(5, 45).view(2, 20)
CAUSAL = [t for t in CONFIGS if t != "bert"]


def saved(folder, model_type="llama", **overrides):
    """A tiny model as a checkpoint of several shards."""
    tiny_model(model_type, **overrides).save_pretrained(folder, max_shard_size="50KB")
    return str(folder)


def held(anatomy):
    """The parts of a streamed model that are in memory now."""
    return [
        p
        for p in anatomy._parts
        if not any(w.is_meta for w in anatomy.model.get_submodule(p).parameters())
    ]


@pytest.mark.parametrize("model_type", CAUSAL)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_logits_are_the_same_bits(model_type, dtype, tmp_path):
    folder = saved(tmp_path, model_type)
    loaded, streamed = load_model(folder, dtype), open_stream(folder, dtype)
    assert torch.equal(
        streamed[0].model(IDS, use_cache=False).logits, loaded.model(IDS, use_cache=False).logits
    )
    assert streamed[1].fingerprint() == loaded.fingerprint
    assert open_stream(folder, dtype, whole=False)[1].fingerprint() is None
    assert held(streamed[1]) == []
    for site in (Site(0, "attn.v"), *streamed[1].downs(1)):
        assert torch.equal(
            streamed[1].view(site).read(), Anatomy.of(loaded.model).view(site).read()
        )


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral", "qwen3_moe"])
def test_one_layer_is_in_memory_at_a_time(model_type, tmp_path):
    _, anatomy = open_stream(saved(tmp_path, model_type))
    seen = []
    with Tap() as tap:
        for index in range(len(anatomy.layers)):
            tap.on_input(
                anatomy.module(anatomy.downs(index)[0]), lambda _: seen.append(held(anatomy))
            )
        tap.run(anatomy.model, IDS)
    assert seen == [[p] for p in anatomy._parts[:3]]


@pytest.mark.parametrize("model_type", ["gpt2", "qwen3_moe", "phi3"])
def test_the_map_is_proved(model_type, tmp_path):
    folder = saved(tmp_path, model_type)
    _, anatomy = open_stream(folder)
    assert prove(anatomy) == prove(Anatomy.of(load_model(folder).model))
    assert held(anatomy) == []


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2"])
def test_zeroed_norms_are_what_ablation_makes_of_them(model_type, tmp_path):
    folder = saved(tmp_path, model_type)
    loaded = load_model(folder).model
    other = Anatomy.of(loaded)
    _, anatomy = open_stream(folder)
    inner = next(site for site in other.addresses if site.layer == 1 and "norm" in site.role)
    regions = [Region(Site(None, "final_norm"), 3, 0), Region(inner, 5, 0)]
    with ablate(other, regions).applied(other), anatomy.zeroed(regions):
        assert torch.equal(
            anatomy.model(IDS, use_cache=False).logits, loaded(IDS, use_cache=False).logits
        )
        assert torch.equal(anatomy.view(inner).read(), other.view(inner).read())
    with ablate(other, regions).applied(other), anatomy.holding(1), anatomy.zeroed(regions):
        assert torch.equal(anatomy.view(inner).read(), other.view(inner).read())


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral", "gpt_oss"])
def test_zeroed_is_what_ablation_does(model_type, tmp_path):
    folder = saved(tmp_path, model_type)
    loaded = load_model(folder).model
    other = Anatomy.of(loaded)
    _, anatomy = open_stream(folder)
    one, two = anatomy.downs(1)[0], anatomy.downs(2)[-1]
    regions = [Region(one, 3, 4), Region(one, 3, None), Region(two, None, 5)]
    with (
        ablate(other, regions).applied(other),
        anatomy.zeroed(regions[:1]),
        anatomy.zeroed(regions[1:]),
    ):
        assert torch.equal(
            anatomy.model(IDS, use_cache=False).logits, loaded(IDS, use_cache=False).logits
        )
        assert torch.equal(anatomy.view(one).read(), other.view(one).read())
    with anatomy.holding(1), anatomy.holding(2):
        with anatomy.zeroed(regions):
            assert not anatomy.view(two).read()[:, 5].any()
        assert torch.equal(anatomy.view(one).read(), other.view(one).read())
        assert torch.equal(anatomy.view(two).read(), other.view(two).read())
    assert torch.equal(
        anatomy.model(IDS, use_cache=False).logits, loaded(IDS, use_cache=False).logits
    )
    assert mean_nll(anatomy.model, IDS) == mean_nll(loaded, IDS)


def test_a_weight_on_disk_refuses_to_be_changed(tmp_path):
    _, anatomy = open_stream(saved(tmp_path))
    with pytest.raises(Refused, match="streamed model"):
        ablate(anatomy, [Region(Site(1, "mlp.down"), 3, 4)]).apply_(anatomy)


def test_an_error_in_a_layer_leaves_nothing_in_memory(tmp_path):
    _, anatomy = open_stream(saved(tmp_path))

    def fail(_):
        raise RuntimeError("on purpose")

    with Tap() as tap:
        tap.on_input(anatomy.module(Site(1, "mlp.down")), fail)
        with pytest.raises(RuntimeError, match="on purpose"):
            tap.run(anatomy.model, IDS)
    assert held(anatomy) == []
    shard = next(
        tmp_path / s.shard for n, s in anatomy.shards.stored.items() if "layers.2.mlp.down" in n
    )
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(BadCheckpoint, match="ends before byte"):
        anatomy.model(IDS)
    assert held(anatomy) == []


def test_tied_and_untied_heads(tmp_path):
    for tied in (True, False):
        folder = saved(tmp_path / str(tied), tie_word_embeddings=tied)
        _, anatomy = open_stream(folder)
        assert ("lm_head" in anatomy._parts) is not tied
        with anatomy.holding(None):
            assert torch.equal(anatomy.model(IDS).logits, load_model(folder).model(IDS).logits)


def test_what_cannot_be_streamed_is_said(tmp_path):
    folder = tmp_path / "model"
    saved(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    lacking = shutil.copytree(folder, tmp_path / "lacking")
    name = "model.layers.1.mlp.down_proj.weight"
    shard = lacking / index["weight_map"][name]
    save_file({n: t for n, t in load_file(shard).items() if n != name}, shard)
    with pytest.raises(BadCheckpoint, match=r"lacks weights.*layers\.1\.mlp\.down_proj"):
        open_stream(str(lacking))
    save_file({**load_file(shard), name: torch.zeros(3, 4)}, shard)
    with pytest.raises(BadCheckpoint, match="another shape"):
        open_stream(str(lacking))
    config = json.loads((folder / "config.json").read_text())
    for change, error, what in (
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            PackedWeight,
            "is quantized",
        ),
        (
            {"model_type": "starcoder2", "architectures": ["Starcoder2ForCausalLM"]},
            UnknownArchitecture,
            "table of architectures",
        ),
    ):
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(error, match=what):
            open_stream(str(folder))
    for name, dtype, what in (
        ("nowhere", "auto", "no model folder"),
        (str(folder), "float3", "not known"),
    ):
        with pytest.raises(BadInput, match=what):
            open_stream(name, dtype)


@pytest.mark.parametrize("model_type", CAUSAL)
def test_layers_called_one_by_one_give_the_same_bits(model_type):
    """What `layer_calls` recorded, the layers in a row, and the model's own end."""
    model = tiny_model(model_type)
    layers = Anatomy.of(model).layers
    as_tuple = returns_tuple(model, layers, input_ids=IDS[:1, :2])
    states, calls = layer_calls(model, layers, as_tuple, input_ids=IDS)
    for call, layer in zip(calls, layers, strict=True):
        states = call(layer, states)
    with resume(layers, LayerInput(len(layers), states, as_tuple)):
        assert torch.equal(model(IDS, use_cache=False).logits, model_logits(model_type))
    assert not any("forward" in layer.__dict__ for layer in layers)


def model_logits(model_type):
    return tiny_model(model_type)(IDS, use_cache=False).logits
