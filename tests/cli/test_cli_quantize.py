"""`surgeon quantize`: the table of the four methods, what is written, the sweep, and what is
refused.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import surgeon as surgeon_package
from surgeon import Anatomy, BadInput, Entry, load_corpus, load_model, mean_nll, read_text
from surgeon.quantize import (
    EXPORTS,
    Block,
    ExportPlan,
    Grid,
    QuantizeConfig,
    input_mean_squares,
    quantized,
    quantized_sites,
)
from surgeon.studies.lab import TextSettings
from surgeon.studies.quantize import QuantizeResult, split

ENTRY = "L0.mlp.down[5, 7]"  # planted in the tests' checkpoint
SHORT = ("--window", "16", "--windows", "6")


def test_the_table_has_all_four_methods_and_the_folder_holds_the_chosen(
    folder: Path, text: Path, tmp_path: Path, surgeon
):
    target = tmp_path / "out"
    call = (
        "quantize",
        folder,
        "-o",
        target,
        "--bits",
        "4",
        "--block",
        "tensor",
        "--critical",
        ENTRY,
        "--text",
        text,
        *SHORT,
        "--json",
    )
    result = surgeon(*call)
    assert (result.status, result.err) == (0, "")
    document = json.loads(result.out)
    loaded = load_model(str(folder))
    anatomy = Anatomy.of(loaded.model)
    windows = load_corpus(loaded.tokenizer, read_text(text), "t", 16, 6).windows
    assert document["base"]["nll"] == mean_nll(loaded.model, windows)
    rows = {row["method"]: row for row in document["table"]}
    assert list(rows) == ["rtn", "clip", "restore", "holdout"]
    for method, row in rows.items():
        with quantized(
            anatomy, QuantizeConfig(Grid(4, block=Block("tensor")), method), [Entry.parse(ENTRY)]
        ):
            assert row["nll"] == mean_nll(loaded.model, windows)
    assert rows["restore"]["nll"] == pytest.approx(rows["rtn"]["nll"], abs=1e-4)
    assert rows["holdout"]["nll"] < rows["rtn"]["nll"]
    assert mean_nll(load_model(str(target)).model, windows) == rows["holdout"]["nll"]
    assert document["critical"] == {"entries": [ENTRY], "source": "named"}
    matrices = document["weights"]["matrices"]
    assert len(matrices) == 21
    assert matrices["L0.mlp.down"]["held"] == 1
    assert all(m["clip"] > 0 for m in matrices.values())
    assert document["export"]["matrices"] == matrices
    assert document["export"]["bytes"] == sum(p.stat().st_size for p in target.iterdir())


def test_the_critical_entries_are_found_by_default(folder: Path, text: Path, surgeon):
    result = surgeon("quantize", folder, "--bits", "3", "--text", text, "--window", "16", "--json")
    document = json.loads(result.out)
    assert document["critical"] == {"entries": [ENTRY], "source": "find: found"}
    assert document["export"] is None


def test_in_words(folder: Path, text: Path, tmp_path: Path, surgeon):
    result = surgeon(
        "quantize",
        folder,
        "--bits",
        "4",
        "--critical",
        "none",
        "--weighted",
        "--text",
        text,
        *SHORT,
        "-o",
        tmp_path / "out",
    )
    assert result.status == 0
    for word in (
        "intact",
        "rtn",
        "clip",
        "restore",
        "holdout",
        "top-1",
        "L2.mlp.down",
        "No entry is held out",
        "on 3 windows",
        "out: dense",
        "compared with clip-only",
    ):
        assert word in result.out, word


def test_streamed_it_writes_the_same_bytes(folder: Path, text: Path, tmp_path: Path, surgeon):
    options = (
        "--bits",
        "4",
        "--block",
        "square:8",
        "--critical",
        ENTRY,
        "--critical",
        "L1.mlp.down[:, 3]",
    )
    assert (
        surgeon("quantize", folder, "-o", tmp_path / "one", *options, "--text", text, *SHORT).status
        == 0
    )
    result = surgeon("quantize", folder, "-o", tmp_path / "two", *options, "--stream", "--json")
    assert result.status == 0
    written = json.loads(result.out)["export"]["matrices"]
    assert {site: m["held"] for site, m in written.items() if m["held"]} == {
        "L0.mlp.down": 1,
        "L1.mlp.down": 32,
    }
    assert len(written) == 21
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


@pytest.mark.slow
def test_a_sweep_is_bits_by_block_by_method_with_its_front(
    folder: Path, text: Path, tmp_path: Path, surgeon
):
    task = tmp_path / "run"
    call = (
        "quantize",
        folder,
        "--sweep",
        "--bits",
        "8",
        "--bits",
        "3",
        "--block",
        "tensor",
        "--block",
        "channel",
        "--critical",
        ENTRY,
    )
    result = surgeon(*call, "--text", text, *SHORT, "--json", "--folder", task)
    document = json.loads(result.out)
    assert [(r["bits"], r["block"]) for r in document["table"][::4]] == [
        (8, "tensor"),
        (8, "channel"),
        (3, "tensor"),
        (3, "channel"),
    ]
    front = [(r["bits_per_weight"], r["nll"]) for r in document["pareto"]]
    assert front == sorted(front)
    assert [nll for _, nll in front] == sorted((nll for _, nll in front), reverse=True)
    assert json.loads((task / "quantize.json").read_text()) == document
    words = surgeon(*call, "--text", text, *SHORT).out
    assert "Pareto" in words


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ((), "one --bits"),
        (("--bits", "4", "--bits", "8"), "one --bits"),
        (("--bits", "4", "--block", "group:x"), "no block"),
        (("--bits", "4", "--critical", "find", "--critical", ENTRY), "stand alone"),
        (
            ("--bits", "4", "--critical", "L0.mlp.down[5, 7]", "--critical", "L0.mlp.down[5, :]"),
            "--critical: L0.mlp.down[5, 7] and L0.mlp.down[5, :] share an entry",
        ),
        (("--bits", "4", "--critical", "L0.mlp.down[99, 7]"), "row 99 does not exist"),
        (("--bits", "4", "--sweep", "-o", "DIR"), "writes no checkpoint"),
        (("--bits", "4", "--stream", "--critical", "none"), "--stream does not load the model"),
        (
            ("--bits", "4", "--stream", "-o", "DIR", "--weighted"),
            "--stream does not load the model",
        ),
        (("--bits", "9"), "--bits is 9; it must be at most 8"),
        (("--bits", "4", "-o", "DIR/none/out"), "make it first"),
        (("--bits", "4", "-o", "."), "exists already"),
        (("--bits", "4", "--clip", "mse", "--clip-value", "2"), "--clip-value 2 cannot be used"),
        (("--bits", "4", "--no-pad", "--block", "group:7", "--critical", "none"), "do not divide"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_sentence(
    options: tuple[str, ...], says: str, folder: Path, text: Path, tmp_path: Path, surgeon
):
    result = surgeon(
        "quantize",
        folder,
        *(o.replace("DIR", str(tmp_path / "out")) for o in options),
        "--text",
        text,
        *SHORT,
    )
    assert (result.status, result.out) == (2, "")
    assert says in " ".join(result.err.split())
    assert result.err.count("\n") == 1
    assert not any(tmp_path.iterdir())


def test_a_streamed_model_can_be_searched_too(folder: Path, text: Path, tmp_path: Path, surgeon):
    call = ("quantize", folder, "--bits", "3", "--text", text, "--window", "16", "--json")
    whole = json.loads(surgeon(*call, "-o", tmp_path / "one").out)
    streamed = json.loads(surgeon(*call, "-o", tmp_path / "two", "--stream").out)
    assert streamed["critical"] == whole["critical"]
    assert streamed["critical"]["source"] == "find: found"
    assert (streamed["base"], streamed["table"]) == (None, [])
    assert streamed["export"]["matrices"] == whole["export"]["matrices"]


@pytest.mark.parametrize("swept", [False, True])
def test_no_window_is_calibrated_on_and_judged_on(folder: Path, text: Path, swept: bool):
    """The same numbers whether one grid is asked for or several, on the windows after the first."""
    lab = surgeon_package.open(str(folder))
    given = {"critical": ENTRY, "text": str(text), "window": 16, "windows": 20}
    bits = (4, 3) if swept else 4
    result = lab.quantize(bits, block="channel", sweep=swept, weighted=True, **given)
    assert (result.calibrated_on, result.judged_on) == (8, 12)
    windows = lab.corpus(TextSettings(text=str(text), window=16, windows=20)).windows
    assert result.base.nll == mean_nll(lab.model, windows[8:])
    sites = quantized_sites(lab.anatomy, QuantizeConfig())
    squares = input_mean_squares(lab.anatomy, windows[:8], sites)
    config = QuantizeConfig(Grid(4, block=Block("channel")), weighted=True)
    with quantized(lab.anatomy, config, [Entry.parse(ENTRY)], squares):
        by_hand = mean_nll(lab.model, windows[8:])
    (row,) = [r for r in result.rows() if (r["method"], r["bits"]) == ("holdout", 4)]
    assert row["nll"] == by_hand
    assert row["damage_nats"] == by_hand - result.base.nll


def test_few_windows_are_halved_and_one_is_refused():
    windows = torch.arange(12).view(3, 4)
    calibration, judged = split(windows)
    assert (len(calibration), len(judged)) == (1, 2)
    assert not set(calibration.flatten().tolist()) & set(judged.flatten().tolist())
    with pytest.raises(BadInput, match="gives one window; two are needed"):
        split(windows[:1])


def test_the_lab_gives_what_the_command_gives(folder: Path, text: Path, tmp_path: Path, surgeon):
    options = ("--bits", "3", "--block", "tensor", "--asymmetric", "--clip", "mse", "--weighted")
    call = ("quantize", folder, *options, "--text", text, *SHORT, "--gguf", "f16", "--json")
    document = json.loads(surgeon(*call).out)
    result = surgeon_package.open(str(folder)).quantize(
        3,
        block="tensor",
        symmetric=False,
        clip="mse",
        weighted=True,
        text=str(text),
        window=16,
        windows=6,
        gguf="f16",
    )
    assert result.to_json() | {"command": None} == document | {"command": None}
    assert QuantizeResult.from_json(result.to_json()) == result
    lines = repr(result).splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 100


@pytest.mark.slow
def test_findings_and_addresses_name_what_is_held_out(folder: Path, text: Path):
    lab = surgeon_package.open(str(folder))
    given = {"text": str(text), "window": 16}
    found = lab.find(only="mlp.down", **given)
    by_finding = lab.quantize(3, critical=found, **given)
    assert by_finding.critical.entries == [Entry.parse(ENTRY)]
    assert by_finding.table == lab.quantize(3, critical=ENTRY, **given).table
    assert by_finding.table == lab.quantize(3, **given).table


def test_a_module_has_no_files_to_write_from(folder: Path, text: Path, tmp_path: Path):
    loaded = load_model(str(folder))
    lab = surgeon_package.open(loaded.model, loaded.tokenizer)
    with pytest.raises(BadInput, match="made of a module"):
        lab.quantize(4, critical="none", output=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_an_interrupted_export_says_where_it_goes_on(
    folder: Path, tmp_path: Path, surgeon, monkeypatch: pytest.MonkeyPatch
):
    def interrupted(plan: ExportPlan) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(EXPORTS, "dense", interrupted)
    call = ("quantize", folder, "--bits", "4", "--critical", "none", "--stream")
    status, out, err = surgeon(*call, "-o", tmp_path / "out")
    assert (status, out) == (1, "")
    assert err.strip() == (
        f"surgeon: interrupted; finished shards stay in {tmp_path / '.out.part'}, and the same"
        " command goes on from them."
    )


def test_the_help_imports_no_models() -> None:
    """Each of these takes seconds."""
    code = (
        "import sys\n"
        "from surgeon.cli import run\n"
        "run(['quantize', '--help'])\n"
        "heavy = ('transformers.modeling_utils', 'torchao', 'torch._dynamo')\n"
        "print([name for name in heavy if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "--bits N" in done.stdout
    assert done.stderr.strip() == "[]"
