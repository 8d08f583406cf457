"""`surgeon cells screen` and `surgeon cells map`, from a folder and an h5ad file to documents,
reports and columns.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas
import pytest
from cells_tiny import GENES, tiny

from surgeon.cells import TokenConfig, save_cells
from surgeon.cli import run

SMALL = ("--cells", "24", "--draws", "1", "--seed", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in the published layout, without a baseline beside it, and 60 cells of two
    types from six donors.
    """
    place = tmp_path_factory.mktemp("cells")
    vocab = {"<cls>": 0, **{gene: i + 1 for i, gene in enumerate(GENES)}, "<pad>": 25}
    save_cells(place / "model", tiny().model, vocab, TokenConfig(include_zeros=True))
    random = np.random.default_rng(0)
    odd = np.arange(60) % 2
    high = (np.arange(24) % 2)[None] == odd[:, None]
    counts = random.poisson(np.where(high, 20, 2)).astype(np.float32)
    obs = pandas.DataFrame(
        {
            "cell_type": np.array(["even", "odd"])[odd],
            "stage": np.array(["early", "late"])[(np.arange(60) // 2) % 2],
            "donor": [f"d{i % 12}" for i in range(60)],
            "alone": "d0",
        },
        index=[f"c{i}" for i in range(60)],
    )
    adata = anndata.AnnData(
        counts,
        obs=obs,
        var=pandas.DataFrame(index=GENES),
        obsm={"X_umap": random.normal(size=(60, 2))},
    )
    adata.write_h5ad(place / "cells.h5ad")
    (place / "sets.gmt").write_text(
        "even\t\t" + "\t".join(GENES[::2]) + "\nodd\t\t" + "\t".join(GENES[1::2]) + "\n"
    )
    return place


def json_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert run(["cells", *map(str, arguments), "--json"]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


def test_screen_writes_a_document_a_report_and_columns(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out.h5ad"
    more = ("--each", "1", "--verify", "1", "--folder", tmp_path / "run", "--write-h5ad", out)
    d = json_of(capsys, "screen", folder / "model", folder / "cells.h5ad", *SMALL, *more)
    assert d["verdict"] in ("found", "none")
    assert d["candidates"][0]["verified"]["controls"]["n"] == d["controls"]["n"] == 20
    assert (d["entries"] == []) == (d["verdict"] == "none")
    assert d["cells"] == {"probe": 6, "judge": 18}
    assert d["data"]["type_column"] == "cell_type"
    assert d["load"]["unmatched"] == []
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"cells-screen.json", "report.html"}
    back = anndata.read_h5ad(out)
    assert int(np.isfinite(back.obs["surgeon_damage"]).sum()) == 18
    assert json.loads(back.uns["surgeon"]["document"])["verdict"] == d["verdict"]


def test_screen_says_none_found_in_words(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert (
        run(
            [
                "cells",
                "screen",
                str(folder / "model"),
                str(folder / "cells.h5ad"),
                *SMALL,
                "--each",
                "1",
                "--verify",
                "1",
                "--min-share",
                "1e9",
            ]
        )
        == 0
    )
    text = capsys.readouterr().out
    assert "none found" in text
    assert "worst of 20" in text
    assert "not biomarkers" in text


def test_map_writes_a_document_a_report_and_columns(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out.h5ad"
    more = (
        "--at",
        "L1.norm.norm2[3, 0]",
        "--gmt",
        folder / "sets.gmt",
        "--null",
        "0",
        "--folder",
        tmp_path / "run",
        "--write-h5ad",
        out,
        "--condition",
        "stage",
        "--donor",
        "donor",
    )
    d = json_of(capsys, "map", folder / "model", folder / "cells.h5ad", *SMALL, *more)
    assert d["at"] == ["L1.norm.norm2[3, 0]"]
    assert d["embedding"]["name"] == "UMAP"
    assert set(d["enrichment"]) == {"raw", "residual"}
    assert d["donors"]["design"] == "unpaired"
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"cells-map.json", "report.html"}
    back = anndata.read_h5ad(out)
    worst = d["genes"][0]
    assert back.var["surgeon_damage"][worst["gene"]] == pytest.approx(worst["nats"])
    assert {"surgeon_nll", "surgeon_residual_damage"} <= set(back.var.columns)


def test_map_in_words(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert (
        run(
            [
                "cells",
                "map",
                str(folder / "model"),
                str(folder / "cells.h5ad"),
                *SMALL,
                "--condition",
                "stage",
            ]
        )
        == 0
    )
    text = capsys.readouterr().out
    assert "correlation with intact NLL" in text
    assert "condition early" in text
    assert "heads and blocks" in text


@pytest.mark.parametrize(
    ("more", "status", "says"),
    [
        (("--condition", "stage", "--donor", "alone"), 3, "at least two"),
        (("--donor", "donor"), 2, "names the replicates"),
        (("--condition", "nothing"), 2, "no column 'nothing'"),
        (("--plant", "--at", "L0.mlp.down[0, 0]"), 2, "give one of them"),
        (("--at", "L9.mlp.down[0, 0]"), 2, "has 2 layers"),
        (("--gmt", "none.gmt"), 2, "cannot be read"),
        (("--cells", "0"), 2, "at least one cell"),
    ],
)
def test_what_cannot_be_done_is_said(
    folder: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], status: int, says: str
):
    assert (
        run(["cells", "map", str(folder / "model"), str(folder / "cells.h5ad"), *SMALL, *more])
        == status
    )
    assert says in capsys.readouterr().err


def test_same_command_same_bytes(folder: Path, capsys: pytest.CaptureFixture[str]):
    command = (
        "screen",
        folder / "model",
        folder / "cells.h5ad",
        *SMALL,
        "--each",
        "1",
        "--verify",
        "1",
    )
    assert json_of(capsys, *command) == json_of(capsys, *command)


def test_a_weight_is_ablated_applied_audited_and_undone_as_in_a_language_model(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    def surgeon(*arguments: object) -> tuple[int, str, str]:
        status = run([str(a) for a in arguments])
        return status, *capsys.readouterr()

    base, patched, back = folder / "model", tmp_path / "patched", tmp_path / "back"
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
    status, out, err = surgeon("audit", base, patched, *patch, "--json")
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
