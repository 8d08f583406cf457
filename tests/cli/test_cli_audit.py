"""`surgeon audit`: documents, lines, annotations and exit statuses, against checkpoints changed
here.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hub import Hub, serve
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from transformers import LlamaConfig, LlamaForCausalLM

from surgeon.audit import Audit
from surgeon.errors import BadInput
from surgeon.studies.lab import open_lab

ROOT = Path(__file__).resolve().parents[2]
PLANTED, STORED = "L0.mlp.down[5, 7]", "model.layers.0.mlp.down_proj.weight"


@pytest.fixture
def changed(folder: Path, tmp_path: Path) -> Any:
    """A copy of the checkpoint whose planted entry is `factor` times what it was."""

    def make(factor: float, name: str = "other") -> Path:
        target = Path(shutil.copytree(folder, tmp_path / name))
        tensors = load_file(target / "model.safetensors")
        tensors[STORED][5, 7] *= factor
        save_file(tensors, target / "model.safetensors", {"format": "pt"})
        return target

    return make


def test_document(surgeon: Any, folder: Path, changed: Any) -> None:
    other = changed(0.6)
    status, out, err = surgeon("audit", folder, other, "--at", PLANTED, "--json")
    document = json.loads(out)
    assert (status, err) == (0, "")
    assert (document["verdict"], document["source"]) == ("amber", "given")
    (entry,) = document["entries"]
    assert (entry["entry"], entry["base"], entry["rank"], entry["rank_base"], entry["verdict"]) == (
        PLANTED,
        300.0,
        1,
        1,
        "amber",
    )
    assert entry["other"] == pytest.approx(180)
    assert entry["ratio"] == pytest.approx(0.6)
    assert document["bytes_read"] == 2 * 32 * 48 * 4
    assert document["matrices"][0]["cosine"] == pytest.approx(1)
    again = json.loads(surgeon("audit", folder, other, "--at", PLANTED, "--format", "json").out)
    assert {**again, "command": None} == {**document, "command": None}


@pytest.mark.parametrize(
    ("factor", "fail_on", "status"),
    [
        (1.0, "red", 0),
        (0.6, "red", 0),
        (0.6, "amber", 1),
        (1.0, "amber", 0),
        (0.0, "red", 1),
        (0.0, "never", 0),
        (-1.0, "red", 1),
    ],
)
def test_status(
    surgeon: Any, folder: Path, changed: Any, factor: float, fail_on: str, status: int
) -> None:
    result = surgeon("audit", folder, changed(factor), "--at", PLANTED, "--fail-on", fail_on)
    verdict = {1.0: "ok", 0.6: "amber", 0.0: "red", -1.0: "red"}[factor]
    said = f"surgeon: the verdict is {verdict}, which fails the audit (--fail-on {fail_on}).\n"
    assert (result.status, result.err) == (status, said if status else "")
    assert result.out.startswith(f"Verdict: {verdict}. ")
    assert f"{verdict}: {PLANTED} 300 -> {300 * factor:g}, ratio {factor:.2f}, rank 1" in result.out
    assert "The rule: a ratio from 0.75 to 2 is ok" in result.out


def test_default_is_to_fail_on_red(surgeon: Any, folder: Path, changed: Any) -> None:
    assert surgeon("audit", folder, changed(0.4, "a"), "--at", PLANTED).status == 1
    assert surgeon("audit", folder, changed(0.6, "b"), "--at", PLANTED).status == 0


def test_annotations(surgeon: Any, folder: Path, changed: Any) -> None:
    other = changed(0.0, "50%, or::error::none\nat all")
    status, out, _ = surgeon(
        "audit", folder, other, "--at", "L0.mlp.down[5, :]", "--format", "github"
    )
    lines = out.splitlines()
    assert status == 1
    assert all(
        line.startswith(
            ("::error title=surgeon audit::red: ", "::warning title=surgeon audit::amber: ")
        )
        for line in lines
    )
    assert "50%25, or::error::none%0Aat all" in lines[0]
    assert f"{PLANTED} 300 -> 0, ratio 0.00, rank 1 -> 1536" in lines[1]
    assert len(lines) == 2
    ok = surgeon("audit", folder, folder, "--at", PLANTED, "--format", "github")
    assert ok.out.startswith("::notice title=surgeon audit::ok: ")
    assert (
        "::warning "
        in surgeon("audit", folder, changed(0.6), "--at", PLANTED, "--format", "github").out
    )


def test_a_patch_names_the_entries(
    surgeon: Any, folder: Path, changed: Any, tmp_path: Path
) -> None:
    patch = tmp_path / "p.patch"
    assert (
        surgeon("ablate", folder, "--at", PLANTED, "--at", "L1.mlp.down[2, 3]", "-o", patch).status
        == 0
    )
    document = json.loads(
        surgeon(
            "audit", folder, changed(0.6), "--patch", patch, "--at", "L0.mlp.down[1, 2]", "--json"
        ).out
    )
    assert [[e["entry"] for e in s["entries"]] for s in document["sets"]] == [
        ["L0.mlp.down[1, 2]"],
        [PLANTED, "L1.mlp.down[2, 3]"],
    ]
    assert document["settings"]["at"] == ["L0.mlp.down[1, 2]"]
    assert document["settings"]["patches"] == [str(patch)]
    assert document["sets"][1]["ratio"] == pytest.approx(0.6, abs=1e-3)
    assert [s["verdict"] for s in document["sets"]] == ["ok", "amber"]


def test_found_where_none_are_known(surgeon: Any, folder: Path, changed: Any, text: Path) -> None:
    result = surgeon(
        "audit", folder, changed(0.6), "--text", text, "--window", 16, "--run", "--json"
    )
    document = json.loads(result.out)
    assert document["source"] == "found in BASE"
    assert document["corpus"]["name"] == text.name
    entries = {e["entry"]: e for e in document["entries"]}
    assert entries[PLANTED]["verdict"] == document["verdict"] == "amber"
    # the channel that the planted entry writes, with the rest of its row
    (activation,) = [
        a for a in document["activations"] if (a["site"], a["row"]) == ("L0.mlp.down", 5)
    ]
    assert activation["ratio"] == pytest.approx(0.6, abs=0.05)
    assert activation["base"] > 10


def test_published_entries_are_known_by_shape_and_weight(
    surgeon: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy of a published model under another name; a namesake in shape that holds other weights
    is no copy.
    """
    from surgeon.find import index

    data = index._data()
    record = {**data["records"][0], "row": 5, "col": 7, "layer": 1}
    inert = {**record, "row": 6, "status": "nearly inert"}
    twin = {**record, "model": "org/other", "weight": 0.77}
    shapes = {record["model"]: ["llama", 3, 32, 48], "org/other": ["llama", 3, 32, 48]}
    monkeypatch.setattr(
        index, "_data", lambda: {**data, "shapes": shapes, "records": [record, inert, twin]}
    )
    model = tiny_model("llama")
    model.get_parameter("model.layers.1.mlp.down_proj.weight").data[5, 7] = -1.93
    model.save_pretrained(tmp_path / "copy")
    model.get_parameter("model.layers.1.mlp.down_proj.weight").data[5, 7] *= 0.9
    model.save_pretrained(tmp_path / "tuned")
    status, out, err = surgeon("audit", tmp_path / "copy", tmp_path / "tuned", "--json")
    document = json.loads(out)
    assert (status, document["source"]) == (0, f"published for {record['model']}")
    assert [e["entry"] for e in document["entries"]] == ["L1.mlp.down[5, 7]"]
    assert err == ""
    model.get_parameter("model.layers.1.mlp.down_proj.weight").data[5, 7] = 1.93
    model.save_pretrained(tmp_path / "namesake")
    # nothing is published for it, so it is looked into, which takes a tokenizer
    other = surgeon("audit", tmp_path / "namesake", tmp_path / "tuned", "--window", 16)
    assert "ships no tokenizer" in other.err


