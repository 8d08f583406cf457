"""The verbs of single cells on the command line and from Python: from a folder and an h5ad file to
documents, reports, columns, checkpoints and texts.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas
import pytest
from cells_tiny import GENES, VOCAB, tiny
from tiny import tiny_model

import surgeon as package
from surgeon.cells import TokenConfig, load_cells, save_cells
from surgeon.cells.planted import plant
from surgeon.result import Result
from surgeon.studies.registry import read_result

SMALL = {"cells": 24, "draws": 1, "seed": 1}
SCREEN = {**SMALL, "each": 1, "verify": 1}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in the published layout, without a baseline beside it, and 60 cells of two
    types from twelve donors.
    """
    place = tmp_path_factory.mktemp("cells")
    save_cells(place / "model", tiny().model, VOCAB, TokenConfig(include_zeros=True))
    random = np.random.default_rng(0)
    odd = np.arange(60) % 2
    high = (np.arange(24) % 2)[None] == odd[:, None]
    counts = random.poisson(np.where(high, 20, 2)).astype(np.float32)
    obs = {
        "cell_type": np.array(["even", "odd"])[odd],
        "stage": np.array(["early", "late"])[(np.arange(60) // 2) % 2],
        "donor": [f"d{i % 12}" for i in range(60)],
        "alone": "d0",
    }
    anndata.AnnData(
        counts,
        obs=pandas.DataFrame(obs, index=[f"c{i}" for i in range(60)]),
        var=pandas.DataFrame(index=GENES),
        obsm={"X_umap": random.normal(size=(60, 2))},
    ).write_h5ad(place / "cells.h5ad")
    (place / "sets.gmt").write_text(
        "even\t\t" + "\t".join(GENES[::2]) + "\nodd\t\t" + "\t".join(GENES[1::2]) + "\n"
    )
    return place


def words(settings: dict[str, Any]) -> list[str]:
    """Settings as options."""
    return [word for name, value in settings.items() for word in (option(name), str(value))]


def option(name: str) -> str:
    return "--" + name.replace("_", "-")


def same(document: dict[str, Any], result: Result) -> bool:
    """Whether two faces give the same, but for how they were called and how long it took."""
    about = ("command", "seconds", "settings", "output", "model")
    one, other = ({**d, **dict.fromkeys(about)} for d in (document, result.to_json()))
    return one == other and read_result(document).to_json() == document


@pytest.fixture
def said(surgeon: Any, place: Path) -> Any:
    """The document of a verb on the model and the cells."""

    def call(verb: str, settings: dict[str, Any]) -> dict[str, Any]:
        at = (place / "model", place / "cells.h5ad")
        status, out, err = surgeon("cells", verb, *at, *words(settings), "--json")
        assert (status, err.partition(": ")[0]) in ((0, ""), (0, "report"))
        document: dict[str, Any] = json.loads(out)
        return document

    return call


def test_screen_writes_a_document_a_report_and_columns(said: Any, place: Path, tmp_path: Path):
    out = tmp_path / "out.h5ad"
    d = said("screen", {**SCREEN, "folder": tmp_path / "run", "write_h5ad": out})
    assert d["verdict"] in ("found", "none")
    assert d["candidates"][0]["verified"]["controls"]["n"] == d["controls"]["n"] == 20
    assert (d["entries"] == []) == (d["verdict"] == "none")
    assert d["cells"] == {"probe": 6, "judge": 18}
    assert d["stage"]["type_column"] == "cell_type"
    assert d["stage"]["load"]["unmatched"] == []
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"cells-screen.json", "report.html"}
    back = anndata.read_h5ad(out)
    assert int(np.isfinite(back.obs["surgeon_damage"]).sum()) == 18
    assert json.loads(back.uns["surgeon"]["document"])["verdict"] == d["verdict"]
    files = {"folder": str(place / "model"), "data": str(place / "cells.h5ad")}
    assert same(d, package.run("cells screen", **files, **SCREEN))


def test_screen_says_none_found_in_words(surgeon: Any, place: Path):
    at = (place / "model", place / "cells.h5ad")
    status, text, _ = surgeon("cells", "screen", *at, *words({**SCREEN, "min_share": 1e9}))
    assert status == 0
    assert "Verdict: none found. The rule: " in text
    assert "worst of 20" in text
    assert "not biomarkers" in text


def test_map_writes_a_document_a_report_and_columns(said: Any, place: Path, tmp_path: Path):
    out = tmp_path / "out.h5ad"
    settings = {
        **SMALL,
        "at": "L1.norm.norm2[3, 0]",
        "gmt": str(place / "sets.gmt"),
        "null": 0,
        "condition": "stage",
        "donor": "donor",
    }
    d = said("map", {**settings, "folder": tmp_path / "run", "write_h5ad": out})
    assert d["at"] == ["L1.norm.norm2[3, 0]"]
    assert d["embedding"]["name"] == "UMAP"
    assert set(d["enrichment"]) == {"raw", "residual"}
    assert d["donors"]["design"] == "unpaired"
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"cells-map.json", "report.html"}
    back = anndata.read_h5ad(out)
    worst = d["genes"][0]
    assert back.var["surgeon_damage"][worst["gene"]] == pytest.approx(worst["nats"])
    assert {"surgeon_nll", "surgeon_residual_damage"} <= set(back.var.columns)
    files = {"folder": str(place / "model"), "data": str(place / "cells.h5ad")}
    assert same(d, package.run("cells map", **files, **settings))


