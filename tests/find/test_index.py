"""The published coordinates as data, and their check against folders and a Hub on the loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hub import Hub, serve
from safetensors.torch import save_file
from torch import Tensor

from surgeon.cli import run
from surgeon.errors import BadCheckpoint, BadInput, PackedWeight, SurgeonError
from surgeon.find.index import (
    AGREES,
    DIFFERS,
    UNPRINTED,
    Published,
    published,
    records_of,
    verify_published,
)

QWEN = "Qwen/Qwen2.5-3B"  # its one matrix need only be (319, 3190) to hold the published entry
SHAPE = (8, 12)


def record(layer: int, row: int, col: int, weight: float | None) -> Published:
    return Published("org/tiny", layer, row, col, weight, "a test", "table", "published")


RECORDS = [record(1, 2, 3, 0.6323), record(2, 7, 11, -1.9268), record(1, 0, 0, None)]


def tiny(dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Matrices of 0.01 with two planted weights, and one larger weight in layer 2."""
    tensors = {f"model.layers.{i}.mlp.down_proj.weight": torch.full(SHAPE, 0.01) for i in range(3)}
    tensors["model.embed_tokens.weight"] = torch.ones(20, 8)
    tensors["model.layers.1.mlp.down_proj.weight"][2, 3] = 0.6323
    tensors["model.layers.2.mlp.down_proj.weight"][7, 11] = -1.9268
    tensors["model.layers.2.mlp.down_proj.weight"][0, 1] = 3.0
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def write(folder: Path, *shards: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors")
        return folder
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / name)
    weight_map = {
        tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard
    }
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return folder


def qwen(folder: Path, value: float = -0.5508) -> Path:
    matrix = torch.zeros(319, 3190)
    matrix[318, 3189] = value
    return write(folder, {"model.layers.2.mlp.down_proj.weight": matrix.bfloat16()})


def sharded(folder: Path) -> Path:
    """Layer 1 in the first shard, everything else in the second."""
    tensors = tiny()
    first = {name: tensors.pop(name) for name in ["model.layers.1.mlp.down_proj.weight"]}
    return write(folder, first, tensors)


# The data


def test_the_list_is_complete_and_well_formed() -> None:
    records = published()
    assert len(records) == len({(r.model, r.entry) for r in records}) == 26
    assert len({r.model for r in records}) == 12
    assert Counter(r.evidence for r in records) == {"table": 21, "repository": 3, "reported": 2}
    assert Counter(r.status for r in records) == {
        "published": 18,
        "set": 6,
        "corrected": 1,
        "nearly inert": 1,
    }
    assert all(r.model.count("/") == 1 and r.source for r in records)
    # the verdict takes every printed value to have four decimals
    assert all(r.weight is None or round(r.weight, 4) == r.weight for r in records)
    assert sum(r.weight is not None for r in records) == 8


def test_coordinates_written_by_hand() -> None:
    at = {(r.model, str(r.entry)): r.weight for r in published()}
    assert at["huggyllama/llama-7b", "L2.mlp.down[3968, 7003]"] == -1.9268
    assert at["mistralai/Mistral-7B-v0.1", "L1.mlp.down[2070, 7310]"] == -0.2734
    assert at["allenai/OLMo-1B-0724-hf", "L2.mlp.down[1764, 8041]"] == -0.5924
    assert at["microsoft/Phi-3-mini-4k-instruct", "L4.mlp.down[1693, 2723]"] is None
    assert at["HuggingFaceTB/SmolLM2-1.7B", "L1.mlp.down[749, 4987]"] is None