def test_every_published_model_has_a_shape() -> None:
    from surgeon.find.index import _data, published, records_shaped

    assert set(_data()["shapes"]) == {r.model for r in published()}
    config = LlamaConfig(num_hidden_layers=32, hidden_size=4096, intermediate_size=11008)
    assert {r.model for r in records_shaped(config)} == {
        "huggyllama/llama-7b",
        "meta-llama/Llama-2-7b-hf",
    }


@pytest.mark.filterwarnings("ignore")  # of torchao and compressed-tensors
@pytest.mark.parametrize("kind", ["dense", "sidecar", "compressed-tensors", "torchao"])
def test_what_surgeon_exports_can_be_audited(surgeon: Any, kind: str, tmp_path: Path) -> None:
    """Against the model that transformers makes of the folder."""
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "vocab_size": 99,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, architectures=["LlamaForCausalLM"]))
    model.get_parameter(STORED).data[5, 7] = 3.0
    model.save_pretrained(tmp_path / "base")
    command = [
        "quantize",
        tmp_path / "base",
        "-o",
        tmp_path / "q",
        "--bits",
        4,
        "--block",
        "group:32",
        "--critical",
        PLANTED,
        "--stream",
    ]
    done = surgeon(*command, "--clip", "percentile", "--clip-value", 99, "--export", kind)
    assert done.status == 0, done.err
    at = [PLANTED, "L0.mlp.down[5, 8]", "L1.mlp.up[3, 4]"]
    result = surgeon(
        "audit",
        tmp_path / "base",
        tmp_path / "q",
        *(x for a in at for x in ("--at", a)),
        "--json",
        "--fail-on",
        "never",
    )
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.float32)
    loaded(torch.tensor([[1, 2]]))  # compressed-tensors unpacks its weights in the first pass

    def dense(path: str) -> torch.Tensor:
        """As the module acts, whatever it holds."""
        module = loaded.get_submodule(path)
        return module(torch.eye(module.in_features)).T

    down, up = dense("model.layers.0.mlp.down_proj"), dense("model.layers.1.mlp.up_proj")
    expected = [float(down[5, 7]), float(down[5, 8]), float(up[3, 4])]
    assert [e["other"] for e in json.loads(result.out)["entries"]] == pytest.approx(
        expected, rel=1e-5
    )
    assert json.loads(result.out)["entries"][0]["ratio"] == pytest.approx(1, abs=0.02)