def test_map_in_words(surgeon: Any, place: Path):
    at = (place / "model", place / "cells.h5ad")
    status, text, _ = surgeon("cells", "map", *at, *words({**SMALL, "condition": "stage"}))
    assert status == 0
    assert "correlation with intact NLL" in text
    assert "condition early" in text
    assert "heads and blocks" in text


def test_a_planted_weight_is_mapped(surgeon: Any, place: Path, monkeypatch: pytest.MonkeyPatch):
    # no weight of this model costs 0.25 nats on these cells
    monkeypatch.setattr("surgeon.studies.cells_map.plant", partial(plant, nats=0.01))
    at = (place / "model", place / "cells.h5ad")
    status, text, err = surgeon("cells", "map", *at, *words(SMALL), "--plant", "--no-components")
    assert (status, err) == (0, "")
    assert "The weight was planted in a copy" in text
    assert "heads and blocks" not in text


@pytest.mark.parametrize(
    ("more", "status", "says"),
    [
        (("--condition", "stage", "--donor", "alone"), 3, "at least two"),
        (("--donor", "donor"), 2, "name what is compared with --condition"),
        (("--condition", "nothing"), 2, "no column 'nothing'"),
        (("--plant", "--at", "L0.mlp.down[0, 0]"), 2, "give one of them"),
        (("--at", "L9.mlp.down[0, 0]"), 2, "has 2 layers"),
        (("--gmt", "none.gmt"), 2, "cannot be read"),
        (("--write-h5ad", "nowhere/out.h5ad"), 2, "there is no folder"),
        (("--least", "0"), 2, "--least is 0; it must be at least 1"),
    ],
)
def test_what_cannot_be_mapped_is_said(
    surgeon: Any, place: Path, more: tuple[str, ...], status: int, says: str
):
    at = (place / "model", place / "cells.h5ad")
    ended, out, err = surgeon("cells", "map", *at, *words(SMALL), *more)
    assert (ended, out) == (status, "")
    assert says in err


def test_same_command_same_bytes(said: Any):
    assert said("screen", SCREEN) == said("screen", SCREEN)


def test_a_weight_is_ablated_applied_audited_and_undone_as_in_a_language_model(
    surgeon: Any, place: Path, tmp_path: Path
):
    base, patched, back = place / "model", tmp_path / "patched", tmp_path / "back"
    status, out, _ = surgeon("sites", base, "--json")
    sites = {s["site"]: s["shape"] for s in json.loads(out)["sites"]}
    assert (status, sites["L1.norm.norm2.bias"], sites["norm.encoder.enc_norm"]) == (
        0,
        [32, 1],
        [32, 1],
    )
    patch = ("--patch", tmp_path / "p")
    at = ("--at", "L1.norm.norm2[3, 0]", "--at", "L0.mlp.down[2, 5]")
    assert surgeon("ablate", base, *at, "-o", patch[1])[0] == 0
    assert surgeon("apply", base, *patch, "-o", patched)[0] == 0
    status, out, _ = surgeon("audit", base, patched, *patch, "--json")
    document = json.loads(out)
    assert (status, document["verdict"]) == (1, "red")
    assert {e["entry"]: e["other"] for e in document["entries"]} == {
        "L1.norm.norm2[3, 0]": 0.0,
        "L0.mlp.down[2, 5]": 0.0,
    }
    assert surgeon("undo", patched, *patch, "-o", back)[0] == 0
    files = [(f / "model.safetensors").read_bytes() for f in (base, patched, back)]
    assert files[0] == files[2] != files[1]
    status, _, err = surgeon("audit", base, patched)
    assert (status, "name the entries" in err) == (2, True)


