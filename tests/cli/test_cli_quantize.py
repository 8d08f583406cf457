"""`surgeon quantize`: the table of the four methods, what is written, the sweep, and what is
refused.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from surgeon import Anatomy, Entry, load_corpus, load_model, mean_nll, read_text
from surgeon.quantize import Block, Grid, QuantizeConfig, quantized

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
    matrices = {m["site"]: m for m in document["config"]["matrices"]}
    assert len(matrices) == 21
    assert matrices["L0.mlp.down"]["held"] == 1
    assert all(m["clip"] > 0 for m in matrices.values())
    assert document["written"] == sorted(
        document["config"]["matrices"], key=lambda m: list(matrices).index(m["site"])
    )
    assert document["export"]["bytes"] == sum(p.stat().st_size for p in target.iterdir())


def test_the_critical_entries_are_found_by_default(folder: Path, text: Path, surgeon):
    result = surgeon("quantize", folder, "--bits", "3", "--text", text, "--window", "16", "--json")
    document = json.loads(result.out)
    assert document["critical"] == {"entries": [ENTRY], "source": "find: found"}
    assert "export" not in document


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
    written = json.loads(result.out)["written"]
    assert {m["site"]: m["held"] for m in written if m["held"]} == {
        "L0.mlp.down": 1,
        "L1.mlp.down": 32,
    }
    assert len(written) == 21
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


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
    assert [(r["bits"], r["block"]) for r in document["sweep"][::4]] == [
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
            "share an entry",
        ),
        (("--bits", "4", "--critical", "L0.mlp.down[99, 7]"), "row 99 does not exist"),
        (("--bits", "4", "--sweep", "-o", "DIR"), "writes no checkpoint"),
        (("--bits", "4", "--stream", "--critical", "none"), "--stream does not load the model"),
        (("--bits", "4", "--stream", "-o", "DIR"), "--stream does not load the model"),
        (("--bits", "4", "-o", "DIR/none/out"), "make it first"),
        (("--bits", "4", "-o", "."), "exists already"),
        (("--bits", "4", "--clip", "mse", "--clip-value", "2"), "clip value of 2"),
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
