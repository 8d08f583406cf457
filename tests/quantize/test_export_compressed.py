"""The compressed-tensors export, loaded by transformers through that library, against the model
quantized in memory.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from packed import LINEAR, in_memory
from safetensors.torch import load_file
from tiny import tiny_model
from transformers import CompressedTensorsConfig

from surgeon.anatomy import Anatomy, Entry, Site, load_model
from surgeon.anatomy.load import locate
from surgeon.errors import BadInput, MissingExtra
from surgeon.quantize import Block, ExportPlan, Grid, QuantizeConfig, export_compressed, quantize_
from surgeon.quantize.formats import RECORD

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.mark.parametrize(
    ("bits", "block", "keep"),
    [
        (4, "group:128", "8bit"),
        (3, "group:32", "dense"),
        (2, "channel", "8bit"),
        (8, "channel", "dense"),
    ],
)
def test_logits_of_the_patient(bits: int, block: str, keep: str, tmp_path: Path) -> None:
    config = QuantizeConfig(Grid(bits, True, Block.parse(block)))
    critical = (Entry.parse("L0.mlp.down[88, 165]"),)
    export_compressed(
        ExportPlan(locate("patient"), tmp_path / "packed", config, critical, keep=keep)
    )
    loaded = load_model(str(tmp_path / "packed")).model
    reference = in_memory(load_model("patient").model, config, critical, keep)
    ids = torch.arange(3, 99)[None]
    assert torch.equal(loaded(ids).logits, reference(ids).logits)

    sizes = {
        name: t.numel()
        for name, t in load_file(locate("patient") / "model.safetensors").items()
        if name.endswith("_proj.weight")
    }
    kept = sizes.pop("model.layers.0.mlp.down_proj.weight")
    saved = sum(sizes.values()) * (4 - bits / 8) + kept * (0 if keep == "dense" else 3)
    before = (locate("patient") / "model.safetensors").stat().st_size
    scales = 4 * (sum(sizes.values()) + kept) / (32 if block == "group:32" else 128)
    assert (
        tmp_path / "packed" / "model.safetensors"
    ).stat().st_size < before - saved + scales + 8_000

    record = json.loads((tmp_path / "packed" / RECORD).read_text())
    of = record["matrices"]
    assert of["L0.mlp.down"] is None if keep == "dense" else of["L0.mlp.down"]["bits"] == 8
    assert of["L1.mlp.down"]["bits"] == bits


@pytest.mark.parametrize("kind", LINEAR)
def test_architectures_in_shards(kind: str, tmp_path: Path) -> None:
    model = tiny_model(kind)
    model.save_pretrained(tmp_path / "base", max_shard_size="40KB")
    config = QuantizeConfig(Grid(4, True, Block.parse("group:8")))
    critical = (Entry(Site(1, "mlp.down"), 5, 7), Entry(Site(2, "attn.v"), 1, 1))
    fused = Anatomy.of(model).addresses[critical[1].site].packing.rows is not None
    critical = critical[:1] if fused else critical
    export_compressed(ExportPlan(tmp_path / "base", tmp_path / "packed", config, critical))
    loaded = type(model).from_pretrained(tmp_path / "packed")
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(
            loaded(ids).logits, in_memory(model, config, critical, "8bit")(ids).logits
        )


def test_a_fused_matrix_with_a_critical_part_is_kept_whole(tmp_path: Path) -> None:
    model = tiny_model("phi3")
    model.save_pretrained(tmp_path / "base")
    config = QuantizeConfig(Grid(4, True, Block.parse("group:8")))
    export_compressed(
        ExportPlan(
            tmp_path / "base",
            tmp_path / "packed",
            config,
            (Entry(Site(1, "attn.v"), 0, 3),),
            keep="dense",
        )
    )
    loaded = type(model).from_pretrained(tmp_path / "packed")
    loaded(torch.arange(3, 9)[None])  # unpacks the weights
    name = "model.layers.1.self_attn.qkv_proj.weight"
    assert torch.equal(loaded.get_parameter(name), model.get_parameter(name))


@pytest.mark.parametrize("kind", ["mixtral", "olmoe", "qwen3_moe"])
def test_experts(kind: str, tmp_path: Path) -> None:
    model = tiny_model(kind)
    model.save_pretrained(tmp_path / "base", max_shard_size="40KB")
    config = QuantizeConfig(Grid(3, True, Block.parse("group:8")))
    dense = Site(1, "mlp.down") if kind == "qwen3_moe" else Site(1, "attn.out")
    export_compressed(
        ExportPlan(tmp_path / "base", tmp_path / "packed", config, (Entry(dense, 5, 7),))
    )
    loaded = type(model).from_pretrained(tmp_path / "packed")
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(
            loaded(ids).logits, in_memory(model, config, (Entry(dense, 5, 7),), "8bit")(ids).logits
        )
    with pytest.raises(BadInput, match="an expert cannot be kept apart"):
        export_compressed(
            ExportPlan(
                tmp_path / "base",
                tmp_path / "other",
                config,
                (Entry(Site(0, "mlp.down", 2), 5, 7),),
            )
        )


def test_bfloat16_differs_by_rounding_only(tmp_path: Path) -> None:
    model = tiny_model("llama").bfloat16()
    model.save_pretrained(tmp_path / "base")
    config = QuantizeConfig(Grid(4, True, Block.parse("channel")), method="clip")
    export_compressed(ExportPlan(tmp_path / "base", tmp_path / "packed", config))
    dense = CompressedTensorsConfig(dequantize=True)
    with pytest.warns(UserWarning, match="loading attributes"):
        loaded = type(model).from_pretrained(tmp_path / "packed", quantization_config=dense)
    quantize_(Anatomy.of(model), config)
    for name, parameter in model.named_parameters():
        off = (parameter.float() - loaded.get_parameter(name).float()).abs()
        assert bool((off <= parameter.float().abs() * 2**-7).all()), name


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def attempt(kind: str, grid: Grid, **more: str) -> None:
        base = tmp_path / kind
        if not base.exists():
            tiny_model(kind).save_pretrained(base)
        export_compressed(
            ExportPlan(
                base,
                tmp_path / "packed",
                QuantizeConfig(grid),
                (Entry(Site(1, "mlp.down"), 5, 7),),
                **more,
            )
        )

    group = Block.parse("group:8")
    for grid, said in (
        (Grid(4, False, group), "asymmetric blocks of group:8 cannot be loaded"),
        (Grid(4, True, Block.parse("square:8")), "symmetric blocks of square:8 cannot be loaded"),
        (Grid(4, True, Block.parse("tensor")), "use symmetric channel or group:N"),
        (Grid(4, True, Block.parse("group:10")), "do not divide L0"),
    ):
        with pytest.raises(BadInput, match=said):
            attempt("llama", grid)
    with pytest.raises(BadInput, match="kept '4bit'"):
        attempt("llama", Grid(4, True, group), keep="4bit")
    with pytest.raises(BadInput, match="weight of a Conv1D"):
        attempt("gpt2", Grid(4, True, group))
    with pytest.raises(BadInput, match="part of one tensor for all experts"):
        attempt("gpt_oss", Grid(4, True, group))
    tiny_model("phi3").save_pretrained(tmp_path / "phi3")
    with pytest.raises(BadInput, match="name all of its roles"):
        export_compressed(
            ExportPlan(
                tmp_path / "phi3",
                tmp_path / "packed",
                QuantizeConfig(Grid(4, True, group), roles=("attn.v",)),
            )
        )
    for name in [n for n in sys.modules if n.startswith("compressed_tensors")]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtra, match=r"weight-surgeon\[quantize\]"):
        attempt("llama", Grid(4, True, group))
    assert not (tmp_path / "packed").exists()
    assert not list(tmp_path.glob(".*"))
