"""The reader of checkpoint folders: which files are the model, headers that are not sound, and
tensors against the safetensors library.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_model

from surgeon import Anatomy, apply_to_checkpoint, load_model
from surgeon.anatomy import Shards, open_stream
from surgeon.anatomy.folder import (
    DTYPES,
    INDEX,
    SINGLE,
    fingerprint,
    model_files,
    overwrite,
)
from surgeon.audit import Checkpoint
from surgeon.errors import BadCheckpoint, PackedWeight
from surgeon.patch import ablate
from surgeon.quantize import ExportPlan, QuantizeConfig, export_dense

ENTRY = "L0.mlp.down[1, 2]"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    tiny_model("llama").save_pretrained(tmp_path / "model", max_shard_size="40KB")
    return tmp_path / "model"


def verbs(folder: Path, target: Path) -> list[Any]:
    """Everything that opens a checkpoint folder."""
    patch = ablate(Anatomy.of(tiny_model("llama")), [ENTRY])
    return [
        lambda: load_model(str(folder)),
        lambda: open_stream(str(folder)),
        lambda: Checkpoint(str(folder)),
        lambda: apply_to_checkpoint(folder, [patch], target),
        lambda: export_dense(ExportPlan(folder, target, QuantizeConfig())),
    ]


def refused(folder: Path, target: Path) -> str:
    """The one sentence that every verb refuses the folder with."""
    said = set()
    for verb in verbs(folder, target):
        with pytest.raises(BadCheckpoint) as error:
            verb()
        said.add(str(error.value))
    assert not target.exists()
    (sentence,) = said
    assert "\n" not in sentence
    return sentence


# -- which files -------------------------------------------------------------------------------


def test_the_index_or_the_one_file(sharded: Path, tmp_path: Path) -> None:
    shards = model_files(sharded)
    assert shards == sorted(p.name for p in sharded.glob("*.safetensors"))
    assert len(shards) > 2
    (sharded / "extra.safetensors").write_bytes(b"")  # the index does not name it
    assert model_files(sharded) == shards
    tiny_model("llama").save_pretrained(tmp_path / "whole")
    shutil.copy(tmp_path / "whole" / SINGLE, tmp_path / "whole" / "consolidated.safetensors")
    assert model_files(tmp_path / "whole") == [SINGLE]


def test_two_models_in_one_folder(sharded: Path, tmp_path: Path) -> None:
    """transformers would load model.safetensors, and what follows the index reads the shards."""
    tiny_model("llama", seed=1).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / SINGLE, sharded / SINGLE)
    sentence = refused(sharded, tmp_path / "out")
    assert f"has both {SINGLE} and an index that names other shards" in sentence
    assert str(sharded) in sentence


def test_an_index_of_the_one_file(folder: Path) -> None:
    names = Shards.of("model", folder).stored
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, SINGLE)}
    (folder / INDEX).write_text(json.dumps(index))
    assert model_files(folder) == [SINGLE]
    load_model(str(folder))


def test_weights_by_another_name(folder: Path, tmp_path: Path) -> None:
    (folder / SINGLE).rename(folder / "weights.safetensors")
    sentence = refused(folder, tmp_path / "out")
    assert "has neither model.safetensors nor" in sentence
    assert "weights.safetensors" in sentence


def test_weights_that_the_configuration_names(folder: Path, tmp_path: Path) -> None:
    """transformers would follow it."""
    shutil.copy(folder / SINGLE, folder / "other.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["transformers_weights"] = "other.safetensors"
    (folder / "config.json").write_text(json.dumps(config))
    assert "names weights of its own, other.safetensors" in refused(folder, tmp_path / "out")


def test_a_fingerprint_is_of_the_model_alone(folder: Path, tmp_path: Path) -> None:
    before = fingerprint(folder)
    (folder / "README.md").write_text("about")
    (folder / "other.safetensors").write_bytes(b"no weights")
    assert fingerprint(folder) == before
    raw = bytearray((folder / SINGLE).read_bytes())
    raw[-1] ^= 1
    (folder / SINGLE).write_bytes(raw)
    assert fingerprint(folder) != before


@pytest.mark.parametrize("order", ["none", "in order", "backwards", "half", "twice", "copied"])
def test_a_fingerprint_reads_what_was_not_read_in_order(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: str
) -> None:
    """What was is hashed on the way, and not read again."""
    raw = (folder / SINGLE).read_bytes()
    config = (folder / "config.json").read_bytes()
    expected = hashlib.sha256(config + hashlib.sha256(raw).digest()).hexdigest()
    shards = Shards.of("model", folder)
    names = sorted(shards, key=lambda name: shards.stored[name].start)
    read = {"in order": names, "backwards": names[::-1], "half": names[: len(names) // 2]}
    for name in read.get(order, names * 2 if order == "twice" else []):
        shards.read(name)
    if order == "copied":
        shards.copy(SINGLE, tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == raw
    spans: list[int] = []
    span = Shards._span
    monkeypatch.setattr(
        Shards, "_span", lambda self, s, a, b: spans.append(b - a) or span(self, s, a, b)
    )
    assert shards.fingerprint() == expected == shards.fingerprint()
    assert (sum(spans) == 0) is (order in ("in order", "twice", "copied"))
    assert sum(spans) < len(raw)  # the header, at least, was read before


# -- headers -----------------------------------------------------------------------------------

NAME = "model.layers.0.mlp.down_proj.weight"
DAMAGE = {
    "a shape that is a number": {"shape": 0},
    "an axis of zero": {"shape": [0, 48]},
    "a negative axis": {"shape": [-32, -48]},
    "a broken axis": {"shape": [32.0, 48]},
    "an axis that is true": {"shape": [True, 1536]},
    "an unknown dtype": {"dtype": "F33"},
    "another dtype": {"dtype": "F64"},
    "a list of dtypes": {"dtype": ["F32"]},
    "no dtype": {"dtype": None},
    "offsets outside": {"data_offsets": [10**9, 10**9 + 6144]},
    "offsets before the beginning": {"data_offsets": [-6144, 0]},
    "offsets the wrong way round": {"data_offsets": [6144, 0]},
    "offsets that overlap": {"data_offsets": [0, 6144]},
    "three offsets": {"data_offsets": [0, 1, 2]},
    "offsets in words": {"data_offsets": ["0", "6144"]},
    "no offsets": {"data_offsets": None},
}


def rewrite(path: Path, header: Any) -> None:
    raw = path.read_bytes()
    begin = 8 + struct.unpack("<Q", raw[:8])[0]
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[begin:])


def header_of(path: Path) -> dict[str, Any]:
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    return dict(json.loads(raw[8 : 8 + length]))


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_descriptions(damage: str, folder: Path) -> None:
    header = header_of(folder / SINGLE)
    header[NAME] |= DAMAGE[damage]
    rewrite(folder / SINGLE, header)
    with pytest.raises(BadCheckpoint) as error:
        Shards.of(str(folder), folder)
    assert f"{SINGLE} of {folder} is damaged or not a safetensors file" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changed",
    [
        {"__metadata__": ["pt"]},
        {"__metadata__": {"format": 1}},
        {"__metadata__": "pt"},
        {NAME: 7},
        {NAME: []},
        {NAME: None},
    ],
)
def test_headers_that_are_none(changed: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    rewrite(folder / SINGLE, header_of(folder / SINGLE) | changed)
    assert "is damaged or not a safetensors file" in refused(folder, tmp_path / "out")


@pytest.mark.parametrize("raw", [b"", b"[" * 100_000, b"\xff" * 40, struct.pack("<Q", 2**63)])
def test_bytes_that_are_no_header(raw: bytes, folder: Path) -> None:
    whole = raw if len(raw) < 9 else struct.pack("<Q", len(raw)) + raw
    (folder / SINGLE).write_bytes(whole)
    with pytest.raises(BadCheckpoint, match="is damaged or not a safetensors file"):
        Shards.of(str(folder), folder)


def test_a_tensor_that_is_missing_leaves_a_gap(folder: Path) -> None:
    header = header_of(folder / SINGLE)
    del header[NAME]
    rewrite(folder / SINGLE, header)
    with pytest.raises(BadCheckpoint, match="overlap or leave gaps"):
        Shards.of(str(folder), folder)


# -- tensors -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_as_the_library_reads_it(name: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(0, 2, (3, 4, 8), dtype=torch.uint8, generator=generator)
    held = {
        "matrix": raw.view(DTYPES[name]) if name != "BOOL" else raw.bool(),
        "scalar": torch.zeros(()).to(DTYPES[name]),
        "empty": torch.zeros(0, 5).to(DTYPES[name]),
    }
    save_file(held, tmp_path / "some.safetensors", {"format": "pt"})
    shards = Shards("some", tmp_path, ["some.safetensors"])
    assert shards.metadata == {"format": "pt"}
    assert {s.dtype for s in shards.stored.values()} == {name}
    for key, tensor in load_file(tmp_path / "some.safetensors").items():
        read = shards.read(key)
        assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
        assert (
            read.view(-1).view(torch.uint8).tolist() == tensor.view(-1).view(torch.uint8).tolist()
        )
    before = shards.bytes_read
    part = shards.read("matrix", 1)
    assert torch.equal(part.view(torch.uint8), held["matrix"][1].view(torch.uint8))
    assert shards.bytes_read - before == part.nbytes


def test_what_is_read_is_counted_and_in_memory_of_its_own(sharded: Path) -> None:
    shards = Shards.of("model", sharded)
    assert shards.bytes_read == 0
    by_library = {k: t for f in shards.files for k, t in load_file(sharded / f).items()}
    assert set(shards) == set(by_library)
    for name, tensor in by_library.items():
        assert torch.equal(shards.read(name), tensor)
        assert name in shards.within(shards.stored[name].shard)
    assert shards.bytes_read == sum(t.nbytes for t in by_library.values())
    shards.read(NAME).zero_()
    assert torch.equal(shards.read(NAME), by_library[NAME])


def test_what_cannot_be_read_is_said(folder: Path) -> None:
    tensors = {name: t.clone() for name, t in load_file(folder / SINGLE).items()}
    odd = torch.zeros(4, dtype=torch.uint8)
    save_file({**tensors, "odd": odd, "int": torch.ones(2).int()}, folder / SINGLE)
    header = header_of(folder / SINGLE)
    header["odd"] |= {"dtype": "F4", "shape": [8]}
    rewrite(folder / SINGLE, header)
    shards = Shards.of("model", folder)
    with pytest.raises(BadCheckpoint, match="stores odd as F4, which Surgeon does not read"):
        shards.read("odd")
    with pytest.raises(PackedWeight, match="stores int as I32, which is quantized"):
        shards.read_plain("int")
    assert shards.read("int").tolist() == [1, 1]
    with pytest.raises(BadCheckpoint, match="lacks nothing_of_this_name"):
        shards.read("nothing_of_this_name")
    (folder / SINGLE).unlink()
    with pytest.raises(BadCheckpoint, match="cannot be read: No such file"):
        shards.read(NAME)


def test_a_tensor_is_overwritten_where_it_lies(folder: Path) -> None:
    shards = Shards.of("model", folder)
    before = {name: shards.read(name) for name in shards}
    overwrite(folder / SINGLE, shards.stored[NAME], torch.full_like(before[NAME], 7.0))
    after = load_file(folder / SINGLE)
    assert {n for n in before if not torch.equal(before[n], after[n])} == {NAME}
    assert (after[NAME] == 7).all()