# Folders


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_value_rank_and_verdict(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = tiny(dtype)
    one, two, unprinted = verify_published(str(write(tmp_path, tensors)), RECORDS)
    assert one.measured == tensors["model.layers.1.mlp.down_proj.weight"][2, 3].item()
    assert two.measured == tensors["model.layers.2.mlp.down_proj.weight"][7, 11].item()
    assert (one.rank_abs, two.rank_abs, unprinted.rank_abs) == (1, 2, 2)
    assert (one.verdict, two.verdict, unprinted.verdict) == (AGREES, AGREES, UNPRINTED)
    assert one.shape == SHAPE
    assert torch.zeros(0, dtype=dtype).dtype == getattr(torch, one.dtype)


@pytest.mark.parametrize(
    ("value", "verdict"),
    [
        (0.63226, AGREES),
        (0.63234, AGREES),
        (0.6324, DIFFERS),
        (-0.6323, DIFFERS),
        (0.0018, DIFFERS),
    ],
)
def test_agreement_ends_at_the_rounding_of_the_printed_value(
    tmp_path: Path, value: float, verdict: str
) -> None:
    tensors = tiny(torch.float32)
    tensors["model.layers.1.mlp.down_proj.weight"][2, 3] = value
    (check,) = verify_published(str(write(tmp_path, tensors)), RECORDS[:1])
    assert check.verdict == verdict
    assert (check.weight, check.measured) == (0.6323, pytest.approx(value))


def test_bfloat16_neighbours_do_not_agree(tmp_path: Path) -> None:
    tensors = tiny()
    tensors["model.layers.1.mlp.down_proj.weight"].view(torch.int16)[2, 3] += 1
    assert verify_published(str(write(tmp_path, tensors)), RECORDS[:1])[0].verdict == DIFFERS


def test_weights_in_several_shards(tmp_path: Path) -> None:
    told: list[Any] = []
    checks = verify_published(
        str(sharded(tmp_path)), RECORDS, tell=lambda *progress: told.append(progress)
    )
    assert [check.verdict for check in checks] == [AGREES, AGREES, UNPRINTED]
    names = [f"model.layers.{layer}.mlp.down_proj.weight" for layer in (1, 2)]
    assert told == [(names[0], 1, 2), (names[1], 2, 2)]
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(BadCheckpoint, match="lacks the shards model-00002-of-00002"):
        verify_published(str(tmp_path), RECORDS)


def test_only_the_tensor_concerned_is_read(tmp_path: Path) -> None:
    """The file also holds a tensor larger than this machine's memory could take, as a hole on the
    disk.
    """
    tensor, ghost = tiny()["model.layers.1.mlp.down_proj.weight"], 1 << 40
    size = tensor.nbytes
    header = {
        "model.layers.1.mlp.down_proj.weight": {
            "dtype": "BF16",
            "shape": SHAPE,
            "data_offsets": [0, size],
        },
        "model.embed_tokens.weight": {
            "dtype": "BF16",
            "shape": [ghost // 2],
            "data_offsets": [size, size + ghost],
        },
    }
    text = json.dumps(header).encode()
    (tmp_path / "config.json").write_text("{}")
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(
            len(text).to_bytes(8, "little") + text + tensor.view(torch.uint8).numpy().tobytes()
        )
        file.truncate(8 + len(text) + size + ghost)
    assert verify_published(str(tmp_path), RECORDS[:1])[0].verdict == AGREES


def test_records_belong_by_folder_name_or_as(tmp_path: Path) -> None:
    for name in ("Qwen2.5-3B", "copy"):
        (tmp_path / name).mkdir()
    expected = [r for r in published() if r.model == QWEN]
    assert (
        records_of(QWEN)
        == records_of(f"{QWEN}@main")
        == records_of(str(tmp_path / "Qwen2.5-3B"))
        == expected
    )
    assert (
        records_of(str(tmp_path / "copy"), "Qwen2.5-3B")
        == records_of("someone/copy", QWEN)
        == expected
    )
    for model, as_name in (
        (str(tmp_path / "copy"), None),
        ("someone/Qwen2.5-3B", None),
        (QWEN, "Qwen2.5"),
    ):
        with pytest.raises(BadInput, match=r"some for huggyllama/llama-7b, .*as_name"):
            records_of(model, as_name)


def test_errors_of_folders(tmp_path: Path) -> None:
    def refusal(kind: type[SurgeonError], folder: Path, records: list[Published] = RECORDS) -> str:
        with pytest.raises(kind) as caught:
            verify_published(str(folder), records)
        return str(caught.value)

    name = "model.layers.1.mlp.down_proj.weight"
    good = tiny()
    assert "no model folder at" in refusal(BadInput, tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    assert "holds no *.safetensors weights" in refusal(BadCheckpoint, tmp_path / "empty")
    assert f"no tensor {name}" in refusal(BadInput, write(tmp_path / "a", {"x": torch.zeros(2)}))
    small = refusal(BadInput, write(tmp_path / "b", good), [record(1, 8, 0, None)])
    assert "(8, 12)" in small
    assert "L1.mlp.down[8, 0]" in small
    assert "as I8, which is quantized" in refusal(
        PackedWeight, write(tmp_path / "c", {**good, name: torch.zeros(SHAPE, dtype=torch.int8)})
    )
    packed = {name.replace("weight", "qweight"): torch.zeros(2, 2, dtype=torch.int32)}
    assert "qweight" in refusal(PackedWeight, write(tmp_path / "d", packed))
    nan = good[name].clone()
    nan[2, 3] = float("nan")
    assert "is nan" in refusal(BadCheckpoint, write(tmp_path / "e", {**good, name: nan}))
    cut = write(tmp_path / "f", good) / "model.safetensors"
    os.truncate(cut, cut.stat().st_size - 1)
    assert "truncated" in refusal(BadCheckpoint, cut.parent)


# The Hub


@pytest.mark.slow
def test_from_the_hub_only_headers_and_matrices_are_fetched(tmp_path: Path) -> None:
    """In processes of their own, since huggingface_hub reads HF_ENDPOINT when it is imported."""
    folder = qwen(tmp_path / "served")
    file, name = "model.safetensors", "model.layers.2.mlp.down_proj.weight"
    data = (folder / file).read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    start, stop = json.loads(data[8:end])[name]["data_offsets"]
    home = tmp_path / "home"
    with serve(Hub({QWEN: folder})) as hub:
        done = command(hub, home, f"{QWEN}@main")
        assert done.returncode == 0, done.stderr
        spans = [span for _, asked, span in hub.asked if asked == file]
        assert spans == [(0, 8), (8, end), (end + start, end + stop)]
        again = command(hub, home, f"{QWEN}@main")
        assert again.stdout == done.stdout
        assert len([asked for _, asked, _ in hub.asked if asked == file]) == len(spans)
        missing = command(hub, home, f"{QWEN}@v9")
    (check,) = json.loads(done.stdout)["checks"]
    assert (check["entry"], check["verdict"], check["rank_abs"], check["dtype"]) == (
        "L2.mlp.down[318, 3189]",
        AGREES,
        1,
        "bfloat16",
    )
    assert missing.returncode == 2
    assert "no revision v9" in missing.stderr


def command(hub: Hub, home: Path, model: str) -> subprocess.CompletedProcess[str]:
    """`surgeon index verify MODEL --json` with the Hub on the loopback."""
    code = "import sys; from surgeon.cli import run; sys.exit(run(sys.argv[1:]))"
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    return subprocess.run(
        [sys.executable, "-c", code, "index", "verify", model, "--json"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**clean, "HF_ENDPOINT": hub.url, "HF_HOME": str(home)},
    )


# The command line


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = str(qwen(tmp_path / "copy", -0.25))
    assert run(["index"]) == 0
    assert "L24.mlp.down[269, 2300]" in capsys.readouterr().out
    assert run(["index", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["records"]) == 26
    assert run(["index", "verify", copy, "--as", "Qwen2.5-3B"]) == 0
    said = capsys.readouterr().out
    assert all(part in said for part in ("-0.5508", "-0.2500", "0 agree, 1 differ"))
    assert run(["index", "verify", copy]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert run(["index", "--json", "verify", copy]) == 2
