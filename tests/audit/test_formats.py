"""Every way to store a weight: the audit's numbers against those of the library that wrote the
file, or of its definition.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from surgeon.anatomy import Anatomy, Site
from surgeon.audit import Checkpoint
from surgeon.errors import BadCheckpoint

DOWN = Site(1, "mlp.down")
STEM = "model.layers.1.mlp.down_proj"
SIZES = {"hidden_size": 64, "intermediate_size": 128}


def small(kind: str = "llama", **more: Any) -> PreTrainedModel:
    model = tiny_model(kind, seed=3, **{**SIZES, **more})
    Anatomy.of(model).view(DOWN).stored[5, 7] = 4.0
    return model


def weight(model: PreTrainedModel, site: Site = DOWN) -> Tensor:
    return Anatomy.of(model).view(site).read().float()


def rewritten(folder: Path, settings: dict[str, Any], **parts: Tensor) -> Checkpoint:
    """The small model in `folder`, with the parts in the place of the one weight, and `settings` as
    its quantization_config.
    """
    small().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors[f"{STEM}.weight"]
    for name, tensor in parts.items():
        tensors[f"{STEM}.{name}"] = tensor.contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return Checkpoint(str(folder))


# compressed-tensors


SCHEMES: dict[str, dict[str, Any]] = {
    "pack4-group": {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": True},
    "pack3-channel": {"num_bits": 3, "strategy": "channel", "symmetric": True},
    "pack4-asymmetric": {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False},
    "int8-channel": {"num_bits": 8, "strategy": "channel", "symmetric": True},
    "int8-asymmetric": {"num_bits": 8, "strategy": "channel", "symmetric": False},
    "fp8-tensor": {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True},
    "fp8-channel": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True},
    "fp8-block": {
        "num_bits": 8,
        "type": "float",
        "strategy": "block",
        "block_structure": [48, 48],
        "symmetric": True,
    },
    "nvfp4": {
        "num_bits": 4,
        "type": "float",
        "strategy": "tensor_group",
        "group_size": 16,
        "symmetric": True,
    },
    "mxfp4": {
        "num_bits": 4,
        "type": "float",
        "strategy": "group",
        "group_size": 32,
        "symmetric": True,
    },
}


@pytest.mark.parametrize("name", SCHEMES)
def test_compressed_tensors(name: str, tmp_path: Path) -> None:
    """The module's tensors are made, compressed and decompressed by the library."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    dense = weight(small())
    form = {
        "pack": "pack-quantized",
        "int8": "int-quantized",
        "fp8-": "float-quantized",
        "nvfp": "nvfp4-pack-quantized",
    }.get(name[:4], "mxfp4-pack-quantized")
    args = QuantizationArgs(**SCHEMES[name])
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=form)
    blocks = {"tensor": dense.view(1, -1), "channel": dense, "block": None}.get(
        args.strategy, "group"
    )
    extra: dict[str, Tensor] = {}
    if isinstance(blocks, str):
        grouped = dense.view(len(dense), -1, args.group_size)
        low, high = grouped.amin(-1), grouped.amax(-1)
        if name == "nvfp4":
            extra["weight_global_scale"] = generate_gparam(dense.min(), dense.max())
    elif blocks is None:
        tiles = [
            [dense[r : r + 48, c : c + 48] for c in range(0, dense.shape[1], 48)]
            for r in range(0, len(dense), 48)
        ]
        low, high = (
            torch.stack([torch.stack([f(t) for t in row]) for row in tiles])
            for f in (torch.min, torch.max)
        )
    else:
        low, high = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
    if args.strategy == "tensor":
        low, high = low.flatten(), high.flatten()
    scale, zero = calculate_qparams(low, high, args, global_scale=extra.get("weight_global_scale"))
    state = {"weight": dense, "weight_scale": scale, "weight_zero_point": zero, **extra}
    compressor = BaseCompressor.get_value_from_registry(form)
    stored = compressor.compress(state, scheme)
    expected = compressor.decompress(stored, scheme)["weight"].float()

    settings = {"quant_method": "compressed-tensors", "format": form}
    settings["config_groups"] = {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                **args.model_dump(mode="json"),
                "num_bits": 8 if name == "pack3-channel" else args.num_bits,
            },
        },
        "group_1": {
            "targets": [r"re:.*layers\.1\.mlp\.down_proj"],
            "weights": args.model_dump(mode="json"),
        },
    }
    checkpoint = rewritten(tmp_path, settings, **stored)
    read = checkpoint.matrix(DOWN)
    assert (expected - dense).abs().max() < 2.5  # it is this matrix at all
    tolerance = 4e-3 if name == "nvfp4" else 1e-6  # for which the library computes in bfloat16
    torch.testing.assert_close(read, expected, rtol=tolerance, atol=1e-6)
    assert checkpoint.bytes_read == sum(
        t.nbytes
        for n, t in stored.items()
        if n in USED or n != "weight_zero_point" or not args.symmetric
    )


