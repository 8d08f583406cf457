"""Data and tokens: bins against the published procedure written out, and everything that is
refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
import torch
from cells_tiny import expression_of
from scipy.sparse import csr_matrix

from surgeon.cells import Expression, TokenConfig, expression, make_vocab, read_cells, tokenise
from surgeon.cells.tokenise import bin_range
from surgeon.errors import BadInput


def test_scaled_data_fall_back_to_raw_and_are_refused_where_named(pbmc: Any):
    found = expression(pbmc)
    assert (found.source, found.kind, found.matrix.shape) == ("raw", "log-counts", (700, 765))
    with pytest.raises(BadInput, match=r"X holds negative values.*use raw"):
        expression(pbmc, "X")
    bare = anndata.AnnData(np.array([[1.0, -1.0]], dtype=np.float32))
    with pytest.raises(BadInput, match="negative"):
        expression(bare)
    with pytest.raises(BadInput, match=r"no \.raw"):
        expression(bare, "raw")
    with pytest.raises(BadInput, match="no layer 'counts'"):
        expression(bare, "layer:counts")
    with pytest.raises(BadInput, match="names no expression"):
        expression(bare, "obs")


def test_layers_counts_and_names():
    data = anndata.AnnData(
        np.array([[-1.0, 0.5], [0.0, 1.0]], dtype=np.float32),
        layers={"counts": csr_matrix([[3, 0], [0, 1]])},
    )
    found = expression(data, "layer:counts")
    assert (found.kind, found.matrix.nnz, found.cell_names, found.gene_names) == (
        "counts",
        2,
        ["0", "1"],
        ["0", "1"],
    )
    data.layers["counts"].data[0] = -3
    assert (
        expression(anndata.AnnData(np.array([[0.5, 1.0]], dtype=np.float32))).kind == "log-counts"
    )
    with pytest.raises(BadInput, match="finite"):
        expression(anndata.AnnData(np.array([[np.nan, 1.0]], dtype=np.float32)))
    twice = anndata.AnnData(np.ones((2, 2), dtype=np.float32))
    twice.obs_names = ["a", "a"]
    with pytest.raises(BadInput, match="the cell a is there twice"):
        expression(twice)


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.pkl", b"x", "pickle"),
        ("a.h5ad", b"no hdf5", "cannot be read as h5ad"),
        ("b.h5ad", None, "no data at"),
    ],
)
def test_files_that_are_no_data(tmp_path: Path, name: str, content: bytes | None, match: str):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=match):
        read_cells(tmp_path / name)


def published_range(value: float, edges: np.ndarray) -> tuple[int, int]:
    """The smallest and largest bin that the published rule gives a value: ceil(u * (right - left) +
    left) for u in [0, 1).
    """
    left, right = (
        sum(edges <= value),
        sum(edges < value),
    )  # of sorted edges, what np.digitize counts from either side
    bins = {int(np.ceil(u * (right - left) + left)) for u in np.linspace(0, 1, 301)[:-1]}
    return min(bins), max(bins)


def test_bins_are_quantiles_with_ties_spread_over_what_they_span():
    random = np.random.default_rng(0)
    for values in (
        random.poisson(2.0, 150),
        random.gamma(1.0, 1.0, 100).astype(np.float32),
        np.array([0, 5, 0, 5, 5]),
    ):
        values = np.asarray(values, dtype=np.float32)
        lows, highs = bin_range(values, 51)
        edges = np.quantile(values[values > 0], np.linspace(0, 1, 50))
        for value, low, high in zip(values, lows, highs, strict=True):
            assert (low + 1, high) == (published_range(value, edges) if value else (1, 0))
        cells = expression_of([values.tolist()] * 50)
        vocab = make_vocab(cells.gene_names)
        drawn = tokenise(cells, vocab, TokenConfig(include_zeros=True)).values[:, 1:].numpy()
        assert ((drawn > lows) | (values == 0)).all()
        assert (drawn <= highs).all()
        assert ((drawn == 0) == (values == 0)).all()


def test_tokens_of_a_cell():
    data = expression_of([[1, 0, 7, 2], [0, 0, 3, 0]], ["B", "unknown", "A", "C"])
    vocab = make_vocab(["A", "B", "C"])
    batch = tokenise(data, vocab)
    assert batch.genes.tolist() == [[4, 1, 0, 2], [4, 0, 3, 3]]
    assert batch.padding.tolist() == [[False] * 4, [False, False, True, True]]
    assert batch.values[:, 0].tolist() == [-2, -2]
    assert batch.values[1, 2:].tolist() == [-2, -2]
    assert batch.values[0, 2] == 50  # the largest of the cell
    assert batch.values[0, 1] < batch.values[0, 3] < 50
    assert [batch.gene_names[i] for i in batch.genes[0]] == ["<cls>", "B", "A", "C"]
    full = tokenise(data, vocab, TokenConfig(include_zeros=True))
    assert full.genes.tolist() == [[4, 1, 0, 2]] * 2
    assert full.values[1].tolist()[1:] == [0, pytest.approx(full.values[1, 2]), 0]


def test_the_same_seed_gives_the_same_tokens_and_long_cells_are_sampled(forty: Expression):
    vocab = make_vocab(forty.gene_names)
    one, again, other = (tokenise(forty, vocab, seed=s) for s in (0, 0, 1))
    assert torch.equal(one.values, again.values)
    assert torch.equal(one.genes, other.genes)
    assert not torch.equal(one.values, other.values)
    short = tokenise(forty, vocab, TokenConfig(max_length=31), seed=3)
    assert short.genes.shape == (40, 31)
    for cell in range(40):
        assert set(short.genes[cell].tolist()) <= set(one.genes[cell].tolist())


def test_what_cannot_be_tokenised():
    data = expression_of([[1, 2], [0, 0]])
    with pytest.raises(BadInput, match="none of the 2 genes is in the model's vocabulary"):
        tokenise(data, make_vocab(["X"]))
    with pytest.raises(BadInput, match="c1 has no detected gene"):
        tokenise(data, make_vocab(["G0"]))
    with pytest.raises(BadInput, match="no <cls>"):
        tokenise(data, {"G0": 0, "<pad>": 1})
