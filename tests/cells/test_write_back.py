"""Results in AnnData: they come back from the file, and the data are as they were."""

from __future__ import annotations

import json
from pathlib import Path

import anndata
import numpy as np
import pandas
import pytest

from surgeon.cells.data import write_back
from surgeon.errors import BadInput


def data() -> anndata.AnnData:
    names = [f"g{i}" for i in range(3)]
    return anndata.AnnData(
        np.arange(12, dtype=np.float32).reshape(4, 3),
        obs=pandas.DataFrame(index=list("wxyz")),
        var=pandas.DataFrame(index=names),
    )


def test_columns_and_document_come_back(tmp_path: Path):
    adata = data()
    file = tmp_path / "out.h5ad"
    document = {"verdict": "none", "nested": [{"a": 1}]}
    write_back(
        adata,
        file,
        {"damage": {"g2": 0.5, "elsewhere": 9.0}},
        {"nll": {"w": 1.0, "z": 2.0}},
        document,
    )
    back = anndata.read_h5ad(file)
    np.testing.assert_array_equal(back.var["surgeon_damage"], [np.nan, np.nan, 0.5])
    np.testing.assert_array_equal(back.obs["surgeon_nll"], [1.0, np.nan, np.nan, 2.0])
    assert json.loads(back.uns["surgeon"]["document"]) == document
    assert "not biomarkers" in back.uns["surgeon"]["note"]
    assert list(adata.var.columns) == list(adata.obs.columns) == []
    assert "surgeon" not in adata.uns
    assert [p.name for p in tmp_path.iterdir()] == ["out.h5ad"]


def test_other_data_and_other_places_are_refused(tmp_path: Path):
    with pytest.raises(BadInput, match="write into the data that was screened"):
        write_back(data(), tmp_path / "out.h5ad", {"damage": {"elsewhere": 1.0}}, {}, {})
    with pytest.raises(BadInput, match="cannot write"):
        write_back(data(), tmp_path / "no" / "out.h5ad", {"damage": {"g0": 1.0}}, {}, {})
    assert list(tmp_path.iterdir()) == []
