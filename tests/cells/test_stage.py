"""The stage: which cells are measured on, what the baseline is fitted on, and columns of obs."""

from __future__ import annotations

from pathlib import Path

import anndata
import numpy as np
import pandas
import pytest
import torch
from cells_tiny import GENES, VOCAB, tiny

from surgeon.cells import Stage, TokenConfig, fit_marginal, save_cells, tokenise
from surgeon.cells.data import expression
from surgeon.cells.stage import StageConfig, column, open_stage
from surgeon.errors import BadInput

NAMES = [f"c{i}" for i in range(40)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    counts = np.random.default_rng(0).poisson(3, size=(40, 25)).astype(np.float32)
    counts[7, :24] = 0  # detects no gene that the model knows
    obs = pandas.DataFrame(
        {"cell_type": ["a", "b"] * 20, "holes": [None, *["x"] * 39]}, index=NAMES
    )
    adata = anndata.AnnData(counts, obs=obs, var=pandas.DataFrame(index=[*GENES, "unknown"]))
    adata.write_h5ad(tmp_path / "cells.h5ad")
    return tmp_path / "cells.h5ad"


def saved(folder: Path, split: dict[str, list[str]] | None = None) -> Path:
    training = None if split is None else {"source": "X", "split": split}
    save_cells(
        folder / "model", tiny().model, VOCAB, TokenConfig(include_zeros=True), training=training
    )
    return folder / "model"


def stage_of(model: Path, data: Path, seed: int = 0, **settings: int) -> Stage:
    return open_stage(StageConfig(str(model), str(data), **settings), seed)


def test_only_cells_held_out_of_training_are_measured_on(tmp_path: Path, data: Path):
    model = saved(tmp_path, {"test": NAMES[:6], "validation": NAMES[6:12], "train": NAMES[12:]})
    few = stage_of(model, data, cells=4)
    assert set(few.batch.cell_names) < set(NAMES[:6])
    assert few.record.held_out
    more = stage_of(model, data, cells=100)
    assert set(more.batch.cell_names) == set(NAMES[:12]) - {"c7"}


def test_without_a_split_every_usable_cell_may_be_taken_and_nothing_is_claimed(
    tmp_path: Path, data: Path
):
    stage = stage_of(saved(tmp_path), data, cells=28)
    assert not stage.record.held_out
    assert len(stage.batch.cell_names) == 28
    assert "c7" not in stage.batch.cell_names
    assert stage.types == [{0: "a", 1: "b"}[int(name[1:]) % 2] for name in stage.batch.cell_names]


def test_the_baseline_is_fitted_on_the_cells_that_are_not_measured(tmp_path: Path, data: Path):
    stage = stage_of(saved(tmp_path), data, cells=28)
    values = expression(anndata.read_h5ad(data), "X")
    rest = [
        i for i, name in enumerate(NAMES) if name not in stage.batch.cell_names and name != "c7"
    ]
    assert len(rest) == 11
    expected = fit_marginal(
        tokenise(values.of(rest), VOCAB, TokenConfig(include_zeros=True)), 26, 51
    ).nll(stage.batch, stage.masked)
    torch.testing.assert_close(stage.baseline, expected, equal_nan=True)
    assert torch.equal(stage.baseline.isnan(), ~stage.masked)
    with pytest.raises(BadInput, match="use fewer"):
        stage_of(tmp_path / "model", data, cells=100)


def test_genes_are_cut_and_the_same_seed_gives_the_same_tokens(tmp_path: Path, data: Path):
    model = saved(tmp_path)
    first, second = (stage_of(model, data, 3, cells=10, genes=5) for _ in range(2))
    assert first.batch.genes.shape == (10, 6)
    assert torch.equal(first.batch.values, second.batch.values)
    assert torch.equal(first.masked, second.masked)


def test_columns_that_are_missing_or_have_holes_are_refused(tmp_path: Path, data: Path):
    adata = anndata.read_h5ad(data)
    with pytest.raises(BadInput, match="no column 'nothing'; it has cell_type, holes"):
        column(adata, "nothing", NAMES)
    with pytest.raises(BadInput, match="no value for 1 of the 40"):
        column(adata, "holes", NAMES)
