"""The --tensor-type line of llama-quantize, against the gguf package's own table."""

from __future__ import annotations

import re
import shlex

import gguf
import pytest
from tiny import CONFIGS, tiny_model

from surgeon.anatomy import Anatomy, Entry, Site
from surgeon.errors import BadInput
from surgeon.quantize import TensorTypes, tensor_types
from surgeon.result import as_json, of_json

WITHOUT_GGUF = {"opt"}


@pytest.mark.parametrize("kind", sorted(CONFIGS.keys() - WITHOUT_GGUF))
def test_every_critical_matrix_is_a_tensor_of_the_architecture(kind: str) -> None:
    anatomy = Anatomy.of(tiny_model(kind))
    layer = 0 if kind == "qwen3_moe" else 1  # llama.cpp has no dense layers in that architecture
    sites = [
        s
        for s in anatomy.addresses
        if s.layer == layer and s.role.startswith(("attn.", "mlp.")) and s.expert in (None, 3)
    ]
    # the right-hand side of the table: the names that llama.cpp itself gives the tensors of a layer
    own = {
        template.format(bid=layer) + ".weight": tensor
        for tensor, template in gguf.TENSOR_NAMES.items()
        if "{bid}" in template
    }
    for site in sites:
        ((name, held),) = tensor_types(anatomy, [site]).tensors.items()
        assert held == (site,)
        part = site.role.rpartition(".")[2]
        expected = {
            "attn": {f"ATTN_{part.upper()}", "ATTN_QKV"},
            "mlp": {f"FFN_{part.upper()}", f"FFN_{part.upper()}_EXP", "FFN_UP"},
        }[site.role.partition(".")[0]]
        expected |= (
            {"ATTN_OUT"} if part == "out" else {"FFN_GATE_INP"} if part == "router" else set()
        )
        assert own[name].name in expected


def test_the_line_matches_its_tensors_and_no_other() -> None:
    anatomy = Anatomy.of(tiny_model("llama", num_hidden_layers=12))
    wanted = tensor_types(
        anatomy,
        [Entry(Site(1, "mlp.down"), 3, 4), Entry(Site(1, "mlp.down"), 3, 5), Site(11, "mlp.down")],
        "f16",
    )
    assert list(wanted.tensors) == ["blk.1.ffn_down.weight", "blk.11.ffn_down.weight"]
    words = shlex.split(wanted.line)
    assert words == wanted.flags
    assert words[::2] == ["--tensor-type"] * 2
    patterns = [w.partition("=")[0] for w in words[1::2]]
    everything = [
        f"blk.{i}.{t}.weight"
        for i in range(112)
        for t in ("ffn_down", "ffn_up", "ffn_down_exps", "attn_q")
    ]
    assert [t for t in everything if any(re.search(p, t) for p in patterns)] == list(wanted.tensors)
    assert {w.partition("=")[2] for w in words[1::2]} == {"f16"}
    document = as_json(wanted)
    assert document["tensors"]["blk.1.ffn_down.weight"] == ["L1.mlp.down"]
    assert (document["kind"], document["line"]) == ("f16", wanted.line)
    assert of_json(TensorTypes, document, "gguf") == wanted


def test_refusals() -> None:
    with pytest.raises(BadInput, match="no architecture for opt"):
        tensor_types(Anatomy.of(tiny_model("opt")), [Site(0, "mlp.down")])
    llama = Anatomy.of(tiny_model("llama"))
    with pytest.raises(BadInput, match="use q8_0"):
        tensor_types(llama, [Site(0, "mlp.down")], "q3")
    with pytest.raises(BadInput, match=r"no tensor for L1\.mlp\.down"):
        tensor_types(Anatomy.of(tiny_model("qwen3_moe")), [Site(1, "mlp.down")])
