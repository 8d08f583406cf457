"""Bad input: a sentence on stderr, the right exit status, nothing on stdout, nothing half
written.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from transformers import (
    AutoModelForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from surgeon.cli import ORDER
from surgeon.cli import surgeon as group

ENTRY = "L0.mlp.down[5, 7]"


@pytest.fixture
def refused(surgeon: Any) -> Callable[..., str]:
    """The sentence that a command is refused with; `status` as given, and no more than a sentence
    or two.
    """

    def call(*arguments: object, status: int = 2) -> str:
        result = surgeon(*arguments)
        assert (result.status, result.out) == (status, ""), result
        said = result.err.strip("\n")  # after Ctrl-C it begins on a line of its own
        sentence = said.removeprefix("surgeon: ")
        assert sentence != said, f"not said by Surgeon itself: {result.err}"
        assert "\n" not in sentence
        assert sentence.endswith("."), sentence
        assert "Traceback" not in sentence
        return str(sentence)

    return call


@pytest.fixture
def misused(surgeon: Any) -> Callable[..., str]:
    """The usage error of a command that cannot be parsed."""

    def call(*arguments: object) -> str:
        result = surgeon(*arguments)
        assert (result.status, result.out) == (2, ""), result
        assert "Usage: surgeon" in result.err
        assert "Error: " in result.err
        return str(result.err)

    return call


@pytest.fixture
def reading(text: Path) -> tuple[object, ...]:
    return ("--text", text, "--window", 16)


def left_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# -- models ------------------------------------------------------------------------------------


def test_no_such_folder(refused: Any, tmp_path: Path) -> None:
    assert "no model folder at" in refused("sites", tmp_path / "nowhere")
    assert "Hub id like org/name" in refused("sites", "banana")
    assert "too long" in refused("sites", "a" * 300)


def test_a_file_is_no_folder(refused: Any, text: Path, folder: Path) -> None:
    assert "is a file" in refused("sites", text)
    assert "is a file" in refused("sites", folder / "model.safetensors")


def test_no_config(refused: Any, copy: Path) -> None:
    (copy / "config.json").unlink()
    assert "has no config.json" in refused("sites", copy)


def test_no_weights(refused: Any, copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    assert "no *.safetensors" in refused("sites", copy)


def test_pickled_weights_are_not_opened_and_the_way_out_is_named(refused: Any, copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    sentence = refused("sites", copy)
    assert "pytorch_model.bin" in sentence
    assert "can run code" in sentence
    assert "save_pretrained" in sentence


@pytest.mark.parametrize("kept", [-5, 700, 6, 0])
def test_truncated_weights(refused: Any, copy: Path, kept: int) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    assert re.search("truncated|damaged", refused("sites", copy))


@pytest.mark.parametrize(
    "raw",
    [
        b"this is no safetensors file at all, but it is long enough",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 13) + b'{"a": {"b":1}',
        struct.pack("<Q", 30) + b'{"a": {"data_offsets": [0]}}  ',
        struct.pack("<Q", 34) + b'{"a": {"data_offsets": ["0","9"]}}',
        b"\xff" * 64,
    ],
)
def test_weights_that_are_no_safetensors(refused: Any, copy: Path, raw: bytes) -> None:
    (copy / "model.safetensors").write_bytes(raw)
    assert "damaged or not a safetensors file" in refused("sites", copy)


@pytest.mark.parametrize(
    ("index", "said"),
    [
        (
            {"weight_map": {"a": "model-00001-of-00002.safetensors"}},
            "lacks the shards model-00001-of-00002.safetensors",
        ),
        ({"weight_map": {"a": "../model.safetensors"}}, "points outside its folder"),
        ({"weight_map": {"a": 1}}, "is not a safetensors index"),
        ({"weight_map": ["a"]}, "is not a safetensors index"),
        ({}, "is not a safetensors index"),
        ([], "is not a safetensors index"),
    ],
)
def test_index_of_shards(refused: Any, copy: Path, index: Any, said: str) -> None:
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    assert said in refused("sites", copy)


def test_weights_that_are_absent_are_not_made_up(refused: Any, copy: Path, reading: Any) -> None:
    """transformers fills them with random numbers and goes on."""
    path = copy / "model.safetensors"
    weights = load_file(path)
    down = weights.pop("model.layers.2.mlp.down_proj.weight")
    save_file(weights, path, {"format": "pt"})
    assert "model.layers.2.mlp.down_proj.weight" in refused("measure", copy, *reading)
    save_file({**weights, "model.layers.2.mlp.down_proj.weight": down[:3]}, path, {"format": "pt"})
    assert "another shape: model.layers.2.mlp.down_proj.weight;" in refused(
        "measure", copy, *reading
    )


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_config_that_is_no_json(refused: Any, copy: Path) -> None:
    (copy / "config.json").write_text('{"model_type": "llama"')
    assert "not a valid JSON file" in refused("sites", copy)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "banana"}, "model type `banana`"),
        ({"num_attention_heads": 5}, "not a multiple of"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"num_hidden_layers": 7}, "lacks weights"),
        ({"architectures": ["pipeline"]}, "cannot be loaded by transformers"),
    ],
)
def test_config_that_cannot_be_used(
    refused: Any, copy: Path, changes: dict[str, Any], said: str
) -> None:
    edit_config(copy, **changes)
    assert said in refused("sites", copy)


@pytest.mark.parametrize("model_type", ["banana", "llama"])
def test_code_in_a_checkpoint_never_runs(
    surgeon: Any, copy: Path, tmp_path: Path, reading: Any, model_type: str
) -> None:
    ran = tmp_path / "ran"
    (copy / "own.py").write_text(f"open({str(ran)!r}, 'w')\nclass Own: pass\n")
    edit_config(
        copy,
        model_type=model_type,
        auto_map={"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"},
    )
    result = surgeon("measure", copy, *reading)
    if model_type == "banana":
        assert result.status == 2
        assert "which Surgeon never runs" in result.err
    else:  # transformers has this one itself
        assert result.status == 0
    edit_config(copy, model_type="llama", auto_map={})
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}, "tokenizer_class": "Own"}
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    result = surgeon("measure", copy, *reading)
    assert result.status == 2
    assert "which Surgeon never runs" in result.err
    assert not ran.exists()


def test_tokenizer_absent_or_damaged(refused: Any, surgeon: Any, copy: Path, reading: Any) -> None:
    tokenizer = copy / "tokenizer.json"
    raw = tokenizer.read_bytes()
    for damaged in (b"", b"{}", raw[:500], raw.replace(b"WordLevel", b"Banana"), b"\xff" + raw):
        tokenizer.write_bytes(damaged)
        assert f"the tokenizer in {copy} cannot be loaded" in refused("measure", copy, *reading)
    tokenizer.unlink()
    (copy / "tokenizer_config.json").unlink()
    for verb in (("find",), ("verify", "--at", ENTRY), ("measure",)):
        assert "ships no tokenizer" in refused(*verb, copy, *reading)
    assert surgeon("sites", copy).status == 0


def test_tokenizer_of_another_model(refused: Any, copy: Path, reading: Any) -> None:
    tiny_model("llama", vocab_size=20).save_pretrained(copy)
    assert "the tokenizer belongs to another model" in refused("measure", copy, *reading)


def test_models_of_another_kind(refused: Any, copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    size: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2}
    MambaForCausalLM(MambaConfig(vocab_size=99, state_size=4, **size)).save_pretrained(copy)
    assert "no MLP output projection" in refused("sites", copy)
    seeing = ViTConfig(
        num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=8, **size
    )
    ViTForImageClassification(seeing).save_pretrained(copy)
    assert "reads no tokens" in refused("sites", copy)


def test_a_masked_model_has_no_likelihood(
    refused: Any, surgeon: Any, copy: Path, reading: Any, tmp_path: Path
) -> None:
    tiny_model("bert").save_pretrained(copy)
    for verb in (("find",), ("verify", "--at", ENTRY), ("measure",)):
        assert "not a causal language model" in refused(*verb, copy, *reading)
    assert surgeon("sites", copy).status == 0
    assert surgeon("ablate", copy, "--at", ENTRY, "-o", tmp_path / "p").status == 0


@pytest.mark.parametrize("everywhere", [True, False])
def test_weights_that_are_nan(refused: Any, copy: Path, reading: Any, everywhere: bool) -> None:
    path = copy / "model.safetensors"
    weights = load_file(path)
    if everywhere:
        weights = {name: w * float("nan") for name, w in weights.items()}
    else:
        weights["model.layers.2.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(weights, path, {"format": "pt"})
    for verb in (("find",), ("verify", "--at", ENTRY), ("measure",), ("measure", "--json")):
        assert "not finite" in refused(*verb, copy, *reading, status=1)


# -- addresses ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("at", "said"),
    [
        ("banana", "is not an entry; write it like"),
        ("", "is not an entry"),
        ("L0.mlp.down[-1, 2]", "is not an entry"),
        ("L0.mlp.down[1, 2, 3]", "is not an entry"),
        ("banana[1, 2]", "nearest sites are"),
        ("L0.mlp.dwn[1, 2]", "nearest sites are L0.mlp.down"),
        ("L0.mlp.down.e1[1, 2]", "nearest sites are"),
        ("L9.mlp.down[1, 2]", "this model has 3 layers, L0 to L2"),
        ("L0.mlp.down[32, 0]", "row 32 does not exist"),
        ("L0.mlp.down[0, 48]", "column 48 does not exist; L0.mlp.down has shape (out 32, in 48)"),
    ],
)
def test_addresses(
    refused: Any, folder: Path, reading: Any, tmp_path: Path, at: str, said: str
) -> None:
    assert said in refused("verify", folder, "--at", at, *reading)
    assert said in refused("ablate", folder, "--at", ENTRY, "--at", at, "-o", tmp_path / "p")
    assert left_in(tmp_path) == []


def test_an_entry_given_twice(
    refused: Any, surgeon: Any, folder: Path, reading: Any, tmp_path: Path
) -> None:
    """It would be counted twice, and leaving one of the two out would leave nothing out."""
    for other, said in (
        (ENTRY, "is given twice"),
        ("L0.mlp.down[5, :]", "share an entry"),
        ("L0.mlp.down[:, :]", "share an entry"),
    ):
        assert said in refused("verify", folder, "--at", ENTRY, "--at", other, *reading)
        assert said in refused("ablate", folder, "--at", ENTRY, "--at", other, "-o", tmp_path / "p")
    apart = ("--at", "L0.mlp.down[6, :]", "--at", "L0.mlp.down[5, 6]", "--at", "L1.mlp.down[5, 7]")
    assert surgeon("ablate", folder, "--at", ENTRY, *apart, "-o", tmp_path / "p").status == 0


@pytest.mark.parametrize(
    "mode",
    [
        "banana",
        "scale",
        "scale:banana",
        "scale:nan",
        "scale:inf",
        "spread:0",
        "spread:-1",
        "spread:1.5",
        "zero:1",
    ],
)
def test_modes(refused: Any, folder: Path, tmp_path: Path, mode: str) -> None:
    assert f"{mode!r} is not a way to ablate" in refused(
        "ablate", folder, "--at", ENTRY, "--mode", mode, "-o", tmp_path / "p"
    )
    assert left_in(tmp_path) == []


def test_spread_onto_more_than_there_is(refused: Any, folder: Path, tmp_path: Path) -> None:
    said = refused("ablate", folder, "--at", ENTRY, "--mode", "spread:100000", "-o", tmp_path / "p")
    assert "row 5 of L0.mlp.down, which has 47" in said


# -- texts and numbers -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "is empty"),
        (b" \n\n\t", "is empty"),
        (b"the red cat", "has 3 tokens, less than one window of 15"),
        (b"the red\0cat " * 50, "NUL byte at character 7"),
        (b"the red cat\xff" * 50, "not UTF-8: byte 11 is 0xff"),
        ("the red cat ".encode("utf-16") * 50, "not UTF-8"),
    ],
)
def test_texts(refused: Any, folder: Path, tmp_path: Path, raw: bytes, said: str) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(raw)
    for verb in (("find",), ("verify", "--at", ENTRY), ("measure",)):
        assert said in refused(*verb, folder, "--text", path, "--window", 16)


def test_a_text_that_cannot_be_read(refused: Any, folder: Path, tmp_path: Path) -> None:
    assert "No such file" in refused("measure", folder, "--text", tmp_path / "nowhere.txt")
    assert "Is a directory" in refused("measure", folder, "--text", tmp_path)


def test_one_window_is_enough_to_measure_and_not_to_find(
    refused: Any, surgeon: Any, folder: Path, text: Path
) -> None:
    assert surgeon("measure", folder, "--text", text, "--window", 300).status == 0
    assert "find needs at least 2" in refused("find", folder, "--text", text, "--window", 300)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--window", "1"), "leaves nothing to predict"),
        (("--window", "0"), "leaves nothing to predict"),
        (("--window", "-5"), "leaves nothing to predict"),
        (("--window", "513"), "longer than the 512 positions"),
        (("--windows", "0"), "leaves no text"),
        (("--windows", "-3"), "leaves no text"),
        (("--device", "banana"), "--device banana is not known"),
        (("--device", "meta"), "holds no numbers"),
        (("--device", "xla"), "--device xla cannot be used on this machine"),
    ],
)
def test_numbers_dtypes_and_devices(
    refused: Any, folder: Path, text: Path, options: Any, said: str
) -> None:
    window = () if options[0] == "--window" else ("--window", 16)
    for verb in (("find",), ("verify", "--at", ENTRY), ("measure",)):
        assert said in refused(*verb, folder, "--text", text, *window, *options)


def test_an_option_of_one_value_given_twice(misused: Any, folder: Path) -> None:
    said = misused("measure", folder, "--window", 16, "--window", 32)
    assert "--window is given 2 times; it takes one value" in said


def test_too_few_controls(refused: Any, folder: Path, reading: Any) -> None:
    for verb in (("find",), ("verify", "--at", ENTRY)):
        said = refused(*verb, folder, *reading, "--controls", 3)
        assert said == "--controls is 3; it must be at least 20."


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("measure", "a", "--new-tokens", "0"), "--new-tokens is 0; it must be at least 1."),
        (("verify", "a", "--at", ENTRY, "--seed", "-1"), "--seed is -1; it must be at least 0."),
        (("verify", "a", "--at", ENTRY, "--seed", str(2**70)), "--seed is 1.18059e+21; it must be"),
        (("find", "a", "--persistence", "2"), "--persistence is 2; it must be at most 1."),
        (("find", "a", "--layers", "2"), "--layers 2 is no range of layers"),
        (("find", "a", "--text", "b", "--persistence", "nan"), "--persistence is nan"),
    ],
)
def test_settings_out_of_range_are_refused_before_the_model_is_opened(
    refused: Any, arguments: tuple[str, ...], said: str
) -> None:
    assert said in refused(*arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ("banana",),
        ("sites",),
        ("sites", "a", "b"),
        ("sites", "a", "--banana"),
        ("verify", "a"),
        ("ablate", "a", "--at", ENTRY),
        ("measure", "a", "--bos", "banana"),
        ("measure", "a", "--window", "banana"),
        ("measure", "a", "--dtype", "banana"),
        ("verify", "a", "--at", ENTRY, "--seed", "1.5"),
        ("index", "banana"),
    ],
)
def test_usage(misused: Any, arguments: tuple[str, ...]) -> None:
    misused(*arguments)


def test_no_command_shows_the_help(surgeon: Any) -> None:
    assert surgeon().status == 2
    assert "Commands:" in surgeon().err


# -- patches -----------------------------------------------------------------------------------


@pytest.fixture
def patch(surgeon: Any, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("patch") / "p.safetensors"
    assert surgeon("ablate", folder, "--at", ENTRY, "-o", path).status == 0
    return path


def test_a_patch_for_another_model(
    refused: Any, copy: Path, patch: Path, reading: Any, tmp_path: Path
) -> None:
    other = AutoModelForCausalLM.from_pretrained(copy)
    other.get_parameter("model.layers.0.mlp.down_proj.weight").data[0, 0] += 1
    other.save_pretrained(copy)
    for said in (
        refused("measure", copy, "--patch", patch, *reading, status=3),
        refused("apply", copy, "--patch", patch, "-o", tmp_path / "out", status=3),
        refused("undo", copy, "--patch", patch, "-o", tmp_path / "out", status=3),
    ):
        assert "L0.mlp.down" in said
    assert left_in(tmp_path) == ["copy"]


def test_a_patch_applied_twice(
    refused: Any, surgeon: Any, folder: Path, patch: Path, tmp_path: Path, reading: Any
) -> None:
    assert surgeon("apply", folder, "--patch", patch, "-o", tmp_path / "out").status == 0
    refused("apply", tmp_path / "out", "--patch", patch, "-o", tmp_path / "out2", status=3)
    refused("apply", folder, "--patch", patch, "--patch", patch, "-o", tmp_path / "out2", status=3)
    refused("measure", folder, "--patch", patch, "--patch", patch, *reading, status=3)
    assert left_in(tmp_path) == ["out"]


def test_a_tied_weight(
    refused: Any, surgeon: Any, copy: Path, tmp_path: Path, reading: Any
) -> None:
    tiny_model("llama", tie_word_embeddings=True).save_pretrained(copy)
    patch = tmp_path / "p"
    assert surgeon("ablate", copy, "--at", "embed[3, 4]", "-o", patch).status == 0
    assert "unembed" in refused("measure", copy, "--patch", patch, *reading, status=3)


def test_damaged_patches(
    refused: Any, folder: Path, patch: Path, reading: Any, tmp_path: Path
) -> None:
    raw = patch.read_bytes()
    flipped = raw[:-1] + bytes([raw[-1] ^ 1])
    for damaged in (
        b"",
        raw[:-3],
        raw[:40],
        flipped,
        (folder / "model.safetensors").read_bytes(),
        b"banana" * 20,
    ):
        patch.write_bytes(damaged)
        assert "is damaged or is not a patch" in refused(
            "measure", folder, "--patch", patch, *reading
        )
        assert "is damaged or is not a patch" in refused(
            "apply", folder, "--patch", patch, "-o", tmp_path / "out"
        )
    patch.unlink()
    assert "No such file" in refused("measure", folder, "--patch", patch, *reading)
    assert "Is a directory" in refused("measure", folder, "--patch", tmp_path, *reading)
    assert left_in(tmp_path) == []


# -- where to write ----------------------------------------------------------------------------


def test_places_that_cannot_be_written(
    refused: Any, folder: Path, patch: Path, tmp_path: Path
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("a file")
    for place in (tmp_path / "nowhere" / "p", blocked / "p"):
        assert "there is no folder" in refused("ablate", folder, "--at", ENTRY, "-o", place)
        for verb in ("apply", "undo"):
            assert "there is no folder" in refused(verb, folder, "--patch", patch, "-o", place)
    assert "that is a folder" in refused("ablate", folder, "--at", ENTRY, "-o", tmp_path)
    assert "cannot make the folder" in refused("demo", "-o", blocked / "run")
    assert left_in(tmp_path) == ["file"]
    assert blocked.read_text() == "a file"


def test_a_folder_that_exists_is_not_overwritten(
    refused: Any, folder: Path, patch: Path, tmp_path: Path
) -> None:
    for verb in ("apply", "undo"):
        assert "exists already" in refused(verb, folder, "--patch", patch, "-o", tmp_path)
        assert "exists already" in refused(verb, folder, "--patch", patch, "-o", folder)
    assert left_in(tmp_path) == []


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_nothing_behind(
    refused: Any, folder: Path, patch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "p"
    old.write_text("written before")
    with monkeypatch.context() as disk:
        disk.setattr(Path, "write_bytes", full)
        assert "No space left" in refused("ablate", folder, "--at", ENTRY, "-o", old, status=1)
    with monkeypatch.context() as disk:
        disk.setattr(shutil, "copyfile", full)
        assert "No space left" in refused(
            "apply", folder, "--patch", patch, "-o", tmp_path / "out", status=1
        )
    assert left_in(tmp_path) == ["p"]
    assert old.read_text() == "written before"


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_ctrl_c_while_writing_leaves_nothing_behind(
    refused: Any, folder: Path, patch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []

    def copy_one(source: str, target: str) -> None:
        written.append(target)
        if len(written) == 2:
            raise KeyboardInterrupt
        Path(target).write_bytes(Path(source).read_bytes())

    with monkeypatch.context() as keys:
        keys.setattr(os, "replace", interrupt)
        assert "interrupted" in refused(
            "ablate", folder, "--at", ENTRY, "-o", tmp_path / "p", status=1
        )
    with monkeypatch.context() as keys:
        keys.setattr(shutil, "copyfile", copy_one)
        assert "interrupted" in refused(
            "apply", folder, "--patch", patch, "-o", tmp_path / "out", status=1
        )
    assert len(written) == 2
    assert left_in(tmp_path) == []


def test_out_of_memory(
    refused: Any, folder: Path, reading: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory")):

        def fail(*_: object, error: BaseException = error) -> None:
            raise error

        monkeypatch.setattr("surgeon.studies.measure.mean_nll", fail)
        assert "out of memory; try fewer --windows" in refused(
            "measure", folder, *reading, status=1
        )


# -- help --------------------------------------------------------------------------------------


def test_help_names_every_command(surgeon: Any) -> None:
    for flag in ("--help", "-h"):
        status, out, err = surgeon(flag)
        assert (status, err) == (0, "")
        assert all(name in out for name in ORDER)
    assert surgeon("--version").out.startswith("surgeon, version ")


@pytest.mark.parametrize("verb", ORDER)
def test_help_of_a_command_names_every_option(surgeon: Any, verb: str) -> None:
    status, out, err = surgeon(verb, "--help")
    assert (status, err) == (0, "")
    command = group.get_command(click.Context(group), verb)
    assert command is not None
    assert command.help
    assert " ".join(command.help.split(".")[0].split()) in " ".join(out.split())
    for parameter in command.params:
        names = (
            parameter.opts
            if parameter.param_type_name == "option"
            else [str(parameter.name).upper()]
        )
        assert all(name in out for name in names)
        assert parameter.param_type_name == "argument" or getattr(parameter, "help", None)
