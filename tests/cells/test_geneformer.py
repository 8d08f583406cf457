"""Geneformer's rank encoding and masked likelihood, and cell sentences, on tiny models."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from cells_tiny import expression_of
from tiny import tiny_model

from surgeon import Anatomy, injured, prove
from surgeon.cells import Expression
from surgeon.cells.data import cell_sentences
from surgeon.cells.geneformer import rank_nll, rank_tokens, read_dictionary
from surgeon.cells.likelihood import masks
from surgeon.errors import BadInput

GENES = [f"ENSG{i:011d}" for i in range(12)]
TOKENS = {"<pad>": 0, "<mask>": 1, **{g: i + 2 for i, g in enumerate(GENES)}}
WITH_ENDS = {**TOKENS, "<cls>": 14, "<eos>": 15}
MEDIANS = {g: 0.5 + 0.731 * i for i, g in enumerate(GENES)}


def made(kind: str = "counts", cells: int = 6) -> Expression:
    counts = np.random.default_rng(0).poisson(3.0, (cells, 14)).astype(np.float32)
    if kind == "log-counts":
        counts = np.log1p(counts / counts.sum(1, keepdims=True) * 1e4).astype(np.float32)
    return expression_of(counts, [*(f"{g}.7" for g in GENES), "unknown", "other"], kind)


def test_genes_stand_in_the_order_of_median_scaled_expression():
    data = made()
    batch = rank_tokens(data, TOKENS, MEDIANS)
    dense = data.matrix.toarray().astype(np.float64)
    for cell in range(6):
        score = {
            TOKENS[g]: dense[cell, i] / dense[cell].sum() * 10_000 / MEDIANS[g]
            for i, g in enumerate(GENES)
            if dense[cell, i]
        }
        said = batch.genes[cell][~batch.padding[cell]].tolist()
        assert sorted(said) == sorted(score)
        assert all(score[a] >= score[b] for a, b in pairwise(said))


def test_log_counts_give_the_same_order_as_counts():
    assert torch.equal(
        rank_tokens(made(), TOKENS, MEDIANS).genes,
        rank_tokens(made("log-counts"), TOKENS, MEDIANS).genes,
    )


def test_the_ends_of_the_second_version_and_the_longest_cell():
    plain, ends = rank_tokens(made(), TOKENS, MEDIANS), rank_tokens(made(), WITH_ENDS, MEDIANS)
    for cell in range(6):
        genes = plain.genes[cell][~plain.padding[cell]].tolist()
        assert ends.genes[cell][~ends.padding[cell]].tolist() == [14, *genes, 15]
    assert torch.equal(ends.scored.sum(1), plain.scored.sum(1))
    short = rank_tokens(made(), WITH_ENDS, MEDIANS, max_length=5)
    assert short.genes.shape == (6, 5)
    assert torch.equal(short.genes[:, 1:4], ends.genes[:, 1:4])


def test_what_cannot_be_ranked(tmp_path: Path):
    with pytest.raises(BadInput, match="Ensembl ids"):
        rank_tokens(made(), {"<pad>": 0, "CD3D": 1})
    with pytest.raises(BadInput, match="no <pad>"):
        rank_tokens(made(), {GENES[0]: 1})
    with pytest.raises(BadInput, match="positive"):
        rank_tokens(made(), TOKENS, {**MEDIANS, GENES[0]: 0.0})
    (tmp_path / "d.pkl").write_bytes(b"x")
    with pytest.raises(BadInput, match=r"is a pickle.*json\.dump"):
        read_dictionary(tmp_path / "d.pkl")
    (tmp_path / "d.json").write_text(json.dumps({"a": "b"}))
    with pytest.raises(BadInput, match="gives a number to every gene"):
        read_dictionary(tmp_path / "d.json")
    (tmp_path / "d.json").write_text(json.dumps(TOKENS))
    assert read_dictionary(tmp_path / "d.json") == TOKENS


def test_damage_to_a_bert_through_the_common_map():
    model = tiny_model("bert")
    anatomy = Anatomy.of(model)
    assert {str(s) for s in prove(anatomy)} >= {"L0.mlp.down", "L0.attn.q"}
    batch = rank_tokens(made(), WITH_ENDS, MEDIANS)
    hidden = masks(batch, 0.25, draws=2)
    assert not (hidden & ~batch.scored).any()
    before = rank_nll(model, batch, hidden)
    assert torch.equal(before.isnan(), ~hidden)
    draw, cell, pos = hidden.nonzero()[3].tolist()
    genes = batch.genes[cell : cell + 1, : int((~batch.padding[cell]).sum())].clone()
    genes[0, hidden[draw, cell, : genes.shape[1]]] = 1  # <mask>
    logits = model(input_ids=genes).logits[0, pos].double()  # alone, without padding
    assert float(before[draw, cell, pos]) == pytest.approx(
        float(logits.logsumexp(0) - logits[batch.genes[cell, pos]]), rel=1e-4
    )
    with injured(anatomy, ["L1.mlp.down[:, :]"]):
        assert not torch.equal(rank_nll(model, batch, hidden)[hidden], before[hidden])
    assert torch.equal(rank_nll(model, batch, hidden)[hidden], before[hidden])
    with pytest.raises(BadInput, match="belongs to another model"):
        rank_nll(tiny_model("bert", vocab_size=8), batch, hidden)
    with pytest.raises(BadInput, match="hide nothing"):
        masks(batch, 1.5)


def test_sentences_name_genes_by_rank(forty: Expression):
    lines = cell_sentences(forty, genes=15)
    assert len(lines) == 40
    names = {name: i for i, name in enumerate(forty.gene_names)}
    for cell, line in enumerate(lines):
        row = forty.matrix[cell].toarray()[0]
        said = [row[names[g]] for g in line.split()]
        assert len(said) == 15
        assert said == sorted(row, reverse=True)[:15]
    assert lines == cell_sentences(forty, genes=15)
    assert lines != cell_sentences(forty, genes=15, seed=1)
    spaced = Expression(
        forty.matrix, ["A B", *forty.gene_names[1:]], forty.cell_names, "raw", "log-counts"
    )
    with pytest.raises(BadInput, match="space"):
        cell_sentences(spaced)


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "gemma2"])
def test_models_of_sentences_have_the_map_of_text_models(architecture: str):
    anatomy = Anatomy.of(tiny_model(architecture))
    assert anatomy.source == "table"
    assert "L0.mlp.down" in {str(s) for s in prove(anatomy)}
