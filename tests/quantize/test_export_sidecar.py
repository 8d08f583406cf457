"""Packed weights with a sidecar patch: loaded by transformers, they are the model that was
quantized in memory, bit for bit.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub import Hub, serve
from safetensors.torch import load_file, save_file
from tiny import CONFIGS, tiny_model
from transformers import AutoModelForCausalLM, PreTrainedModel

import surgeon.quantize.formats.packing as packing
import surgeon.quantize.formats.sidecar_loader  # noqa: F401 - what loads them
from surgeon.anatomy import Anatomy, Entry, load_model
from surgeon.anatomy.load import locate
from surgeon.errors import BadCheckpoint, BadInput, BadPatch, WrongBase
from surgeon.patch import Patch, applied_patches, load, save
from surgeon.quantize import (
    Block,
    ExportPlan,
    Grid,
    QuantizeConfig,
    export_sidecar,
    quantize_,
    quantize_matrix,
)
from surgeon.quantize.formats.sidecar import CORRECTION

BLOCKS = ["tensor", "channel", "group:5", "flat:7", "square:4"]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block", BLOCKS)
def test_packing_keeps_every_code_and_wastes_no_bit(
    bits: int, symmetric: bool, block: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        packing, "_CHUNK", 32
    )  # so that small matrices are packed in several chunks
    grid = Grid(bits, symmetric, Block.parse(block))
    matrices = [quantize_matrix(torch.randn(shape), grid) for shape in ((7, 13), (8, 16), (1, 1))]
    parts = packing.parts(matrices)
    assert parts["codes"].numel() == sum(-(-q.codes.numel() // 8) * bits for q in matrices)
    for before, after in zip(matrices, packing.pieces(parts, grid), strict=True):
        assert torch.equal(before.codes.int(), after.codes.int())
        assert torch.equal(before.dequantize(), after.dequantize())


def test_codes_lie_in_the_file_as_the_docstring_says() -> None:
    codes = torch.tensor([[-3, 0, 3, 1, 2, -1, -2, 0, 3]])
    bits = [int(b) for byte in packing.pack(codes, Grid(3)) for b in reversed(f"{int(byte):08b}")]
    assert [
        sum(bit << i for i, bit in enumerate(bits[n * 3 : n * 3 + 3])) - 3 for n in range(9)
    ] == codes[0].tolist()
    with pytest.raises(ValueError, match="cannot be 10 codes"):
        packing.unpack(torch.zeros(3, dtype=torch.uint8), Grid(3), (2, 5))


def exported(
    model: PreTrainedModel, tmp_path: Path, config: QuantizeConfig, size: str = "40KB"
) -> tuple[Path, tuple[Entry, ...]]:
    anatomy = Anatomy.of(model)
    critical = (
        Entry(anatomy.downs(0)[0], 1, 2),
        Entry(anatomy.downs(1)[-1], 5, 7),
        Entry(anatomy.downs(1)[-1], 6, 8),
    )
    model.save_pretrained(tmp_path / "base", max_shard_size=size)
    export_sidecar(ExportPlan(tmp_path / "base", tmp_path / "packed", config, critical))
    return tmp_path / "packed", critical


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_architecture_in_shards(kind: str, tmp_path: Path) -> None:
    """Fused, transposed and tied tensors, and experts stored apart or as one; in bfloat16, read at
    its own width and wider.
    """
    model = tiny_model(kind).bfloat16()
    config = QuantizeConfig(Grid(4, False, Block.parse("square:10")))
    folder, critical = exported(model, tmp_path, config)
    loaded = type(model).from_pretrained(folder)
    wide = type(model).from_pretrained(folder, dtype=torch.float32)
    quantize_(Anatomy.of(model), config, critical)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, loaded.get_parameter(name)), name
        assert torch.equal(parameter.float(), wide.get_parameter(name)), name
    assert [p.made_by["operation"] for p in applied_patches(Anatomy.of(loaded))] == ["hold-out"]

    # the model is dense, and is saved as any other
    loaded.save_pretrained(tmp_path / "again")
    assert "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text())
    again = type(model).from_pretrained(tmp_path / "again")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name


def test_logits_of_the_patient_and_size_of_the_folder(tmp_path: Path) -> None:
    config = QuantizeConfig(Grid(4, True, Block.parse("group:128")))
    entries = tuple(Entry.parse(f"L0.mlp.down[88, {col}]") for col in range(0, 512, 3))
    export_sidecar(ExportPlan(locate("patient"), tmp_path / "packed", config, entries))
    reference = load_model("patient").model
    quantize_(Anatomy.of(reference), config, entries)
    ids = torch.arange(3, 99)[None]
    assert torch.equal(
        load_model(str(tmp_path / "packed")).model(ids).logits, reference(ids).logits
    )

    sizes = {
        name: t.numel() for name, t in load_file(locate("patient") / "model.safetensors").items()
    }
    packed = sum(n for name, n in sizes.items() if name.endswith("_proj.weight"))
    written = (tmp_path / "packed" / "model.safetensors").stat().st_size
    assert (
        written < 4 * (sum(sizes.values()) - packed) + packed * (4 + 32 / 128) / 8 + 16_000
    )  # headers
    assert (tmp_path / "packed" / CORRECTION).stat().st_size < 4_000 + 16 * len(entries)


@pytest.mark.slow
def test_one_import_is_all_it_takes(tmp_path: Path) -> None:
    """In a process of its own, which nothing has prepared; from a folder, and from the Hub."""
    model = tiny_model("llama")
    folder, critical = exported(model, tmp_path, QuantizeConfig(Grid(3)))
    code = (
        "import sys, surgeon.quantize.formats.sidecar_loader\n"
        "from transformers import AutoModelForCausalLM\n"
        "for name in sys.argv[1:]:\n"
        "    model = AutoModelForCausalLM.from_pretrained(name)\n"
        "    print(float(model.get_parameter('model.layers.1.mlp.down_proj.weight')[5, 7]))"
    )
    with serve(Hub({"org/packed": folder})) as hub:
        environment = {
            **os.environ,
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "0",
        }
        command = [sys.executable, "-W", "ignore", "-c", code, str(folder), "org/packed"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert [float(line) for line in done.stdout.split()] == [
        float(Anatomy.of(model).view(critical[1].site).read()[5, 7])
    ] * 2


def test_the_same_export_gives_the_same_bytes(tmp_path: Path) -> None:
    folder, critical = exported(tiny_model("mixtral"), tmp_path, QuantizeConfig(Grid(5)))
    export_sidecar(
        ExportPlan(tmp_path / "base", tmp_path / "twin", QuantizeConfig(Grid(5)), critical)
    )
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / "twin" / path.name).read_bytes(), path.name


def test_a_correction_is_found_again_after_an_interruption(tmp_path: Path) -> None:
    """The shard with the critical entries was finished by the run before, so nothing of it is in
    memory.
    """
    model = tiny_model("llama")
    folder, critical = exported(model, tmp_path, QuantizeConfig(Grid(4)), "20KB")
    calls = 0

    def stop(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 12:
            raise KeyboardInterrupt

    plan = ExportPlan(
        tmp_path / "base", tmp_path / "resumed", QuantizeConfig(Grid(4)), critical, progress=stop
    )
    with pytest.raises(KeyboardInterrupt):
        export_sidecar(plan)
    export_sidecar(plan)
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / "resumed" / path.name).read_bytes(), path.name


@pytest.mark.parametrize("method", ["rtn", "clip"])
def test_without_hold_out_there_is_no_correction(method: str, tmp_path: Path) -> None:
    model = tiny_model("llama")
    config = QuantizeConfig(Grid(4), method=method)
    folder, critical = exported(model, tmp_path, config)
    assert not (folder / CORRECTION).exists()
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    quantize_(Anatomy.of(model), config, critical)
    assert all(torch.equal(p, loaded.get_parameter(n)) for n, p in model.named_parameters())


def test_a_folder_of_the_time_when_the_hold_out_was_called_both(tmp_path: Path) -> None:
    """Its correction says so, and nothing else does."""
    model = tiny_model("llama")
    folder, critical = exported(model, tmp_path, QuantizeConfig(Grid(4)))
    new = load(folder / CORRECTION)
    assert new.made_by["method"] == "holdout"
    old = Patch(new.deltas, new.base, {**new.made_by, "method": "both"})
    save(old, folder / CORRECTION)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["correction"] = old.digest
    (folder / "config.json").write_text(json.dumps(config))
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    quantize_(Anatomy.of(model), QuantizeConfig(Grid(4)), critical)
    assert all(torch.equal(p, loaded.get_parameter(n)) for n, p in model.named_parameters())
    with pytest.raises(BadInput, match="method both is not known"):
        QuantizeConfig(Grid(4), "both")


def test_part_of_a_fused_tensor_stays_dense(tmp_path: Path) -> None:
    model = tiny_model("phi3")
    config = QuantizeConfig(Grid(4), roles=("attn.v", "mlp.down"))
    folder, critical = exported(model, tmp_path, config)
    names = {name for shard in folder.glob("*.safetensors") for name in load_file(shard)}
    assert "model.layers.0.self_attn.qkv_proj.weight" in names
    assert "model.layers.0.mlp.down_proj.weight_codes" in names
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    quantize_(Anatomy.of(model), config, critical)
    assert all(torch.equal(p, loaded.get_parameter(n)) for n, p in model.named_parameters())


def test_a_wrong_or_damaged_folder_is_refused(tmp_path: Path) -> None:
    folder, critical = exported(tiny_model("llama"), tmp_path, QuantizeConfig(Grid(4)), "5GB")
    good = (folder / CORRECTION).read_bytes()

    (folder / CORRECTION).unlink()
    with pytest.raises(BadCheckpoint, match=r"lacks surgeon_correction\.patch"):
        AutoModelForCausalLM.from_pretrained(folder)
    (folder / CORRECTION).write_bytes(good[:-3] + b"abc")
    with pytest.raises(BadPatch, match="is damaged"):
        AutoModelForCausalLM.from_pretrained(folder)
    (folder / CORRECTION).write_bytes(good)

    # a correction for other weights, and other weights under the right correction
    shutil.copytree(folder, tmp_path / "other")
    export_sidecar(
        ExportPlan(tmp_path / "base", tmp_path / "three", QuantizeConfig(Grid(3)), critical)
    )
    save(load(tmp_path / "three" / CORRECTION), tmp_path / "other" / CORRECTION)
    with pytest.raises(BadCheckpoint, match=r"not the correction that config\.json names"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "other")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight_codes"][0] ^= 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(WrongBase, match=r"L1\.mlp\.down"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_what_loading_refuses(tmp_path: Path) -> None:
    folder, _ = exported(tiny_model("llama"), tmp_path, QuantizeConfig(Grid(4)))
    with pytest.raises(BadInput, match=r"corrected in torch\.float32"):
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["version"] = 2
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadCheckpoint, match="sidecar format 2"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_checkpoint_of_several_dtypes_is_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.model.layers[0].mlp.to(torch.bfloat16)
    with pytest.raises(BadCheckpoint, match="bfloat16, float32, and a sidecar has one dtype"):
        exported(model, tmp_path, QuantizeConfig(Grid(4)))
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
