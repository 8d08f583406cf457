"""`surgeon cells train` and `surgeon cells sentences` from the command line."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import anndata
import numpy as np
import pytest
from tiny import tiny_model

from surgeon.cells import load_cells
from surgeon.cli import run


def surgeon(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = run([str(a) for a in arguments])
    return status, *capsys.readouterr()


def test_train_prints_one_document_and_writes_a_checkpoint(
    forty_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / "model"
    small = ("--steps", 4, "--d-model", 16, "--layers", 1, "--max-genes", 40)
    status, out, err = surgeon(capsys, "cells", "train", forty_file, "-o", folder, *small, "--json")
    assert (status, err) == (0, "")
    document = json.loads(out)
    assert {"nll", "baseline_nll", "seconds", "lead_nats", "genes", "cells"} <= set(document)
    assert (document["genes"], document["source"], document["steps"]) == (40, "raw", 4)
    assert load_cells(folder).training["nll"] == pytest.approx(document["nll"])
    before = (folder / "best_model.pt").read_bytes()
    again = ("cells", "train", forty_file, "-o", folder, "--seed", 1, *small)
    status, out, err = surgeon(capsys, *again)
    assert (status, out) == (2, "")
    assert "holds a model already" in err
    assert (folder / "best_model.pt").read_bytes() == before
    assert surgeon(capsys, *again, "--overwrite")[0] == 0
    assert (folder / "best_model.pt").read_bytes() != before
    (folder / "best_model.pt").write_bytes(before)
    status, out, _ = surgeon(capsys, "cells", "train", forty_file, "-o", tmp_path / "again", *small)
    assert status == 0
    assert "gene-marginal baseline" in out
    assert (tmp_path / "again" / "best_model.pt").read_bytes() == (
        folder / "best_model.pt"
    ).read_bytes()


def test_sentences(forty_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "cells.txt"
    status, out, _ = surgeon(
        capsys, "cells", "sentences", forty_file, "-o", path, "--genes", 12, "--json"
    )
    assert (status, json.loads(out)["cells"]) == (0, 40)
    assert {len(line.split()) for line in path.read_text().splitlines()} == {12}
    assert (
        surgeon(capsys, "cells", "sentences", forty_file, "-o", tmp_path / "no" / "cells.txt")[0]
        == 2
    )


def test_geneformer_is_measured_beside_controls(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    genes = [f"ENSG{i:011d}" for i in range(30)]
    counts = np.random.default_rng(0).poisson(2.0, (16, 30)).astype(np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = anndata.AnnData(counts)
        data.var_names = genes
        data.write_h5ad(tmp_path / "counts.h5ad")
    (tmp_path / "tokens.json").write_text(
        json.dumps({"<pad>": 0, "<mask>": 1, **{g: i + 2 for i, g in enumerate(genes)}})
    )
    tiny_model("bert").save_pretrained(tmp_path / "bert")
    capsys.readouterr()  # transformers draws a bar
    fixed = (
        "cells",
        "geneformer",
        tmp_path / "bert",
        tmp_path / "counts.h5ad",
        "--tokens",
        tmp_path / "tokens.json",
        "--json",
    )
    status, out, err = surgeon(capsys, *fixed)
    assert (status, err) == (0, "")
    chosen = json.loads(out)
    assert (chosen["cells"], chosen["vital"], chosen["controls"]["n"]) == (
        12,
        False,
        20,
    )  # random weights: none is vital
    assert chosen["at"][0].startswith("L")
    status, out, _ = surgeon(capsys, *fixed, "--at", "L0.mlp.down[:, :]")
    assert status == 2  # a whole matrix has no matched control
    status, out, _ = surgeon(capsys, *fixed, "--at", "L0.mlp.down[3, :]")
    assert (status, json.loads(out)["cells"]) == (0, 16)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--layer", "counts"), "no layer 'counts'"),
        (("--raw", "--layer", "a"), "either --raw or --layer"),
    ],
)
def test_what_is_refused(
    forty_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    said: str,
):
    status, out, err = surgeon(capsys, "cells", "train", forty_file, "-o", tmp_path / "m", *options)
    assert (status, out) == (2, "")
    assert said in err
    assert surgeon(capsys, "cells", "train", "nowhere.h5ad", "-o", tmp_path / "m")[0] == 2