USED = ("weight", "weight_packed", "weight_scale", "weight_shape", "weight_global_scale")


# bitsandbytes


@pytest.mark.filterwarnings("ignore")  # its own, of deprecated calls to torch
@pytest.mark.parametrize("kind", ["nf4", "nf4-double", "fp4", "int8"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_bitsandbytes(kind: str, architecture: str, tmp_path: Path) -> None:
    """Quantized and saved by transformers with bitsandbytes on the CPU; gpt2 has the weights the
    other way round.
    """
    import bitsandbytes
    from transformers import BitsAndBytesConfig

    model = small() if architecture == "llama" else tiny_model("gpt2", seed=3, n_embd=64)
    model.save_pretrained(tmp_path / "dense")
    config = (
        BitsAndBytesConfig(load_in_8bit=True)
        if kind == "int8"
        else BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=kind[:3],
            bnb_4bit_use_double_quant=kind.endswith("double"),
        )
    )
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=config, device_map="cpu", dtype=torch.float32
    )
    loaded.save_pretrained(tmp_path / "packed")
    module = loaded.get_submodule(Anatomy.of(model).addresses[DOWN].module)
    if kind == "int8":
        expected = bitsandbytes.functional.int8_vectorwise_dequant(
            module.weight.data, module.weight.SCB
        )
    else:
        expected = bitsandbytes.functional.dequantize_4bit(
            module.weight.data, module.weight.quant_state
        )
    checkpoint = Checkpoint(str(tmp_path / "packed"))
    read = checkpoint.matrix(DOWN)
    assert (read - weight(model)).abs().mean() < 0.05
    torch.testing.assert_close(read, expected.float(), rtol=1e-5, atol=1e-5)


# torchao


@pytest.mark.filterwarnings("ignore")  # its own
@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
def test_torchao(kind: str, tmp_path: Path) -> None:
    from torchao.quantization import (
        Float8WeightOnlyConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
    )
    from torchao.quantization.granularity import PerGroup
    from transformers import TorchAoConfig

    small().save_pretrained(tmp_path / "dense")
    how = {
        "int8": Int8WeightOnlyConfig(version=2),
        "int4": IntxWeightOnlyConfig(torch.int4, PerGroup(32)),
        "fp8": Float8WeightOnlyConfig(),
    }[kind]
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=TorchAoConfig(how), dtype=torch.float32
    )
    loaded.save_pretrained(tmp_path / "packed")
    expected = loaded.get_submodule(STEM).weight.dequantize()
    read = Checkpoint(str(tmp_path / "packed")).matrix(DOWN)
    assert not torch.equal(read, weight(small()))
    torch.testing.assert_close(read, expected.float(), rtol=1e-6, atol=1e-6)


# GPTQ and AWQ, written from their definitions


def in_words(codes: Tensor, bits: int) -> Tensor:
    """Codes (n, lines) as words of 32 bits (n * bits / 32, lines), the first code in the lowest
    bits; by Python's own integers.
    """
    words = []
    for line in codes.T.tolist():
        number = sum(code << (bits * i) for i, code in enumerate(line))
        words.append([(number >> shift) & 0xFFFFFFFF for shift in range(0, len(line) * bits, 32)])
    return torch.tensor(words, dtype=torch.int64).to(torch.uint32).view(torch.int32).T


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_gptq(bits: int, version: str, tmp_path: Path) -> None:
    """w[in, out] = scales[g_idx[in], out] * (code - zero), zeros stored less one by `gptq`; inputs
    in an order of their own.
    """
    generator = torch.Generator().manual_seed(bits)
    n_in, n_out, groups = 128, 64, 4
    codes = torch.randint(2**bits, (n_in, n_out), generator=generator)
    zeros = torch.randint(1, 2**bits, (groups, n_out), generator=generator)
    scales = torch.rand(groups, n_out, generator=generator).half()
    order = torch.randperm(n_in, generator=generator) // (n_in // groups)
    stored = zeros - 1 if version == "gptq" else zeros
    checkpoint = rewritten(
        tmp_path,
        {"quant_method": "gptq", "bits": bits, "group_size": 32, "checkpoint_format": version},
        qweight=in_words(codes, bits),
        qzeros=in_words(stored.T, bits).T,
        scales=scales,
        g_idx=order.int(),
    )
    expected = torch.zeros(n_out, n_in)
    for i in range(n_in):
        for o in range(n_out):
            expected[o, i] = scales[order[i], o].float() * (codes[i, o] - zeros[order[i], o])
    torch.testing.assert_close(checkpoint.matrix(DOWN), expected, rtol=1e-6, atol=0)