@pytest.fixture
def adapter(folder: Path, tmp_path: Path) -> Path:
    """One that halves the planted entry and changes nothing else."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        LlamaForCausalLM.from_pretrained(folder),
        LoraConfig(r=1, lora_alpha=1, target_modules=["down_proj"]),
    )
    name = "base_model.model.model.layers.0.mlp.down_proj.lora_{}.default.weight"
    a, b = (model.get_parameter(name.format(factor)).data for factor in "AB")
    a.zero_(), b.zero_()
    a[0, 7], b[5, 0] = 1, -150
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.filterwarnings("ignore")  # PEFT's own
def test_run_of_an_adapter(surgeon: Any, folder: Path, adapter: Path, text: Path) -> None:
    """The super activation with the adapter on, against the planted entry that the adapter
    halves.
    """
    document = json.loads(
        surgeon(
            "audit",
            folder,
            adapter,
            "--at",
            PLANTED,
            "--run",
            "--text",
            text,
            "--window",
            16,
            "--json",
        ).out
    )
    assert document["entries"][0]["other"] == pytest.approx(150)
    assert document["verdict"] == "amber"
    (activation,) = document["activations"]
    assert activation["ratio"] == pytest.approx(0.5, abs=0.05)


@pytest.mark.slow
def test_both_on_the_hub(folder: Path, changed: Any, tmp_path: Path) -> None:
    """Only the headers and the matrix concerned are fetched.

    huggingface_hub reads its endpoint when imported: a process of its own.
    """
    with serve(Hub({"org/base": folder, "org/tuned": changed(0.6)})) as hub:
        environment = {
            **os.environ,
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "home"),
            "PYTHONPATH": str(ROOT / "src"),
        }
        command = [
            sys.executable,
            "-m",
            "surgeon",
            "audit",
            "org/base",
            "org/tuned",
            "--at",
            PLANTED,
            "--json",
        ]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["entries"][0]["ratio"] == pytest.approx(0.6)
    fetched = [
        stop - start
        for method, name, (start, stop) in hub.asked
        if name.endswith(".safetensors") and method == "GET"
    ]
    assert 2 * 32 * 48 * 4 < sum(fetched) < 0.3 * 2 * (folder / "model.safetensors").stat().st_size


def test_refusals(surgeon: Any, folder: Path, tmp_path: Path) -> None:
    tiny_model("llama", intermediate_size=64).save_pretrained(tmp_path / "wide")
    wide = surgeon("audit", folder, tmp_path / "wide", "--at", PLANTED)
    assert (wide.status, wide.out) == (2, "")
    assert "shape (out, in) = (32, 64)" in wide.err
    tiny_model("llama", seed=5, max_position_embeddings=512).save_pretrained(tmp_path / "stranger")
    assert "no relative" in surgeon("audit", folder, tmp_path / "stranger", "--at", PLANTED).err
    for wrong in ("L0.mlp.down[500, 7]", "L9.mlp.down[5, 7]", "L0.mlp.dawn[5, 7]", "5, 7"):
        assert surgeon("audit", folder, folder, "--at", wrong).status == 2
    assert surgeon("audit", folder, tmp_path / "none", "--at", PLANTED).status == 2
    assert surgeon("audit", folder, folder, "--at", PLANTED, "--at", PLANTED).status == 2
    assert surgeon("audit", folder).status == 2


def test_run_says_why_not(surgeon: Any, folder: Path, tmp_path: Path, text: Path) -> None:
    """An OTHER whose weights can be audited, but which cannot be run for lack of one."""
    target = Path(shutil.copytree(folder, tmp_path / "part"))
    tensors = load_file(target / "model.safetensors")
    del tensors["model.layers.2.mlp.down_proj.weight"]
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    result = surgeon(
        "audit",
        folder,
        target,
        "--at",
        PLANTED,
        "--run",
        "--text",
        text,
        "--window",
        16,
        "--windows",
        2,
        "--json",
    )
    document = json.loads(result.out)
    assert result.status == 0
    assert document["activations"] == []
    assert "lacks weights" in document["not_run"]


# the same in Python


def test_a_lab_and_the_command_line_give_the_same(
    surgeon: Any, folder: Path, changed: Any, text: Path
) -> None:
    other = changed(0.6)
    given = ["--run", "--text", text, "--window", 16, "--windows", 12]
    printed = json.loads(surgeon("audit", folder, other, *given, "--json").out)
    lab = open_lab(folder)
    of_lab = lab.audit(other, run=True, text=str(text), window=16, windows=12)
    document = of_lab.to_json()
    assert document["command"].startswith(f"lab.audit(other={str(other)!r}, run=True")
    assert document["fingerprint"] == lab.fingerprint
    for name in ("command", "fingerprint"):
        document[name] = printed[name]
    assert document == printed
    assert len(document["activations"]) > 0


def test_a_finding_names_sets_with_their_shares(folder: Path, changed: Any, text: Path) -> None:
    """As where nothing is named, and the audit looks for them itself."""
    lab, other = open_lab(folder), changed(0.6)
    settings = {"text": str(text), "window": 16}
    finding = lab.find(windows=40, **settings)
    looked_for, of_finding = lab.audit(other, **settings), lab.audit(other, at=finding)
    assert of_finding.sets == looked_for.sets
    assert (of_finding.source, looked_for.source) == ("given", "found in BASE")
    assert of_finding.sets[:1] == lab.audit(other, at=finding.sets[0]).sets
    parts = [str(part) for one in finding.sets for part in one.parts]
    assert of_finding.provenance.settings["at"] == parts
    assert of_finding.provenance.corpus is None
    # addresses beside it are a set of their own; a patch, or what holds one, is another
    mixed = lab.audit(other, at=[finding, "L1.mlp.down[2, 3]"], patches=lab.ablate(PLANTED))
    assert [[str(e.entry) for e in one.entries] for one in mixed.sets[-2:]] == [
        ["L1.mlp.down[2, 3]"],
        [PLANTED],
    ]


@pytest.mark.filterwarnings("ignore")  # PEFT's own
def test_an_adapter_leaves_the_model_of_the_lab_alone(
    folder: Path, adapter: Path, text: Path
) -> None:
    lab = open_lab(folder)
    before = {name: weight.clone() for name, weight in lab.model.state_dict().items()}
    result = lab.audit(adapter, at=PLANTED, run=True, text=str(text), window=16, windows=4)
    assert result.activations[0].ratio == pytest.approx(0.5, abs=0.05)
    after = lab.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_what_python_is_refused(folder: Path, text: Path) -> None:
    lab = open_lab(folder)
    with pytest.raises(BadInput, match="made of a module"):
        open_lab(lab.model, lab.tokenizer).audit(folder, at=PLANTED)
    with pytest.raises(BadInput, match="vital has to run the model"):
        lab.audit(folder, at="vital")
    with pytest.raises(BadInput, match="fail_on blue is not known"):
        lab.audit(folder, at=PLANTED, fail_on="blue")
    nothing = lab.find(text=str(text), window=16, min_nats=50)
    with pytest.raises(BadInput, match="no vital entries"):
        lab.audit(folder, at=nothing)


def test_a_run_folder_has_its_page(
    surgeon: Any, folder: Path, changed: Any, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    at = ("--at", "L0.mlp.down[5, :]")
    assert surgeon("audit", folder, changed(0.6), *at, "--folder", run).status == 0
    document = json.loads((run / "audit.json").read_text())
    result = Audit.from_json(document)
    assert result.to_json() == document
    page = (run / "report.html").read_text()
    assert "What is left of the critical weights" in page
    assert page.count("<svg") == 2
    # a dot for each entry of the row and one for its sum, in both widths
    dots = re.findall(r'fill="var\(--(patched|control|broken)\)"[^>]*opacity="0.65"', page)
    assert len(dots) == 2 * 49
    assert dots.count("control") >= 2
