"""The whole explanation and the verb: what it prints, what it refuses, and that nothing it prints
is obeyed.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from explain.conftest import TEXT

from surgeon import open as surgeon_open
from surgeon.anatomy import Anatomy, load_model
from surgeon.cli import run
from surgeon.corpus import load_corpus
from surgeon.errors import BadInput
from surgeon.explain import Explanation, explain
from surgeon.patch import Patch, ablate, save


@pytest.fixture(scope="session")
def patches(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    where = tmp_path_factory.mktemp("patches")
    anatomy = Anatomy.of(load_model(str(folder)).model)
    injury = ablate(anatomy, ["L0.mlp.down[3, :]"])
    with injury.applied(anatomy):
        matrix = anatomy.view("L0.mlp.down").read().clone()
        matrix[3, :5] = 0.1
        repair = Patch.from_matrix(anatomy, {anatomy.resolve("L0.mlp.down"): matrix})
    files = [where / "injury.safetensors", where / "repair.safetensors"]
    save(injury, files[0])
    save(repair, files[1])
    return files


def surgeon(capsys, *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    return run(["explain", *map(str, arguments)]), *capsys.readouterr()


SMALL = ("--window", "16", "--new-tokens", "4", "--permutations", "99", "--draws", "1")


def test_the_json_document(capsys, folder, text, patches):
    both = (folder, "--patch", patches[0], "--patch", patches[1], "--text", text, *SMALL)
    status, out, err = surgeon(
        capsys, *both, "--group", "sea=crab,fish", "--trained", f"5={patches[1]}", "--json"
    )
    assert (status, err) == (0, "")
    document = json.loads(out)
    assert {
        "model",
        "fingerprint",
        "corpus",
        "geometry",
        "topk_curve",
        "channel",
        "influence",
        "behaviour",
    } <= set(document)
    assert document["geometry"]["lines"][0]["region"] == "L0.mlp.down[3, :]"
    assert document["channel"]["channels"][0]["channel"] == 3
    assert set(document["channel"]["attention_sink"]["states"]) == {"base", "broken", "patched"}
    assert document["influence"]["groups"][0]["name"] == "sea"
    assert document["patches"] == [str(path) for path in patches]
    if document["topk_curve"]:
        assert document["topk_curve"]["points"][-1]["trained"] == pytest.approx(
            document["topk_curve"]["points"][-1]["largest"]
        )
    else:
        assert "does no damage" in document["no_topk_curve"]
    assert (
        surgeon(
            capsys, *both, "--group", "sea=crab,fish", "--trained", f"5={patches[1]}", "--json"
        )[1]
        == out
    )


def test_one_patch_has_no_repair(capsys, folder, text, patches):
    status, out, _ = surgeon(
        capsys, folder, "--patch", patches[0], "--text", text, *SMALL, "--json"
    )
    document = json.loads(out)
    assert status == 0
    assert document["topk_curve"] is None
    assert "two patches" in document["no_topk_curve"]
    assert set(document["behaviour"]["summary"]) == {"base", "broken"}


def test_nothing_printed_is_obeyed(capsys, folder, text, patches, tmp_path):
    words = tmp_path / "[red]sea.txt"
    words.write_text("crab fish\nsea")
    prompt = "\x1b]0;owned\x07 [/red] [blink]the"
    status, out, err = surgeon(
        capsys,
        folder,
        "--patch",
        patches[0],
        "--patch",
        patches[1],
        "--text",
        text,
        *SMALL,
        "--prompt",
        prompt,
        "--words",
        words,
    )
    assert (status, err) == (0, "")
    assert "\x1b" not in out
    assert "\x07" not in out
    assert r"\x1b]0;owned\x07 [/red] [blink]the" in out
    assert "[red]sea" in out
    assert r"[bold]Land[/bold] \x1b[31m" in out


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        ((), 2, "Missing option '--patch'"),
        (("--patch", "1", "--patch", "0"), 3, "was made on"),
        (("--patch", "0", "--patch", "0"), 3, "already"),
        (("--patch", "nowhere"), 2, "nowhere"),
        (("--patch", "0", "--group", "sea"), 2, "is not a group of words"),
        (("--patch", "0", "--group", "sea=rocket"), 2, "no token belongs to the group 'sea'"),
        (("--patch", "0", "--group", "sea=crab", "--group", "sea=fish"), 2, "have one name"),
        (("--patch", "0", "--trained", "two=x"), 2, "not a number of entries"),
        (("--patch", "0", "--window", "4000"), 2, "--window 4000"),
        (("--patch", "0", "--words", "nowhere.txt"), 2, "cannot be read"),
    ],
)
def test_refusals_are_one_sentence(capsys, folder, text, patches, arguments, status, said):
    named = [patches[int(a)] if a in ("0", "1") else a for a in arguments]
    small = SMALL[2:] if "--window" in arguments else SMALL
    exit_status, out, err = surgeon(capsys, folder, "--text", text, *small, *named)
    assert (exit_status, out) == (status, "")
    assert said in err
    assert "Traceback" not in err


def test_too_short_a_text(capsys, folder, patches, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("the crab")
    status, _, err = surgeon(capsys, folder, "--patch", patches[0], "--text", short, *SMALL)
    assert status == 2
    assert "less than one window" in err


def test_the_call_gives_what_the_command_gives(capsys, folder, text, patches):
    command = (folder, "--patch", patches[0], "--patch", patches[1], "--text", text, *SMALL)
    words = ("--group", "sea=crab,fish", "--trained", f"5={patches[1]}", "--seed", 2)
    _, out, _ = surgeon(capsys, *command, *words, "--json")
    result = surgeon_open(str(folder)).explain(
        patches,
        text=str(text),
        window=16,
        new_tokens=4,
        permutations=99,
        draws=1,
        groups={"sea": ["crab", "fish"]},
        trained={5: patches[1]},
        seed=2,
    )
    provenance = ("command", "settings")
    document = result.to_json()
    assert {k: v for k, v in document.items() if k not in provenance} == {
        k: v for k, v in json.loads(out).items() if k not in provenance
    }
    read = Explanation.from_json(json.loads(json.dumps(document)))
    assert read == result
    assert len(result.rows()) == document["corpus"]["tokens"]
    assert result.rows()[0]["token"] == result.tokens["token"][0]
    with pytest.raises(BadInput, match="are not here"):
        read.rows()
    lines = repr(result).splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 100


def test_the_model_is_left_as_it_was(case):
    anatomy, tokenizer, _ = case
    corpus = load_corpus(tokenizer, TEXT, "three", 16, 3)
    before = {name: p.clone() for name, p in anatomy.model.named_parameters()}
    explain(anatomy, tokenizer, TEXT, corpus, [ablate(anatomy, ["L0.mlp.down[3, :]"])])
    assert all(torch.equal(p, before[name]) for name, p in anatomy.model.named_parameters())
