"""Small cells: a slice of scanpy's example, and a model trained on it for a few steps."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

from surgeon.cells import Expression, TrainConfig, expression, read_cells, train

TINY = TrainConfig(
    layers=2,
    d_model=16,
    heads=2,
    d_mlp=24,
    steps=20,
    look_every=10,
    batch=8,
    genes=40,
    max_genes=60,
    warmup=5,
)


@pytest.fixture(scope="session")
def pbmc() -> Any:
    """scanpy's own 700 cells."""
    return read_cells("pbmc68k_reduced")


@pytest.fixture(scope="session")
def forty(pbmc: Any) -> Expression:
    return expression(pbmc, "raw").of(list(range(40)))


@pytest.fixture(scope="session")
def forty_file(pbmc: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "forty.h5ad"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # anndata, on writing what scanpy ships
        pbmc[:40].copy().write_h5ad(path)
    return path


@pytest.fixture(scope="session")
def checkpoint(forty: Expression, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cells") / "model"
    train(forty, TINY).save(folder)
    return folder