def test_train_prints_one_document_and_writes_a_checkpoint(
    surgeon: Any, place: Path, tmp_path: Path
):
    folder, data = tmp_path / "model", place / "cells.h5ad"
    settings = {"steps": 4, "d_model": 16, "layers": 1, "max_genes": 20}
    small = words(settings)
    status, out, err = surgeon("cells", "train", data, "-o", folder, *small, "--json")
    assert (status, err) == (0, "")
    document = json.loads(out)
    assert {"nll", "baseline_nll", "seconds", "lead_nats", "genes", "cells"} <= set(document)
    assert (document["genes"], document["source"], document["steps"]) == (20, "X", 4)
    assert load_cells(folder).training["nll"] == pytest.approx(document["nll"])
    before = (folder / "best_model.pt").read_bytes()
    again = ("cells", "train", data, "-o", folder, "--seed", 1, *small)
    status, out, err = surgeon(*again)
    assert (status, out) == (2, "")
    assert "holds a model already" in err
    assert "--overwrite" in err
    assert (folder / "best_model.pt").read_bytes() == before
    status, out, _ = surgeon(*again, "--overwrite")
    assert status == 0
    assert "gene-marginal baseline" in out
    assert (folder / "best_model.pt").read_bytes() != before
    there = tmp_path / "again"
    assert same(document, package.run("cells train", data=str(data), output=str(there), **settings))
    assert (there / "best_model.pt").read_bytes() == before


def test_sentences(surgeon: Any, place: Path, tmp_path: Path):
    path, data = tmp_path / "cells.txt", place / "cells.h5ad"
    status, out, _ = surgeon("cells", "sentences", data, "-o", path, "--genes", 12, "--json")
    assert (status, json.loads(out)["cells"]) == (0, 60)
    lines = path.read_text().splitlines()
    assert {len(line.split()) for line in lines} == {12}
    result = package.run("cells sentences", data=str(data), output=str(path), genes=12)
    assert same(json.loads(out), result)
    assert result.first == lines[0]
    nowhere = tmp_path / "no" / "cells.txt"
    assert surgeon("cells", "sentences", data, "-o", nowhere)[0] == 2
    assert surgeon("cells", "sentences", data, "-o", path, "--genes", 0)[0] == 2


def test_geneformer_is_measured_beside_controls(
    surgeon: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    genes = [f"ENSG{i:011d}" for i in range(30)]
    counts = np.random.default_rng(0).poisson(2.0, (16, 30)).astype(np.float32)
    cells = pandas.DataFrame(index=[f"c{i}" for i in range(16)])
    data, tokens = tmp_path / "counts.h5ad", tmp_path / "tokens.json"
    anndata.AnnData(counts, obs=cells, var=pandas.DataFrame(index=genes)).write_h5ad(data)
    tokens.write_text(
        json.dumps({"<pad>": 0, "<mask>": 1, **{g: i + 2 for i, g in enumerate(genes)}})
    )
    tiny_model("bert").save_pretrained(tmp_path / "bert")
    capsys.readouterr()  # transformers draws a bar
    fixed = ("cells", "geneformer", tmp_path / "bert", data, "--tokens", tokens)
    status, out, err = surgeon(*fixed, "--json")
    assert (status, err) == (0, "")
    chosen = json.loads(out)
    # random weights: none is vital
    assert (chosen["cells"], chosen["vital"], chosen["controls"]["n"]) == (12, False, 20)
    assert chosen["at"][0].startswith("L")
    lab = package.open(tmp_path / "bert")
    result = lab.cells_geneformer(str(data), tokens=str(tokens))
    assert same(chosen, result)
    assert lab.ablate(result).provenance.settings["at"] == chosen["at"]
    status, out, _ = surgeon(*fixed, "--at", "L0.mlp.down[:, :]")
    assert status == 2  # a whole matrix has no matched control
    status, out, _ = surgeon(*fixed, "--at", "L0.mlp.down[3, :]")
    assert (status, "nats per masked gene" in out) == (0, True)
    assert "16 cells" in out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--layer", "counts"), "no layer 'counts'"),
        (("--raw", "--layer", "a"), "either --raw or --layer"),
    ],
)
def test_what_cannot_be_trained_on_is_said(
    surgeon: Any, place: Path, tmp_path: Path, options: tuple[str, ...], said: str
):
    train = ("cells", "train", place / "cells.h5ad", "-o", tmp_path / "m")
    status, out, err = surgeon(*train, *options)
    assert (status, out) == (2, "")
    assert said in err
    assert surgeon("cells", "train", "nowhere.h5ad", "-o", tmp_path / "m")[0] == 2


def test_the_family_alone_lists_its_verbs(surgeon: Any):
    status, out, _ = surgeon("cells")
    assert status == 0
    assert all(f"cells {verb}" in out for verb in ("train", "screen", "map", "sentences"))
    status, _, err = surgeon("cells", "sceen")
    assert (status, "did you mean cells screen" in err) == (2, True)
