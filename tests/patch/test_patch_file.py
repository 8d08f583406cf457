"""Patch files: the same bytes for the same patch, and no damage that goes unnoticed."""

from __future__ import annotations

import json
import os
import struct
from contextlib import suppress
from pathlib import Path

import pytest
import safetensors.torch
import torch
from tiny import tiny_model

from surgeon.anatomy import Anatomy, Site
from surgeon.errors import BadInput, BadPatch, SurgeonError
from surgeon.patch import Patch, ablate, compose, load, save


@pytest.fixture(scope="module")
def anatomy() -> Anatomy:
    return Anatomy.of(tiny_model("llama").to(torch.bfloat16))


@pytest.fixture(scope="module")
def patch(anatomy: Anatomy) -> Patch:
    """All kinds of delta at once."""
    kept = ablate(
        anatomy, ["L0.mlp.down[3, 5]", "L0.mlp.down[4, 6]", "L1.mlp.down[:, 2]", "embed[3, :]"]
    )
    return compose(
        kept,
        Patch.low_rank(
            anatomy,
            Site(2, "mlp.up"),
            torch.ones(48, 2),
            torch.ones(2, 32),
            {"operation": "test", "seed": 3},
        ),
    )


def test_round_trip(anatomy: Anatomy, patch: Patch, tmp_path: Path) -> None:
    save(patch, tmp_path / "a.safetensors")
    loaded = load(tmp_path / "a.safetensors")
    assert loaded.digest == patch.digest
    assert loaded.made_by == patch.made_by
    assert loaded.base == patch.base
    save(loaded, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    patch.apply_(anatomy)
    loaded.undo_(anatomy)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_a_small_injury_is_a_small_file(tmp_path: Path) -> None:
    anatomy = Anatomy.of(tiny_model("llama"))
    save(ablate(anatomy, [f"L0.mlp.down[8, {c}]" for c in range(0, 36, 3)]), tmp_path / "p")
    assert (tmp_path / "p").stat().st_size < 2048


def test_every_truncation_and_every_changed_byte_is_noticed(
    anatomy: Anatomy, tmp_path: Path
) -> None:
    patch = ablate(anatomy, ["L0.mlp.down[3, 5]", "L0.mlp.down[4, 6]"])
    path = tmp_path / "p"
    save(patch, path)
    raw = path.read_bytes()
    damaged = [raw[:n] for n in [*range(64), *range(64, len(raw), 13), len(raw) - 1]]
    damaged += [
        raw + b"x",
        b"\0" * 64,
        b"\0" * len(raw),
        raw[:8] + b"{" * 40 + raw[48:],
        os.urandom(200),
        b'{"a": 1}',
        b"[" * 100_000,
    ]
    for n in range(len(raw)):
        for flip in (0x01, 0x80):
            damaged.append(raw[:n] + bytes([raw[n] ^ flip]) + raw[n + 1 :])
    for bad in damaged:
        path.write_bytes(bad)
        with suppress(BadPatch):  # any other exception fails the test
            assert load(path).digest == patch.digest


def test_contents_that_contradict_themselves(patch: Patch, tmp_path: Path) -> None:
    """Also with a header that is valid in itself."""
    save(patch, tmp_path / "p")
    raw = (tmp_path / "p").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(json.loads(raw[8 : 8 + length])["__metadata__"]["surgeon"])
    tensors = safetensors.torch.load(raw)

    def write(changed: dict, parts: dict | None = None) -> None:
        (tmp_path / "p").write_bytes(
            safetensors.torch.save(
                tensors if parts is None else parts, {"surgeon": json.dumps(changed)}
            )
        )

    write(header)
    assert load(tmp_path / "p").digest == patch.digest
    write({**header, "version": 99})
    with pytest.raises(BadPatch, match=r"/p has patch format 99"):
        load(tmp_path / "p")
    rows = next(name for name in tensors if name.endswith("rows"))
    wrong = [
        ({**header, "deltas": header["deltas"][:-1]}, None),
        ({**header, "deltas": []}, None),
        ({**header, "base": {}}, None),
        ({**header, "made_by": {}}, None),
        ({k: v for k, v in header.items() if k != "sha256"}, None),
        (header, {k: v for k, v in tensors.items() if k != rows}),
        (header, {**tensors, "extra": torch.ones(1)}),
        (header, {**tensors, rows: tensors[rows] + 1000}),
        (header, {**tensors, rows: tensors[rows] - 1000}),
        (header, {**tensors, rows: tensors[rows][:1]}),
    ]
    for changed, parts in wrong:
        write(changed, parts)
        with pytest.raises(BadPatch):
            load(tmp_path / "p")
    (tmp_path / "p").write_bytes(safetensors.torch.save(tensors, {"format": "pt"}))
    with pytest.raises(BadPatch):
        load(tmp_path / "p")


def test_places_that_cannot_be_written_or_read(
    patch: Patch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BadInput, match="no folder"):
        save(patch, tmp_path / "no" / "p")
    with pytest.raises(BadInput, match="is a folder"):
        save(patch, tmp_path)
    with pytest.raises(BadInput, match="cannot read"):
        load(tmp_path / "none")
    with pytest.raises(BadInput, match="cannot read"):
        load(tmp_path)
    for number, kind, status in ((13, BadInput, 2), (30, BadInput, 2), (28, SurgeonError, 1)):

        def fail(*_: object, number: int = number) -> None:
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as broken:
            broken.setattr("surgeon.files.os.replace", fail)
            with pytest.raises(kind) as error:
                save(patch, tmp_path / "p")
        assert error.value.exit_status == status
    assert not list(tmp_path.iterdir())