def test_awq(tmp_path: Path) -> None:
    """AutoAWQ's gemm: of eight neighbouring columns, 0 2 4 6 1 3 5 7 fill a word from the lowest
    nibble on.
    """
    generator = torch.Generator().manual_seed(0)
    n_in, n_out, groups = 128, 64, 4
    codes = torch.randint(16, (n_in, n_out), generator=generator)
    zeros = torch.randint(16, (groups, n_out), generator=generator)
    scales = torch.rand(groups, n_out, generator=generator).half()
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def packed(numbers: Tensor) -> Tensor:
        return in_words(numbers.view(len(numbers), -1, 8)[..., order].flatten(1).T, 4).T

    settings = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 32,
        "version": "gemm",
        "zero_point": True,
    }
    checkpoint = rewritten(
        tmp_path / "a", settings, qweight=packed(codes), qzeros=packed(zeros), scales=scales
    )
    group = torch.arange(n_in) // 32
    expected = ((codes - zeros[group]) * scales[group].float()).T
    torch.testing.assert_close(checkpoint.matrix(DOWN), expected, rtol=1e-6, atol=0)
    other = rewritten(
        tmp_path / "b",
        {**settings, "version": "gemv"},
        qweight=packed(codes),
        qzeros=packed(zeros),
        scales=scales,
    )
    with pytest.raises(BadCheckpoint, match="AWQ of another kind"):
        other.matrix(DOWN)


# fp8 in blocks, mxfp4, both as transformers reads them


def test_fp8_blocks(tmp_path: Path) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    dense = weight(small())
    scale = dense.view(2, 32, 4, 32).abs().amax((1, 3)) / 448
    codes = (dense / scale.repeat_interleave(32, 0).repeat_interleave(32, 1)).to(
        torch.float8_e4m3fn
    )
    checkpoint = rewritten(
        tmp_path,
        {"quant_method": "fp8", "weight_block_size": [32, 32]},
        weight=codes,
        weight_scale_inv=scale,
    )
    expected = Fp8Dequantize(None)._dequantize_one(codes, scale, torch.float32)
    torch.testing.assert_close(checkpoint.matrix(DOWN), expected, rtol=1e-6, atol=0)
    assert (expected - dense).abs().max() < 0.2


def test_mxfp4(tmp_path: Path) -> None:
    """gpt-oss: the experts of a layer in one tensor of blocks."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    model = tiny_model("gpt_oss", hidden_size=64, intermediate_size=96)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    stem = "model.layers.1.mlp.experts.down_proj"
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(256, (4, 64, 3, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(120, 130, (4, 64, 3), dtype=torch.uint8, generator=generator)
    assert tensors.pop(stem).shape == (4, 96, 64)  # (expert, in, out)
    save_file(
        {**tensors, f"{stem}_blocks": blocks, f"{stem}_scales": scales},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    for expert in range(4):
        read = Checkpoint(str(tmp_path)).matrix(Site(1, "mlp.down", expert))
        assert torch.equal(read, expected[expert].T)


# what cannot be read


def test_unreadable(tmp_path: Path) -> None:
    integers = torch.ones(64, 128, dtype=torch.int8)
    with pytest.raises(BadCheckpoint, match="without the scales"):
        rewritten(tmp_path / "a", {}, weight=integers).matrix(DOWN)
    with pytest.raises(BadCheckpoint, match="does not hold"):
        rewritten(
            tmp_path / "b", {"quant_method": "hqq"}, W_q=integers, meta=integers.clone()
        ).matrix(DOWN)
    with pytest.raises(BadCheckpoint, match="cannot be read"):
        rewritten(tmp_path / "c", {}, weight=integers, weight_scale_inv=torch.ones(7, 3, 2)).matrix(
            DOWN
        )
    settings = {
        "quant_method": "compressed-tensors",
        "config_groups": {"g": {"targets": ["other"], "weights": {}}},
    }
    with pytest.raises(BadCheckpoint, match="does not say how"):
        rewritten(tmp_path / "d", settings, weight=integers, weight_scale=torch.ones(64, 1)).matrix(
            DOWN
        )
