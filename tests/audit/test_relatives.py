"""GGUF files and LoRA adapters: the audit's numbers against those of transformers and PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tiny import saved, tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from surgeon.anatomy import Anatomy, Site
from surgeon.audit import Adapter, GgufFile, Weights, open_pair
from surgeon.errors import BadCheckpoint, BadInput

SIZES = {"hidden_size": 64, "intermediate_size": 128}


def opened(base: str, other: Path) -> Weights:
    return open_pair(base, str(other))[1]


# GGUF


def permuted(weight: Tensor, heads: int) -> Tensor:
    """As llama.cpp's converter stores q and k of Llama."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write_gguf(model: PreTrainedModel, path: Path, kind: gguf.GGMLQuantizationType) -> None:
    """A llama as llama.cpp's converter writes it, all matrices of one type."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        stem = names.get_name(name.removesuffix(".weight"))
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            tensor = permuted(
                tensor,
                config.num_attention_heads if "q_proj" in name else config.num_key_value_heads,
            )
        if tensor.dim() == 1:
            writer.add_tensor(f"{stem}.weight", tensor.numpy())
        else:
            writer.add_tensor(f"{stem}.weight", gguf.quantize(tensor.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q5_1", "Q4_0"])
def test_gguf(kind: str, tmp_path: Path) -> None:
    model = tiny_model("llama", **SIZES)
    quantized = gguf.GGMLQuantizationType[kind]
    write_gguf(model, tmp_path / "m.gguf", quantized)
    other = opened(saved(model, tmp_path / "base"), tmp_path / "m.gguf")
    assert isinstance(other, GgufFile)
    for role in ("mlp.down", "mlp.gate", "mlp.up", "attn.out", "attn.v", "attn.q", "attn.k"):
        site = Site(1, role)
        exact = Anatomy.of(model).view(site).read()
        # blocks run along the inputs, so the order of rows does not matter to the numbers
        expected = torch.from_numpy(
            gguf.dequantize(gguf.quantize(exact.numpy(), quantized), quantized)
        )
        torch.testing.assert_close(other.matrix(site), expected.float(), rtol=0, atol=0)
    assert other.matrix(Site(None, "embed")).shape == (64, 99)


@pytest.mark.filterwarnings("ignore")  # transformers' own
def test_gguf_as_transformers_reads_it(tmp_path: Path) -> None:
    model = tiny_model("llama", **SIZES)
    write_gguf(model, tmp_path / "m.gguf", gguf.GGMLQuantizationType.Q8_0)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    other = opened(saved(model, tmp_path / "base"), tmp_path / "m.gguf")
    for role in ("mlp.down", "attn.q", "attn.k", "attn.out"):
        torch.testing.assert_close(
            other.matrix(Site(2, role)),
            Anatomy.of(loaded).view(Site(2, role)).read(),
            rtol=1e-6,
            atol=1e-7,
        )


def test_gguf_of_experts(tmp_path: Path) -> None:
    """All experts of a layer are one tensor; gate and up, which the model fuses, are two."""
    model = tiny_model("qwen3_moe", **SIZES)
    anatomy = Anatomy.of(model)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "qwen3moe")
    writer.add_block_count(3)
    for role in ("gate", "up", "down"):
        stacked = np.stack(
            [anatomy.view(Site(2, f"mlp.{role}", e)).read().numpy() for e in range(4)]
        )
        writer.add_tensor(f"blk.2.ffn_{role}_exps.weight", stacked)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    other = opened(saved(model, tmp_path / "base"), tmp_path / "m.gguf")
    for role in ("gate", "up", "down"):
        site = Site(2, f"mlp.{role}", 3)
        assert torch.equal(other.matrix(site), anatomy.view(site).read())
    with pytest.raises(BadInput, match=r"no tensor for L0\.mlp\.down"):
        other.matrix(Site(0, "mlp.down", 0))
    with pytest.raises(BadInput, match="a norm"):
        other.matrix(Site(None, "final_norm"))


def test_no_gguf(tmp_path: Path) -> None:
    base = saved(tiny_model("llama"), tmp_path / "base")
    with pytest.raises(BadInput, match="no file"):
        opened(base, tmp_path / "none.gguf")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(BadCheckpoint, match="damaged or no GGUF"):
        opened(base, tmp_path / "bad.gguf")
    with pytest.raises(BadInput, match="BASE must be"):
        open_pair(str(tmp_path / "bad.gguf"), base)


# LoRA

ALL = ["down_proj", "q_proj", "embed_tokens"]
ADAPTERS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "plain": (
        "llama",
        {"r": 4, "lora_alpha": 16, "target_modules": ALL},
        ["L1.mlp.down", "L2.attn.q", "embed", "L1.mlp.up"],
    ),
    "rank-stabilized": (
        "llama",
        {"r": 4, "lora_alpha": 16, "use_rslora": True, "target_modules": ["down_proj"]},
        ["L1.mlp.down"],
    ),
    "patterns": (
        "llama",
        {
            "r": 4,
            "rank_pattern": {"layers.1.mlp.down_proj": 2},
            "alpha_pattern": {"layers.1.mlp.down_proj": 7},
            "target_modules": ["down_proj"],
        },
        ["L0.mlp.down", "L1.mlp.down"],
    ),
    "dora": ("llama", {"r": 2, "use_dora": True, "target_modules": ["down_proj"]}, ["L1.mlp.down"]),
    "conv1d": (
        "gpt2",
        {"r": 2, "fan_in_fan_out": True, "target_modules": ["c_proj", "c_attn"]},
        ["L1.mlp.down", "L1.attn.k", "L0.attn.out"],
    ),
    "fused": (
        "phi3",
        {"r": 2, "target_modules": ["gate_up_proj", "qkv_proj"]},
        ["L1.mlp.up", "L1.mlp.gate", "L1.attn.v"],
    ),
    "experts": (
        "mixtral",
        {"r": 2, "target_parameters": ["mlp.experts.down_proj"]},
        ["L1.mlp.down.e0", "L1.mlp.down.e3", "L1.mlp.up.e1"],
    ),
    "whole": (
        "llama",
        {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["down_proj"]},
        ["L1.mlp.down", "L0.attn.q"],
    ),
}


@pytest.mark.filterwarnings("ignore")  # PEFT's own
@pytest.mark.parametrize("name", ADAPTERS)
def test_lora(name: str, tmp_path: Path) -> None:
    """An adapter that PEFT saved, against the model that PEFT merges it into."""
    from peft import LoraConfig, get_peft_model

    kind, settings, sites = ADAPTERS[name]
    base = saved(tiny_model(kind), tmp_path / "base")
    model = get_peft_model(tiny_model(kind), LoraConfig(task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(0)
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = (
                1 + 0.1 * torch.rand(parameter.shape, generator=generator)
                if "magnitude" in parameter_name
                else None
            )
            noise = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.data = parameter.data * scale if scale is not None else parameter.data + noise
    model.save_pretrained(tmp_path / "adapter")
    merged = Anatomy.of(model.merge_and_unload())
    other = opened(base, tmp_path / "adapter")
    assert isinstance(other, Adapter)
    original = Anatomy.of(tiny_model(kind))
    for site in sites:
        expected = merged.view(site).read().detach()
        torch.testing.assert_close(
            other.matrix(original.resolve(site)), expected, rtol=1e-5, atol=1e-5
        )
    assert not torch.equal(merged.view(sites[0]).read(), original.view(sites[0]).read())


def test_no_adapter(tmp_path: Path) -> None:
    base = saved(tiny_model("llama"), tmp_path / "base")
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LOHA"}))
    with pytest.raises(BadInput, match="LOHA adapter"):
        opened(base, folder)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(BadCheckpoint, match="has no adapter_model"):
        opened(base, folder)
    (folder / "adapter_config.json").write_text("[")
    with pytest.raises(BadCheckpoint, match="cannot be read as an adapter"):
        opened(base, folder)
    with pytest.raises(BadInput, match="BASE must be"):
        open_pair(str(folder), base)


@pytest.mark.filterwarnings("ignore")  # PEFT's own
def test_an_adapter_of_another_model(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        tiny_model("llama", **SIZES), LoraConfig(r=2, target_modules=["down_proj"])
    )
    model.save_pretrained(tmp_path / "adapter")
    base = saved(tiny_model("llama"), tmp_path / "base")
    (tmp_path / "adapter" / "config.json").write_bytes(
        (tmp_path / "base" / "config.json").read_bytes()
    )  # as some trainers do
    with pytest.raises(BadInput, match="made on another model"):
        opened(base, tmp_path / "adapter").matrix(Site(1, "mlp.down"))
