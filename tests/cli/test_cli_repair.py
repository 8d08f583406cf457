"""`surgeon repair` and `surgeon export`: what they write, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from surgeon import open as surgeon_open
from surgeon.patch.file import to_bytes

PLANTED, STORED = "L0.mlp.down[5, 7]", "model.layers.0.mlp.down_proj.weight"


@pytest.fixture
def injury(surgeon: Any, folder: Path, tmp_path: Path) -> Path:
    path = tmp_path / "injury.safetensors"
    assert surgeon("ablate", folder, "--at", PLANTED, "-o", path).status == 0
    return path


@pytest.mark.parametrize("method", ["graft", "distil", "graft+distil"])
def test_repair_writes_a_patch_for_the_injured_model(
    surgeon: Any, folder: Path, text: Path, injury: Path, tmp_path: Path, method: str
) -> None:
    out = tmp_path / "repair.safetensors"
    command = (
        "repair",
        folder,
        "--injury",
        injury,
        "-o",
        out,
        "--text",
        text,
        "--window",
        16,
        "--method",
        method,
        "--steps",
        10,
        "--every",
        5,
    )
    status, stdout, stderr = surgeon(*command, "--json")
    assert (status, stderr) == (0, "")
    document = json.loads(stdout)
    assert document["patch_bytes"] == out.stat().st_size
    assert document["steps"] == (0 if method == "graft" else 10)
    assert document["kind"] == "repair"
    assert document["target_rows"] == {"L0.mlp.down": [5]}
    assert document["nll"]["patched"] < document["nll"]["broken"]
    written = out.read_bytes()
    status, stdout, _ = surgeon(*command)
    assert status == 0
    assert "Recovered of the damage" in stdout
    assert out.read_bytes() == written

    assert (
        surgeon(
            "apply", folder, "--patch", injury, "--patch", out, "-o", tmp_path / "healed"
        ).status
        == 0
    )
    found = surgeon(
        "measure",
        folder,
        "--patch",
        injury,
        "--patch",
        out,
        "--text",
        text,
        "--window",
        16,
        "--json",
    )
    assert json.loads(found.out)["nll"] < document["nll"]["broken"]
    assert (
        surgeon("undo", tmp_path / "healed", "--patch", out, "-o", tmp_path / "broken").status == 0
    )
    assert (
        surgeon("undo", tmp_path / "broken", "--patch", injury, "-o", tmp_path / "intact").status
        == 0
    )
    name = "model.safetensors"
    assert torch.equal(
        load_file(tmp_path / "intact" / name)[STORED], load_file(folder / name)[STORED]
    )


def test_a_preset_holds_where_nothing_else_is_given(
    surgeon: Any, folder: Path, text: Path, injury: Path, tmp_path: Path
) -> None:
    command = ("repair", folder, "--injury", injury, "-o", tmp_path / "p", "--text", text)
    given = ("--window", 16, "--reference", "--steps", 3, "--batch", 1)
    document = json.loads(surgeon(*command, *given, "--json").out)
    assert (document["method"], document["steps"], document["kept_step"]) == ("distil", 3, 3)
    settings = document["settings"]
    assert (settings["lr"], settings["weight_decay"], settings["batch"]) == (1e-3, 0.01, 1)


def test_the_command_the_call_and_a_resumed_run_give_the_same(
    surgeon: Any, folder: Path, text: Path, injury: Path, tmp_path: Path
) -> None:
    file = tmp_path / "training"
    given = ("--text", text, "--window", 16, "--steps", 6, "--every", 2, "--seed", 3)
    command = ("repair", folder, "--injury", injury, "-o", tmp_path / "p", *given, "--json")
    document = json.loads(surgeon(*command, "--resume", file).out)
    assert {file.name, f"{file.name}.control"} <= {path.name for path in tmp_path.iterdir()}
    again = json.loads(surgeon(*command, "--resume", file).out)
    assert without_making(again) == without_making(document)

    lab = surgeon_open(str(folder))
    settings = {"text": str(text), "window": 16, "steps": 6, "every": 2, "seed": 3}
    called = lab.repair(lab.ablate(PLANTED), **settings)
    assert without_making(called.to_json()) == without_making(document)
    assert to_bytes(called.patch) == (tmp_path / "p").read_bytes()


def without_making(document: dict[str, Any]) -> dict[str, Any]:
    """A document without what tells how, and when, it was made."""
    made = ("command", "settings", "seconds", "patch")
    return {name: value for name, value in document.items() if name not in made}


def test_export_writes_an_adapter(surgeon: Any, injury: Path, tmp_path: Path) -> None:
    status, stdout, _ = surgeon(
        "export", injury, "--to", "lora", "-o", tmp_path / "adapter", "--json"
    )
    assert status == 0
    assert json.loads(stdout)["targets"] == ["model.layers.0.mlp.down_proj"]
    assert {p.name for p in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert surgeon("export", injury, "--to", "lora", "-o", tmp_path / "adapter").status == 2


@pytest.mark.parametrize(
    ("more", "status", "says"),
    [
        (["--row", 99], 2, "has no row 99"),
        (["--rank", -1], 2, "--rank is -1; it must be at least 0"),
        (["--method", "sew"], 2, "sew"),
        (["--steps", 0], 2, "--steps is 0; it must be at least 1"),
        (["--resume", "/nowhere/at/all"], 2, "no folder"),
        (["--windows", 3], 2, "a smaller --window"),
        (["--method", "graft", "--sparse-k", 3], 2, "solved for all entries at once"),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence(
    surgeon: Any,
    folder: Path,
    text: Path,
    injury: Path,
    tmp_path: Path,
    more: list[object],
    status: int,
    says: str,
) -> None:
    result = surgeon(
        "repair",
        folder,
        "--injury",
        injury,
        "-o",
        tmp_path / "no",
        "--text",
        text,
        "--window",
        16,
        *more,
    )
    assert result.status == status
    assert says in result.err
    assert not (tmp_path / "no").exists()
