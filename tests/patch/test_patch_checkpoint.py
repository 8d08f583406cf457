"""Patches on checkpoint folders: the same as on the loaded model, all else untouched, and nothing
left behind on failure.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import CONFIGS, tiny_model
from transformers import AutoModelForCausalLM

from surgeon.anatomy import Anatomy, Entry, Site
from surgeon.anatomy.folder import model_files
from surgeon.errors import (
    BadCheckpoint,
    BadInput,
    PackedWeight,
    PatchConflict,
    Refused,
    SurgeonError,
    TiedWeight,
    WrongBase,
)
from surgeon.patch import (
    Patch,
    ablate,
    apply_to_checkpoint,
    checkpoint_address,
    compose,
    undo_on_checkpoint,
)

pytestmark = pytest.mark.usefixtures("quiet")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: t.view(torch.uint8)
        for shard in sorted(folder.glob("*.safetensors"))
        for name, t in load_file(shard).items()
    }


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def everywhere(anatomy: Anatomy) -> Patch:
    """An entry of each kind of site there is, a whole row, and expert 1 where there are experts."""
    sites = {
        (s.role, s.expert): s
        for s in anatomy.addresses
        if s.expert in (None, 1) and not anatomy.tied_to(s)
    }
    return ablate(
        anatomy,
        [f"{s}[1, 0]" for s in sites.values()] + [f"{anatomy.downs(1)[0]}[5, :]"],
        "scale:3",
    )


@pytest.mark.parametrize("size", ["5GB", "20KB"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_patched_checkpoint_is_the_patched_model(kind: str, size: str, tmp_path: Path) -> None:
    model = tiny_model(kind)
    base, patched, healed = tmp_path / "base", tmp_path / "patched", tmp_path / "healed"
    model.save_pretrained(base, max_shard_size=size)
    (base / "deep").mkdir()
    (base / "deep" / "README.md").write_text("kept")
    anatomy = Anatomy.of(model)
    patch = everywhere(anatomy)
    apply_to_checkpoint(base, [patch], patched)
    patch.apply_(anatomy)
    loaded = type(model).from_pretrained(patched)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, loaded.get_parameter(name)), name

    before, after = files(base), files(patched)
    assert set(after) - set(before) == {"surgeon_patches.json"}
    assert all(after[f] == before[f] for f in before if not f.endswith(".safetensors"))
    for shard in base.glob("*.safetensors"):
        with safe_open(shard, "pt") as old, safe_open(patched / shard.name, "pt") as new:
            assert old.metadata() == new.metadata()
            assert list(old.offset_keys()) == list(new.offset_keys())
    undo_on_checkpoint(patched, patch, healed)
    assert files(healed) == before


def test_a_fused_expert_checkpoint(tmp_path: Path) -> None:
    """Some checkpoints hold the experts of a layer as one tensor, as in memory."""
    model = tiny_model("olmoe")
    model.save_pretrained(tmp_path / "base")
    save_file(dict(model.state_dict()), tmp_path / "base" / "model.safetensors", {"format": "pt"})
    anatomy = Anatomy.of(model)
    patch = everywhere(anatomy)
    apply_to_checkpoint(tmp_path / "base", [patch], tmp_path / "patched")
    patch.apply_(anatomy)
    loaded = type(model).from_pretrained(tmp_path / "patched")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, loaded.get_parameter(name)), name


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
def test_names_without_the_prefix_of_the_base_model(kind: str, tmp_path: Path) -> None:
    model = tiny_model(kind)
    bare = {name.removeprefix(f"{model.base_model_prefix}.") for name in model.state_dict()}
    anatomy = Anatomy.of(model)
    site = Site(0, "mlp.down")
    name, packing = checkpoint_address(anatomy, site, bare)
    assert name in bare
    assert name != anatomy.addresses[site].parameter
    assert packing == anatomy.addresses[site].packing
    body = (
        Anatomy.of(model.base_model) if kind != "bert" else None
    )  # and the reverse: a body, and a checkpoint with a head
    if body is not None:
        assert (
            checkpoint_address(body, site, set(model.state_dict()))[0]
            == anatomy.addresses[site].parameter
        )
    with pytest.raises(
        BadCheckpoint, match=r"nearest names are .*1\.mlp|nearest names are .*layer\.1"
    ):
        checkpoint_address(anatomy, site, {n for n in bare if "0." not in n})


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny_model("llama").save_pretrained(tmp_path / "base", max_shard_size="20KB")
    return tmp_path / "base"


def injury(*regions: str, mode: str = "zero", **overrides: Any) -> Patch:
    return ablate(Anatomy.of(tiny_model("llama", **overrides)), regions, mode)


def test_a_stack_is_undone_in_any_order(base: Path, tmp_path: Path) -> None:
    p, q = injury("L0.mlp.down[1, :]"), injury("L0.mlp.down[2, 5]", "L1.mlp.down[0, 0]")
    apply_to_checkpoint(base, [p, q], tmp_path / "both")
    record = json.loads((tmp_path / "both" / "surgeon_patches.json").read_text())
    assert [r["digest"] for r in record["patches"]] == [p.digest, q.digest]
    for first, second in ((p, q), (q, p)):
        undo_on_checkpoint(tmp_path / "both", first, tmp_path / "one")
        undo_on_checkpoint(tmp_path / "one", second, tmp_path / "none")
        assert files(tmp_path / "none") == files(base)
        apply_to_checkpoint(base, [second], tmp_path / "alone")
        assert tensors(tmp_path / "alone").keys() == tensors(tmp_path / "one").keys()
        assert all(
            torch.equal(t, tensors(tmp_path / "one")[n])
            for n, t in tensors(tmp_path / "alone").items()
        )
        for name in ("one", "none", "alone"):
            shutil.rmtree(tmp_path / name)


def test_a_patch_made_in_fp32_fits_the_checkpoint_in_bf16(tmp_path: Path) -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    patch = ablate(Anatomy.of(model.float()), ["L0.mlp.down[1, :]"], "scale:0.3")
    assert patch.base[Site(0, "mlp.down")].dtype == "float32"
    apply_to_checkpoint(tmp_path / "base", [patch], tmp_path / "new")
    undo_on_checkpoint(tmp_path / "new", patch, tmp_path / "healed")
    assert files(tmp_path / "new") != files(tmp_path / "base") == files(tmp_path / "healed")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])  # gpt2 stores (in, out)
def test_a_low_rank_patch_comes_off_bit_for_bit(
    tmp_path: Path, dtype: torch.dtype, kind: str
) -> None:
    model = tiny_model(kind).to(dtype)
    model.save_pretrained(tmp_path / "base")
    anatomy = Anatomy.of(model)
    n_out, n_in = anatomy.view("L0.mlp.down").shape

    def low_rank(rank: int, seed: int) -> Patch:
        g = torch.Generator().manual_seed(seed)
        return Patch.low_rank(
            anatomy,
            Site(0, "mlp.down"),
            torch.randn(n_out, rank, generator=g),
            torch.randn(rank, n_in, generator=g),
        )

    first = low_rank(1, seed=1)
    with first.applied(anatomy):
        second = low_rank(2, seed=2)
    apply_to_checkpoint(tmp_path / "base", [first], tmp_path / "one")
    apply_to_checkpoint(tmp_path / "one", [second], tmp_path / "two")
    apply_to_checkpoint(tmp_path / "base", [first, second], tmp_path / "both")
    assert files(tmp_path / "both") == files(tmp_path / "two")
    with pytest.raises(PatchConflict, match="applied later"):
        undo_on_checkpoint(tmp_path / "two", first, tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()
    undo_on_checkpoint(tmp_path / "two", second, tmp_path / "back")
    assert files(tmp_path / "back") == files(tmp_path / "one") != files(tmp_path / "base")
    undo_on_checkpoint(tmp_path / "back", first, tmp_path / "healed")
    assert files(tmp_path / "healed") == files(tmp_path / "base")
    with first.applied(anatomy):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "one", dtype=dtype)
        assert torch.equal(
            Anatomy.of(loaded).view("L0.mlp.down").read(), anatomy.view("L0.mlp.down").read()
        )
    assert model_files(tmp_path / "one") == ["model.safetensors"]


def rows_of(anatomy: Anatomy, rows: list[int], size: float = 1.0) -> Patch:
    """A rank-one term that touches these rows of L0.mlp.down, whole."""
    n_out, n_in = anatomy.view("L0.mlp.down").shape
    left = torch.zeros(n_out, 1)
    left[rows] = size
    return Patch.low_rank(anatomy, Site(0, "mlp.down"), left, torch.linspace(1, 2, n_in)[None])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_low_rank_and_entries_on_one_matrix_come_off_in_any_order(
    tmp_path: Path, kind: str
) -> None:
    model = tiny_model(kind)
    model.save_pretrained(tmp_path / "base")
    anatomy = Anatomy.of(model)
    low, entries, other = (
        rows_of(anatomy, [1, 4]),
        ablate(anatomy, ["L0.mlp.down[2, 5]", "L1.mlp.down[0, 0]"]),
        rows_of(anatomy, [7]),
    )
    for patches in ((low, entries, other), (entries, low, other)):
        apply_to_checkpoint(tmp_path / "base", patches, tmp_path / "all")
        for order in permutations(patches):
            here = tmp_path / "all"
            for i, patch in enumerate(order):
                undo_on_checkpoint(here, patch, tmp_path / f"{i}")
                here = tmp_path / f"{i}"
            assert files(here) == files(tmp_path / "base")
            for i in range(3):
                shutil.rmtree(tmp_path / f"{i}")
        shutil.rmtree(tmp_path / "all")


def test_what_a_later_patch_holds_is_not_undone_before_it(tmp_path: Path) -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    anatomy = Anatomy.of(model)
    row = Site(0, "mlp.down")
    low, entries = rows_of(anatomy, [1, 4]), Patch.from_entries(anatomy, [Entry(row, 1, 5)], [1.0])
    with entries.applied(anatomy):
        # too small for bfloat16: the injured entry, set to 1, stays as it is
        over = Patch.low_rank(anatomy, row, torch.eye(32)[:, 1:2], torch.full((1, 48), 1e-4))
        before = anatomy.view(row).read().clone()
        with over.applied(anatomy):
            assert anatomy.view(row).read()[1, 5] == before[1, 5]
            assert not torch.equal(anatomy.view(row).read(), before)
    with low.applied(anatomy):
        on_top = ablate(anatomy, ["L0.mlp.down[1, 5]"])
    for below, above in ((low, on_top), (entries, over)):
        apply_to_checkpoint(tmp_path / "base", [below, above], tmp_path / "both")
        with pytest.raises((PatchConflict, WrongBase), match="later"):
            undo_on_checkpoint(tmp_path / "both", below, tmp_path / "wrong")
        undo_on_checkpoint(tmp_path / "both", above, tmp_path / "one")
        undo_on_checkpoint(tmp_path / "one", below, tmp_path / "none")
        assert files(tmp_path / "none") == files(tmp_path / "base") != files(tmp_path / "one")
        for name in ("both", "one", "none"):
            shutil.rmtree(tmp_path / name)


def test_one_patch_with_a_low_rank_term_and_entries(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "base")
    anatomy = Anatomy.of(model)
    low = rows_of(anatomy, [1])
    with low.applied(anatomy):
        both = compose(low, ablate(anatomy, ["L0.mlp.down[1, 5]", "L0.mlp.up[2, 2]"]))
    apply_to_checkpoint(tmp_path / "base", [both], tmp_path / "new")
    undo_on_checkpoint(tmp_path / "new", both, tmp_path / "healed")
    assert files(tmp_path / "healed") == files(tmp_path / "base")


def test_kept_weights_that_are_gone_or_changed(base: Path, tmp_path: Path) -> None:
    """The file of originals is checked against the record, and the tensor against the patch's
    base.
    """
    low = rows_of(Anatomy.of(tiny_model("llama")), [1])
    apply_to_checkpoint(base, [low], tmp_path / "low")
    kept = tmp_path / "low" / "surgeon_patches.undo"
    raw, held = kept.read_bytes(), load_file(kept)
    kept.unlink()
    with pytest.raises(Refused, match=r"lacks the surgeon_patches\.undo .* low-rank"):
        undo_on_checkpoint(tmp_path / "low", low, tmp_path / "new")
    kept.write_bytes(raw[:-3])
    with pytest.raises(BadCheckpoint, match="damaged"):
        undo_on_checkpoint(tmp_path / "low", low, tmp_path / "new")
    held[f"{low.digest}.L0.mlp.down.old"][3] += 1
    save_file(held, kept)
    with pytest.raises(BadCheckpoint, match="damaged"):
        undo_on_checkpoint(tmp_path / "low", low, tmp_path / "new")
    kept.write_bytes(raw)
    for path in (tmp_path / "low").glob("*.safetensors"):
        tensors = load_file(path)
        if "model.layers.0.mlp.down_proj.weight" in tensors:
            tensors["model.layers.0.mlp.down_proj.weight"][9, 9] += 1
            save_file(tensors, path, {"format": "pt"})
    with pytest.raises(WrongBase, match="something else"):
        undo_on_checkpoint(tmp_path / "low", low, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_what_is_refused(base: Path, tmp_path: Path) -> None:
    patch = injury("L0.mlp.down[1, 2]")
    apply_to_checkpoint(base, [patch], tmp_path / "once")
    low = Patch.low_rank(
        Anatomy.of(tiny_model("llama")), Site(0, "mlp.up"), torch.ones(48, 1), torch.ones(1, 32)
    )
    apply_to_checkpoint(base, [low], tmp_path / "low")
    (tmp_path / "low" / "surgeon_patches.undo").unlink()
    (tmp_path / "bare").mkdir()
    shutil.copytree(
        tmp_path / "once", tmp_path / "unlisted", ignore=lambda *_: ["surgeon_patches.json"]
    )
    cut = tmp_path / "cut"
    shutil.copytree(base, cut)
    shard = next(iter(sorted(cut.glob("*.safetensors"))))
    shard.write_bytes(shard.read_bytes()[:-5])
    garbled = tmp_path / "garbled"
    shutil.copytree(base, garbled)
    (garbled / "surgeon_patches.json").write_text("[1]")
    quantized = tmp_path / "quantized"
    shutil.copytree(base, quantized)
    there = sorted(p.name for p in tmp_path.iterdir())

    def refused(
        kind: type[SurgeonError], act: Callable[..., None], *args: Any, match: str | None = None
    ) -> None:
        with pytest.raises(kind, match=match) as error:
            act(*args)
        assert error.value.exit_status == kind.exit_status
        assert sorted(p.name for p in tmp_path.iterdir()) == there

    new = tmp_path / "new"
    refused(PatchConflict, apply_to_checkpoint, tmp_path / "once", [patch], new)
    refused(PatchConflict, apply_to_checkpoint, tmp_path / "unlisted", [patch], new)
    refused(PatchConflict, apply_to_checkpoint, base, [patch, patch], new)
    refused(WrongBase, apply_to_checkpoint, base, [patch, injury("L0.mlp.up[0, 0]", seed=1)], new)
    refused(
        WrongBase,
        apply_to_checkpoint,
        base,
        [injury("L0.mlp.down[0, 0]", intermediate_size=40)],
        new,
        match="shape",
    )
    refused(
        WrongBase,
        apply_to_checkpoint,
        base,
        [injury("L3.mlp.down[0, 0]", num_hidden_layers=4)],
        new,
        match="does not have",
    )
    refused(WrongBase, undo_on_checkpoint, base, patch, new)
    refused(Refused, undo_on_checkpoint, tmp_path / "low", low, new, match="low-rank")
    refused(BadInput, apply_to_checkpoint, base, [patch], tmp_path / "once", match="exists")
    refused(BadInput, apply_to_checkpoint, base, [patch], base / "inside", match="inside")
    refused(
        BadInput, apply_to_checkpoint, base, [patch], tmp_path / "no" / "such", match="no folder"
    )
    refused(BadInput, apply_to_checkpoint, base, [], new)
    refused(BadCheckpoint, apply_to_checkpoint, tmp_path / "bare", [patch], new)
    refused(BadCheckpoint, apply_to_checkpoint, cut, [patch], new, match="truncated")
    refused(BadCheckpoint, apply_to_checkpoint, garbled, [patch], new)
    for name, damage in (("int8", lambda t: t.to(torch.int8)), ("gone", lambda t: None)):
        for path in quantized.glob("*.safetensors"):
            kept = {n: t for n, t in load_file(base / path.name).items() if "0.mlp.down" not in n}
            changed = {
                n: damage(t) for n, t in load_file(base / path.name).items() if "0.mlp.down" in n
            }
            save_file(
                {**kept, **{n: t for n, t in changed.items() if t is not None}},
                path,
                {"format": "pt"},
            )
        if name == "gone":
            refused(BadCheckpoint, apply_to_checkpoint, quantized, [patch], new)
            config = json.loads((quantized / "config.json").read_text())
            (quantized / "config.json").write_text(
                json.dumps({**config, "quantization_config": {"quant_method": "gptq", "bits": 4}})
            )
        refused(PackedWeight, apply_to_checkpoint, quantized, [patch], new)


def test_a_tensor_changed_by_something_else_is_not_undone(base: Path, tmp_path: Path) -> None:
    p, q = injury("L0.mlp.down[1, :]"), injury("L0.mlp.down[2, 5]")
    apply_to_checkpoint(base, [p, q], tmp_path / "both")
    for path in (tmp_path / "both").glob("*.safetensors"):
        held = load_file(path)
        if "model.layers.0.mlp.down_proj.weight" in held:
            held["model.layers.0.mlp.down_proj.weight"][9, 9] += 1
            save_file(held, path, {"format": "pt"})
    with pytest.raises(WrongBase, match="something else"):
        undo_on_checkpoint(tmp_path / "both", p, tmp_path / "one")


def test_tied_weights_stored_once_and_twice(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    model.save_pretrained(tmp_path / "base")
    patch = ablate(Anatomy.of(model), ["unembed[5, 3]"])
    with pytest.raises(TiedWeight):
        apply_to_checkpoint(tmp_path / "base", [patch], tmp_path / "new")
    apply_to_checkpoint(tmp_path / "base", [patch], tmp_path / "new", allow_tied=True)
    assert type(model).from_pretrained(tmp_path / "new").transformer.wte.weight[5, 3] == 0
    held = load_file(tmp_path / "base" / "model.safetensors")
    save_file(
        {**held, "lm_head.weight": held["transformer.wte.weight"].clone()},
        tmp_path / "base" / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(Refused, match="twice"):
        apply_to_checkpoint(tmp_path / "base", [patch], tmp_path / "again", allow_tied=True)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_while_writing_leaves_nothing(
    error: BaseException, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    patch, there = injury("L0.mlp.down[1, 2]"), files(tmp_path)
    for place in ("patch.checkpoint.overwrite", "files.os.rename", "files.shutil.copyfile"):
        with monkeypatch.context() as patched:
            patched.setattr(f"surgeon.{place}", fail)
            with pytest.raises(SurgeonError if isinstance(error, OSError) else KeyboardInterrupt):
                apply_to_checkpoint(base, [patch], tmp_path / "new")
        assert files(tmp_path) == there
        assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_links_and_read_only_files(base: Path, tmp_path: Path) -> None:
    """The Hub's cache is a folder of links."""
    links = tmp_path / "links"
    links.mkdir()
    for file in base.iterdir():
        file.chmod(0o444)
        (links / file.name).symlink_to(file)
    before = files(base)
    apply_to_checkpoint(links, [injury("L0.mlp.down[1, 2]")], tmp_path / "new")
    assert files(base) == before
    assert not any(p.is_symlink() for p in (tmp_path / "new").iterdir())


def test_an_architecture_outside_the_table(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("stablelm", **CONFIGS["llama"])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "base")
    patch = ablate(Anatomy.of(model), ["L0.mlp.down[1, :]"])
    apply_to_checkpoint(tmp_path / "base", [patch], tmp_path / "new")
    assert (
        type(model).from_pretrained(tmp_path / "new").model.layers[0].mlp.down_proj.weight[1] == 0
    ).all()
