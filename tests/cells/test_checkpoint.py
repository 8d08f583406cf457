"""The published layout, there and back; every tensor accounted for, and nothing but tensors
read.
"""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from surgeon.anatomy import Entry
from surgeon.audit import Watched, audit
from surgeon.cells import CellConfig, ScGPT, load_cells, make_vocab, save_cells
from surgeon.cells.checkpoint import LoadReport, require_free
from surgeon.errors import BadCheckpoint, BadInput, PatchConflict
from surgeon.patch import ablate
from surgeon.studies.cell_patches import CellWeights, patch_cells

GENES = [f"G{i}" for i in range(20)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint as published: no head over bins, flash-attn's names, a pickle of tensors
    alone.
    """
    torch.manual_seed(0)
    vocab = make_vocab(GENES)
    model = ScGPT(
        CellConfig(n_tokens=23, d_model=16, n_heads=2, d_mlp=24, n_layers=2, pad_id=vocab["<pad>"])
    )
    torch.nn.init.ones_(model.layers[0].norm2.bias)
    return publish(tmp_path / "m", model, vocab)


def publish(folder: Path, model: ScGPT, vocab: dict[str, int]) -> Path:
    """Save a model under flash-attn's names, with heads that no reading here needs, pickled."""
    save_cells(folder, model, vocab)
    d = model.shape.d_model
    heads = {
        "flag_encoder.weight": torch.ones(2, d),
        "mvc_decoder.gene2query.weight": torch.ones(d, d),
        "mvc_decoder.W.weight": torch.ones(d, d),
        "cls_decoder._decoder.2.weight": torch.ones(d),
    }
    state = {
        name.replace("self_attn.in_proj_", "self_attn.Wqkv."): tensor
        for name, tensor in model.state_dict().items()
    }
    torch.save({**state, **heads}, folder / "best_model.pt")
    (folder / "model.safetensors").unlink()
    return folder


HEADS = [
    "cls_decoder._decoder.2.weight",
    "flag_encoder.weight",
    "mvc_decoder.W.weight",
    "mvc_decoder.gene2query.weight",
]


def change(folder: Path, **changes: Any) -> None:
    """Replace tensors of best_model.pt; None removes one."""
    state = torch.load(folder / "best_model.pt", weights_only=True)
    for name, tensor in changes.items():
        state.pop(name.replace("__", "."), None)
        if tensor is not None:
            state[name.replace("__", ".")] = tensor
    torch.save(state, folder / "best_model.pt")


def test_a_published_checkpoint_loads_with_every_tensor_matched(folder: Path):
    raw = torch.load(folder / "best_model.pt", weights_only=True)
    assert "transformer_encoder.layers.1.self_attn.Wqkv.weight" in raw
    loaded = load_cells(folder)
    assert loaded.report == LoadReport("best_model.pt", len(raw) - len(HEADS), HEADS, 4)
    assert all(torch.equal(tensor, raw[name]) for name, tensor in loaded.others.items())
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(tensor, raw[name.replace("self_attn.in_proj_", "self_attn.Wqkv.")])
    assert not loaded.model.training
    assert (loaded.model.reading, loaded.tokens.include_zeros, loaded.tokens.max_length) == (
        "regression",
        False,
        1200,
    )
    assert (loaded.marginal, loaded.training) == (None, {})


def test_the_head_over_bins_is_told_from_the_tensors(tmp_path: Path):
    vocab = make_vocab(GENES)
    sizes = {"n_tokens": 23, "d_model": 16, "n_heads": 2, "d_mlp": 24, "n_layers": 2}
    shape = CellConfig(**sizes, pad_id=vocab["<pad>"], categorical=True)
    save_cells(tmp_path, ScGPT(shape), vocab)
    loaded = load_cells(tmp_path)
    assert (loaded.model.shape, loaded.report.unmatched) == (shape, [])


def test_a_folder_that_holds_a_model_is_not_free(folder: Path, tmp_path: Path):
    with pytest.raises(BadInput, match="holds a model already"):
        require_free(folder)
    require_free(tmp_path / "new")


def test_a_patched_copy_keeps_what_it_does_not_compute_with(folder: Path, tmp_path: Path):
    anatomy = load_cells(folder).model.anatomy
    patch = ablate(
        anatomy, ["L1.mlp.down[3, 7]", "L0.norm.norm2[5, 0]", "L0.norm.norm2.bias[:, 0]"]
    )
    patch_cells(folder, [patch], tmp_path / "patched")
    broken = load_cells(tmp_path / "patched")
    assert broken.report.unmatched == HEADS
    assert broken.model.layers[1].linear2.weight[3, 7] == 0
    assert not broken.model.layers[0].norm2.bias.any()
    base, other = CellWeights(str(folder)), CellWeights(str(tmp_path / "patched"))
    entries = tuple(Entry.parse(e) for e in ("L1.mlp.down[3, 7]", "L0.norm.norm2[5, 0]"))
    audited = audit(base, other, [Watched(entries)])
    assert (audited.verdict, [e.other for e in audited.entries]) == ("red", [0.0, 0.0])
    with pytest.raises(PatchConflict):
        patch_cells(tmp_path / "patched", [patch], tmp_path / "twice")
    assert not (tmp_path / "twice").exists()
    with pytest.raises(BadInput, match="exists already"):
        patch_cells(folder, [patch], tmp_path / "patched")
    patch_cells(tmp_path / "patched", [patch], tmp_path / "back", undo=True)
    first, second = (load_cells(f).model.state_dict() for f in (folder, tmp_path / "back"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_unmatched_tensors_are_listed(folder: Path):
    before = load_cells(folder)
    change(folder, discriminator__weight=torch.ones(3), module__extra=torch.ones(1))
    loaded = load_cells(folder)
    assert loaded.report.unmatched == sorted([*HEADS, "discriminator.weight", "module.extra"])
    assert loaded.fingerprint != before.fingerprint


@pytest.mark.parametrize(
    ("missing", "match"),
    [
        (
            "transformer_encoder__layers__1__linear2__weight",
            r"lacks transformer_encoder\.layers\.1\.linear2\.weight",
        ),
        (
            "transformer_encoder__layers__0__linear2__bias",
            r"lacks transformer_encoder\.layers\.0\.linear2\.bias",
        ),
        ("value_encoder__norm__weight", r"lacks value_encoder\.norm\.weight"),
        ("encoder__embedding__weight", "no scGPT checkpoint"),
    ],
)
def test_missing_tensors_are_refused(folder: Path, missing: str, match: str):
    change(folder, **{missing: None})
    with pytest.raises(BadCheckpoint, match=match):
        load_cells(folder)


def test_a_whole_layer_missing_is_missed(folder: Path):
    state = torch.load(folder / "best_model.pt", weights_only=True)
    torch.save({k: v for k, v in state.items() if ".layers.1." not in k}, folder / "best_model.pt")
    with pytest.raises(BadCheckpoint, match=r"layers\.1\.linear2"):
        load_cells(folder)


def test_other_shapes_and_other_architectures_are_refused(folder: Path):
    change(folder, decoder__fc__4__weight=torch.ones(1, 17))
    with pytest.raises(BadCheckpoint, match="does not fit"):
        load_cells(folder)
    change(folder, decoder__fc__4__weight=torch.ones(1, 16), dsbn__bns__0__weight=torch.ones(16))
    with pytest.raises(BadCheckpoint, match="dsbn"):
        load_cells(folder)
    change(folder, dsbn__bns__0__weight=None)
    args = json.loads((folder / "args.json").read_text())
    for key, value, match in (
        ("pre_norm", True, "norms before"),
        ("input_emb_style", "category", "category values"),
        ("nheads", 3, "divide"),
    ):
        (folder / "args.json").write_text(json.dumps({**args, key: value}))
        with pytest.raises(BadCheckpoint, match=match):
            load_cells(folder)


class Harm:
    def __reduce__(self) -> Any:
        return (print, ("code ran",))


def test_pickles_of_more_than_tensors_are_never_opened(
    folder: Path, capsys: pytest.CaptureFixture[str]
):
    for content in (Harm(), {"encoder.embedding.weight": Harm()}):
        torch.save(content, folder / "best_model.pt")
        with pytest.raises(BadCheckpoint, match="more than tensors"):
            load_cells(folder)
    (folder / "best_model.pt").write_bytes(pickle.dumps(Harm()))
    with pytest.raises(BadCheckpoint):
        load_cells(folder)
    torch.save({"state": {"a": torch.ones(1)}}, folder / "best_model.pt")
    with pytest.raises(BadCheckpoint, match="plain table"):
        load_cells(folder)
    assert "code ran" not in capsys.readouterr().out


def test_files_that_are_not_there_or_damaged(folder: Path, tmp_path: Path):
    whole = (folder / "best_model.pt").read_bytes()
    (folder / "best_model.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadCheckpoint, match="damaged"):
        load_cells(folder)
    (folder / "best_model.pt").unlink()
    with pytest.raises(BadCheckpoint, match="neither"):
        load_cells(folder)
    (folder / "vocab.json").write_text("[1]")
    with pytest.raises(BadCheckpoint, match="no JSON object"):
        load_cells(folder)
    with pytest.raises(BadCheckpoint, match=r"args\.json cannot be read"):
        load_cells(tmp_path / "nowhere")


def test_a_vocabulary_of_another_model_is_refused(folder: Path):
    vocab = json.loads((folder / "vocab.json").read_text())
    (folder / "vocab.json").write_text(json.dumps({**vocab, "extra": 23}))
    with pytest.raises(BadCheckpoint, match="numbers genes up to 23, the model knows 23"):
        load_cells(folder)
    del vocab["<pad>"]
    (folder / "vocab.json").write_text(json.dumps(vocab))
    with pytest.raises(BadCheckpoint, match="no <pad>"):
        load_cells(folder)


def test_special_tokens_are_put_behind_the_genes_where_there_is_room(folder: Path):
    whole = json.loads((folder / "vocab.json").read_text())
    (folder / "vocab.json").write_text(
        json.dumps({name: i for name, i in whole.items() if name in GENES})
    )
    assert load_cells(folder).vocab == whole == make_vocab(GENES)


def test_a_trained_checkpoint_comes_back_from_either_file(checkpoint: Path, tmp_path: Path):
    one = load_cells(checkpoint)
    assert one.report.file == "model.safetensors"
    assert one.model.reading == "categorical"
    assert one.marginal is not None
    assert set(one.training["split"]) == {"train", "validation", "test"}
    copied = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    (copied / "model.safetensors").unlink()
    other = load_cells(copied)
    assert other.report.file == "best_model.pt"
    assert other.report.matched == one.report.matched == len(one.model.state_dict())
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            one.model.state_dict().values(), other.model.state_dict().values(), strict=True
        )
    )


@pytest.mark.slow
def test_the_whole_human_shape(tmp_path: Path):
    shape = CellConfig()
    torch.manual_seed(0)
    model = ScGPT(shape)
    vocab = {f"G{i}": i for i in range(shape.pad_id)} | {
        "<pad>": shape.pad_id,
        "<cls>": shape.pad_id + 1,
        "<eoc>": shape.pad_id + 2,
    }
    loaded = load_cells(publish(tmp_path, model, vocab))
    report = loaded.report
    assert report == LoadReport("best_model.pt", 159, HEADS, 24)
    assert loaded.model.shape == shape
    assert sum(p.numel() for p in loaded.model.parameters()) == pytest.approx(50.8e6, rel=0.001)
