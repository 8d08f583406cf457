"""The torchao export, loaded by transformers through that library, against the model quantized in
memory.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from packed import LINEAR, in_memory
from safetensors import safe_open
from tiny import tiny_model
from transformers import AutoModelForCausalLM, TorchAoConfig

from surgeon.anatomy import Entry, Site, load_model
from surgeon.anatomy.load import locate
from surgeon.errors import BadInput, MissingExtra
from surgeon.quantize import Block, ExportPlan, Grid, QuantizeConfig, export_torchao

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.mark.parametrize(
    ("bits", "symmetric", "block", "keep", "tolerance"),
    [
        (4, True, "group:128", "8bit", 0.0),
        (3, True, "channel", "dense", 0.0),
        # an offset is shifted by half of the codes, which rounds its last bits
        (4, False, "group:32", "8bit", 1e-4),
        (8, False, "channel", "dense", 1e-4),
    ],
)
def test_logits_of_the_patient(
    bits: int, symmetric: bool, block: str, keep: str, tolerance: float, tmp_path: Path
) -> None:
    config = QuantizeConfig(Grid(bits, symmetric, Block.parse(block)))
    critical = (Entry.parse("L0.mlp.down[88, 165]"),)
    export_torchao(ExportPlan(locate("patient"), tmp_path / "packed", config, critical, keep=keep))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    reference = in_memory(load_model("patient").model, config, critical, keep)
    weights = {
        name: type(p.data).__name__
        for name, p in loaded.named_parameters()
        if name.endswith("_proj.weight")
    }
    dense = {name for name, kind in weights.items() if kind != "IntxUnpackedToInt8Tensor"}
    assert dense == ({"model.layers.0.mlp.down_proj.weight"} if keep == "dense" else set())
    ids = torch.arange(3, 99)[None]
    assert (loaded(ids).logits - reference(ids).logits).abs().max() <= tolerance
    unpacked = load_model(str(tmp_path / "packed")).model
    assert {type(p.data) for p in unpacked.parameters()} == {torch.Tensor}
    assert (unpacked(ids).logits - reference(ids).logits).abs().max() <= tolerance


@pytest.mark.parametrize("kind", LINEAR)
def test_architectures_in_shards_in_bfloat16(kind: str, tmp_path: Path) -> None:
    model = tiny_model(kind).bfloat16()
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    config = QuantizeConfig(Grid(4, True, Block.parse("group:8")))
    critical = (Entry(Site(1, "mlp.down"), 5, 7),)
    export_torchao(ExportPlan(tmp_path / "base", tmp_path / "packed", config, critical))
    assert len(list((tmp_path / "packed").glob("*.safetensors"))) > 1
    loaded = type(model).from_pretrained(tmp_path / "packed")
    reference = in_memory(model, config, critical, "8bit")
    for name, parameter in reference.named_parameters():
        own = loaded.get_parameter(name)
        assert torch.equal(
            parameter,
            own.dequantize() if type(own.data).__name__ == "IntxUnpackedToInt8Tensor" else own,
        ), name
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        # products of the same bfloat16 matrices, by another kernel
        torch.testing.assert_close(loaded(ids).logits, reference(ids).logits, rtol=0.0, atol=0.1)


def test_the_configuration_is_a_recipe_for_the_base_model(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "base")
    config = QuantizeConfig(Grid(4, True, Block.parse("group:8")))
    export_torchao(
        ExportPlan(
            tmp_path / "base", tmp_path / "packed", config, (Entry(Site(1, "mlp.down"), 5, 7),)
        )
    )
    recipe = TorchAoConfig.from_dict(
        json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=recipe)
    bits = {name: getattr(p.data, "target_dtype", None) for name, p in model.named_parameters()}
    kept = "model.layers.1.mlp.down_proj.weight"
    assert bits.pop(kept) == torch.int8
    assert {name for name, b in bits.items() if b == torch.int4} == {
        n for n in bits if n.endswith("_proj.weight")
    }
    assert set(bits.values()) == {torch.int4, None}


def test_the_same_export_gives_the_same_bytes(tmp_path: Path) -> None:
    """safetensors writes the metadata that torchao needs in another order each time."""
    tiny_model("llama").save_pretrained(tmp_path / "base", max_shard_size="40KB")
    config = QuantizeConfig(Grid(4, True, Block.parse("group:8")))
    for name in ("one", "two"):
        export_torchao(ExportPlan(tmp_path / "base", tmp_path / name, config))
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name
    for shard in (tmp_path / "one").glob("*.safetensors"):
        with safe_open(shard, "pt") as file:
            names = list(file.keys())
            packed = [name for name in names if name.endswith("_qdata")]
            assert len(file.metadata()) == 2 + len(packed)
            assert all(file.get_tensor(name).isfinite().all() for name in names)


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def attempt(kind: str, grid: Grid, dtype: torch.dtype = torch.float32) -> None:
        base = tmp_path / f"{kind}-{dtype}"
        if not base.exists():
            tiny_model(kind).to(dtype).save_pretrained(base)
        export_torchao(ExportPlan(base, tmp_path / "packed", QuantizeConfig(grid)))

    group = Block.parse("group:8")
    for block in ("tensor", "flat:64", "square:8"):
        with pytest.raises(BadInput, match=f"blocks of {block} cannot be loaded by torchao"):
            attempt("llama", Grid(4, True, Block.parse(block)))
    with pytest.raises(BadInput, match="in which torchao would round the offsets"):
        attempt("llama", Grid(4, False, group), torch.bfloat16)
    with pytest.raises(BadInput, match="weight of a FalconLinear"):
        attempt("falcon", Grid(4, True, group))
    with pytest.raises(BadInput, match="part of one tensor for all experts"):
        attempt("mixtral", Grid(4, True, group))
    for name in [n for n in sys.modules if n.startswith("torchao.prototype.safetensors")]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtra, match=r"weight-surgeon\[quantize\]"):
        attempt("llama", Grid(4, True, group))
    assert not (tmp_path / "packed").exists()
    assert not list(tmp_path.glob(".*"))
