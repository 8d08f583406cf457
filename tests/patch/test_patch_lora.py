"""Patches as LoRA adapters, loaded by PEFT itself."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny import tiny_model

from surgeon.anatomy import Anatomy, Site
from surgeon.errors import BadInput, Refused
from surgeon.patch import Patch, ablate, compose, export_lora

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # PEFT asks for it
IDS = torch.arange(24).view(2, 12)


def adapted(anatomy: Anatomy, patch: Patch, folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the model with the adapter, and with the patch."""
    export_lora(patch, folder)
    with torch.no_grad():
        by_adapter = PeftModel.from_pretrained(copy.deepcopy(anatomy.model), folder)(
            input_ids=IDS
        ).logits
        with patch.applied(anatomy):
            return by_adapter, anatomy.model(input_ids=IDS).logits


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(
    ("at", "rank"),
    [
        (["L0.mlp.down[5, :]"], 1),
        (["L0.mlp.down[:, 7]"], 1),
        (["L0.mlp.down[5, 7]", "L0.mlp.down[5, 9]", "L0.mlp.down[6, 1]"], 2),
        (["L0.mlp.down[5, :]", "L1.mlp.down[3, 4]", "L1.mlp.down[4, 5]", "L1.attn.out[2, :]"], 2),
    ],
)
def test_the_adapter_computes_the_same_logits(
    tmp_path: Path, kind: str, at: list[str], rank: int
) -> None:
    anatomy = Anatomy.of(tiny_model(kind))
    found, wanted = adapted(anatomy, ablate(anatomy, at, "flip"), tmp_path / "adapter")
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {t.shape[0] for name, t in weights.items() if "lora_A" in name} == {rank}


def test_low_rank_and_entries_on_one_matrix_add_up(tmp_path: Path) -> None:
    anatomy = Anatomy.of(tiny_model("llama"))
    g = torch.Generator().manual_seed(0)
    term = Patch.low_rank(
        anatomy,
        Site(1, "mlp.down"),
        torch.randn(32, 2, generator=g),
        torch.randn(2, 48, generator=g),
    )
    with term.applied(anatomy):
        entries = ablate(anatomy, ["L1.mlp.down[3, :]"])
    found, wanted = adapted(anatomy, compose(term, entries), tmp_path / "adapter")
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["mixtral", "olmoe"])
def test_experts_are_targeted_as_parameters(tmp_path: Path, kind: str) -> None:
    anatomy = Anatomy.of(tiny_model(kind))
    patch = ablate(
        anatomy, ["L1.mlp.down.e2[5, :]", "L1.mlp.down.e0[3, 4]", "L1.mlp.down.e0[4, 5]"], "flip"
    )
    found, wanted = adapted(anatomy, patch, tmp_path / "adapter")
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_the_same_patch_gives_the_same_bytes(tmp_path: Path) -> None:
    anatomy = Anatomy.of(tiny_model("llama"))
    patch = ablate(anatomy, ["L0.mlp.down[5, :]"])
    for name in "ab":
        export_lora(patch, tmp_path / name)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_what_no_adapter_can_hold_is_refused(tmp_path: Path) -> None:
    llama, phi = Anatomy.of(tiny_model("llama")), Anatomy.of(tiny_model("phi3"))
    for patch, why in (
        (ablate(llama, ["embed[3, 4]"]), "no projection"),
        (ablate(llama, ["final_norm[3, 0]"]), "no projection"),
        (ablate(phi, ["L0.mlp.gate[3, 4]"]), "part of the fused matrix"),
    ):
        with pytest.raises(Refused, match=why):
            export_lora(patch, tmp_path / "no")
    (tmp_path / "there").mkdir()
    with pytest.raises(BadInput, match="exists already"):
        export_lora(ablate(llama, ["L0.mlp.down[5, :]"]), tmp_path / "there")
    assert [p.name for p in tmp_path.iterdir()] == ["there"]
