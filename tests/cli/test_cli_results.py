"""What the verbs answer, against numbers computed here without Surgeon."""

from __future__ import annotations

import json
from math import exp
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

PLANTED = "L0.mlp.down[5, 7]"
STORED = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture
def answer(surgeon: Any) -> Any:
    """The JSON document of a command that must succeed; nothing else may be on stdout, nothing at
    all on stderr.
    """

    def call(*arguments: object) -> dict[str, Any]:
        status, out, err = surgeon(*arguments, "--json")
        assert (status, err) == (0, "")
        document = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        assert isinstance(document, dict)
        return document

    return call


def windows_by_hand(folder: Path, text: Path, size: int, bos: bool) -> torch.Tensor:
    ids = (
        Tokenizer.from_file(str(folder / "tokenizer.json"))
        .encode(text.read_text(), add_special_tokens=False)
        .ids
    )
    step = size - bos
    return torch.tensor(
        [[1] * bos + ids[i * step : (i + 1) * step] for i in range(len(ids) // step)]
    )


@torch.no_grad()
def nll_by_hand(
    folder: Path, windows: torch.Tensor, zeroed: tuple[int | slice, int | slice] | None = None
) -> float:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    if zeroed is not None:
        model.get_parameter(STORED).data[zeroed] = 0
    log_p = model(windows).logits.double().log_softmax(-1)[:, :-1]
    return float(-log_p.gather(-1, windows[:, 1:, None]).mean())


def test_sites_lists_shapes_as_out_in(answer: Any, folder: Path) -> None:
    found = answer("sites", folder)
    assert found["source"] == "table"
    assert found["layers"] == 3
    shapes = {row["site"]: (tuple(row["shape"]), row["parameter"]) for row in found["sites"]}
    assert shapes["L2.mlp.down"] == ((32, 48), "model.layers.2.mlp.down_proj.weight")
    assert shapes["L0.attn.k"][0] == (16, 32)
    assert shapes["embed"][0] == (32, 99)
    assert shapes["unembed"][0] == (99, 32)
    assert len(found["fingerprint"]) == 64


def test_find_names_the_planted_weight_and_the_fixed_fields(
    answer: Any, folder: Path, text: Path
) -> None:
    found = answer("find", folder, "--text", text, "--window", 16, "--only", "mlp.down")
    assert found["model"] == str(folder)
    assert found["fingerprint"] == answer("sites", folder)["fingerprint"]
    assert found["corpus"].items() >= {"name": text.name, "tokens": 23 * 15, "bos": True}.items()
    assert found["verdict"] == "found"
    assert isinstance(found["rejected"], list)
    (planted,) = found["sets"]
    assert planted["geometry"] == "single"
    assert planted["vital"] is True
    (entry,) = planted["entries"]
    assert (
        entry.items()
        >= {
            "entry": PLANTED,
            "layer": 0,
            "row": 5,
            "col": 7,
            "expert": None,
            "weight": 300.0,
            "rank_abs": 1,
        }.items()
    )
    assert entry["share"] > 0.5
    assert set(planted["damage"]) >= {"joint_nats", "single_nats", "leave_one_out_nats", "ci95"}
    low, high = planted["damage"]["ci95"]
    assert low < planted["damage"]["joint_nats"] < high
    assert planted["controls"]["n"] == 20
    assert (
        planted["controls"]["median_nats"]
        <= planted["controls"]["max_nats"]
        < planted["damage"]["joint_nats"] / 3
    )


def test_none_found_is_a_result(answer: Any, folder: Path, text: Path) -> None:
    found = answer("find", folder, "--text", text, "--window", 16, "--min-nats", 50)
    assert (found["verdict"], found["sets"]) == ("none", [])
    assert all({"entry", "reason"} <= set(r) for r in found["rejected"])
    assert found["rejected"]


@pytest.mark.parametrize(
    ("at", "zeroed"),
    [
        (PLANTED, (5, 7)),
        ("L0.mlp.down[5, :]", (5, slice(None))),
        ("L0.mlp.down[:, 7]", (slice(None), 7)),
    ],
)
def test_verify_measures_the_damage_of_an_entry_a_row_and_a_column(
    answer: Any, folder: Path, text: Path, at: str, zeroed: Any
) -> None:
    found = answer("verify", folder, "--at", at, "--text", text, "--window", 16)
    windows = windows_by_hand(folder, text, 16, bos=True)
    base = nll_by_hand(folder, windows)
    damage = nll_by_hand(folder, windows, zeroed) - base
    assert found["base_nll"] == pytest.approx(base, abs=1e-5)
    assert found["joint_nats"] == pytest.approx(damage, abs=1e-5)
    assert found["single_nats"] == [found["joint_nats"]]
    assert found["leave_one_out_nats"] == [0.0]
    assert found["tokens"] == windows.shape[0] * 15
    assert set(found["controls"]) >= {"n", "max_nats", "median_nats"}
    assert found["vital"] is (damage >= max(0.1, 3 * found["controls"]["max_nats"]))


def test_verify_gives_single_and_leave_one_out_in_the_order_asked(
    answer: Any, folder: Path, text: Path
) -> None:
    found = answer(
        "verify",
        folder,
        "--at",
        "L1.mlp.down[3, 4]",
        "--at",
        PLANTED,
        "--text",
        text,
        "--window",
        16,
        "--windows",
        6,
    )
    windows = windows_by_hand(folder, text, 16, bos=True)[:6]
    damage = nll_by_hand(folder, windows, (5, 7)) - nll_by_hand(folder, windows)
    assert found["at"] == ["L1.mlp.down[3, 4]", PLANTED]
    assert found["single_nats"][1] == pytest.approx(damage, abs=1e-5)
    assert found["leave_one_out_nats"][0] == pytest.approx(damage, abs=1e-5)
    assert abs(found["single_nats"][0]) < 0.1


@pytest.mark.parametrize(("policy", "bos"), [("auto", True), ("yes", True), ("no", False)])
def test_measure_is_the_mean_over_windows_under_the_bos_policy(
    answer: Any, folder: Path, text: Path, policy: str, bos: bool
) -> None:
    found = answer(
        "measure", folder, "--text", text, "--window", 16, "--windows", 9, "--bos", policy
    )
    windows = windows_by_hand(folder, text, 16, bos)[:9]
    assert found["nll"] == pytest.approx(nll_by_hand(folder, windows), abs=1e-5)
    assert found["ppl"] == pytest.approx(exp(found["nll"]))
    assert (found["tokens"], found["corpus"]["bos"]) == (9 * 15, bos)
    assert (
        found["kl_from_base"],
        found["top1_agreement"],
        found["generations"],
        found["loop_rate"],
    ) == (None, None, [], 0.0)


def test_the_incomplete_tail_is_dropped_and_bos_moves_the_windows(
    folder: Path, text: Path, answer: Any
) -> None:
    with_bos, without = (
        answer("measure", folder, "--text", text, "--window", 16, "--bos", b) for b in ("yes", "no")
    )
    assert (with_bos["corpus"]["windows"], without["corpus"]["windows"]) == (350 // 15, 350 // 16)
    assert with_bos["nll"] != without["nll"]


def test_auto_is_what_the_tokenizer_does(
    answer: Any, surgeon: Any, copy: Path, text: Path, without_bos: Any
) -> None:
    without_bos.save_pretrained(copy)
    assert answer("measure", copy, "--text", text, "--window", 16)["corpus"]["bos"] is False
    status, out, err = surgeon("measure", copy, "--text", text, "--window", 16, "--bos", "yes")
    assert (status, out) == (2, "")
    assert "no BOS token" in err


def test_injury_is_written_measured_applied_and_undone(
    answer: Any, folder: Path, text: Path, tmp_path: Path
) -> None:
    patch, out, back = tmp_path / "p.safetensors", tmp_path / "out", tmp_path / "back"
    written = answer("ablate", folder, "--at", PLANTED, "-o", patch)
    assert (written["entries"], written["sites"], written["patch_bytes"]) == (
        1,
        ["L0.mlp.down"],
        patch.stat().st_size,
    )
    prompts = ("the red cat saw the", "the old dog ate the")
    measured = answer(
        "measure",
        folder,
        "--patch",
        patch,
        "--text",
        text,
        "--window",
        16,
        *(x for p in prompts for x in ("--generate", p)),
    )
    windows = windows_by_hand(folder, text, 16, bos=True)
    assert measured["nll"] == pytest.approx(nll_by_hand(folder, windows, (5, 7)), abs=1e-5)
    assert measured["kl_from_base"] > 0.01
    assert 0 < measured["top1_agreement"] < 1
    assert 0 <= measured["loop_rate"] <= 1
    assert [g["prompt"] for g in measured["generations"]] == list(prompts)
    assert all(g["base"] and g["patched"] for g in measured["generations"])

    assert answer("apply", folder, "--patch", patch, "-o", out)["output"] == str(out)
    patched = load_file(out / "model.safetensors")
    assert patched[STORED][5, 7] == 0
    assert answer("measure", out, "--text", text, "--window", 16)["nll"] == pytest.approx(
        measured["nll"], abs=1e-6
    )

    answer("undo", out, "--patch", patch, "-o", back)
    assert (back / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert {p.name for p in back.iterdir()} == {p.name for p in folder.iterdir()}


def test_generation_is_greedy_and_continues_the_prompt(
    answer: Any, folder: Path, text: Path
) -> None:
    prompt = "the red cat"
    found = answer(
        "measure", folder, "--text", text, "--window", 16, "--generate", prompt, "--new-tokens", 5
    )
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder).eval(),
        Tokenizer.from_file(str(folder / "tokenizer.json")),
    )
    ids = tokenizer.encode(prompt).ids
    for _ in range(5):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert found["generations"] == [
        {"prompt": prompt, **dict.fromkeys(("base", "patched"), tokenizer.decode(ids[-5:]))}
    ]


def test_the_same_command_twice_gives_the_same_bytes(
    surgeon: Any, folder: Path, text: Path, tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for target in (one, two):
        assert (
            surgeon("ablate", folder, "--at", PLANTED, "--mode", "mean", "-o", target).status == 0
        )
    assert one.read_bytes() == two.read_bytes()
    for command in (
        ("find", folder, "--text", text, "--window", 16, "--json"),
        (
            "verify",
            folder,
            "--at",
            "L1.mlp.down[:, 3]",
            "--text",
            text,
            "--window",
            16,
            "--json",
            "--seed",
            5,
        ),
        (
            "measure",
            folder,
            "--patch",
            one,
            "--text",
            text,
            "--window",
            16,
            "--generate",
            "the",
            "--json",
        ),
    ):
        assert surgeon(*command) == surgeon(*command)


def test_the_seed_moves_the_controls_and_nothing_else(
    answer: Any, folder: Path, text: Path
) -> None:
    a, b = (
        answer("verify", folder, "--at", PLANTED, "--text", text, "--window", 16, "--seed", seed)
        for seed in (1, 2)
    )
    assert a["controls"] != b["controls"]
    assert a["joint_nats"] == b["joint_nats"]


def test_a_text_without_json_prints_names_and_prompts_literally(
    surgeon: Any, folder: Path, text: Path, tmp_path: Path
) -> None:
    """Square brackets are markup and :smile: an emoji to the library that prints."""
    odd = "[red]x:smile:"
    strange_text = tmp_path / f"{odd}.txt"
    strange_text.write_bytes(text.read_bytes())
    patch, out = tmp_path / f"{odd}.safetensors", tmp_path / odd
    windows = ("--text", strange_text, "--window", 16)
    prompt = "[red]x[/red] :smile: [/] the"
    commands = (
        ("ablate", folder, "--at", PLANTED, "-o", patch),
        ("apply", folder, "--patch", patch, "-o", out),
        ("undo", out, "--patch", patch, "-o", f"{out}2"),
        ("sites", out),
        ("find", f"{out}2", *windows),
        ("verify", out, "--at", "L0.mlp.down[5, :]", *windows, "--behaviour", "--prompt", prompt),
        ("measure", out, *windows, "--generate", prompt),
        ("measure", folder, "--patch", patch, *windows, "--generate", prompt),
    )
    for command in commands:
        status, shown, err = surgeon(*command)
        assert (status, err) == (0, ""), command
        assert odd in shown or command[0] == "sites"
        assert prompt in shown or prompt not in command


def test_tables_are_not_cut_where_stdout_is_no_terminal(surgeon: Any, folder: Path) -> None:
    shown = surgeon("sites", folder).out
    assert "…" not in shown
    assert "L2.norm.post_attention_layernorm" in shown
    assert "model.layers.2.mlp.down_proj.weight" in shown


def test_index_lists_what_was_published(answer: Any, surgeon: Any) -> None:
    records = answer("index")["records"]
    status, shown, _ = surgeon("index")
    assert status == 0
    assert all(r["entry"] in shown for r in records)
