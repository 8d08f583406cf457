"""Masked likelihood and its baseline against loops over single values."""

from __future__ import annotations

from math import log, pi

import pytest
import torch

from surgeon.cells import (
    CellConfig,
    Expression,
    ScGPT,
    TokenConfig,
    fit_marginal,
    make_vocab,
    masked_nll,
    masks,
    tokenise,
)
from surgeon.errors import BadInput


def model_for(vocab: dict[str, int], **other: object) -> ScGPT:
    torch.manual_seed(0)
    shape = {
        "n_tokens": len(vocab),
        "d_model": 16,
        "n_heads": 2,
        "d_mlp": 24,
        "n_layers": 2,
        "pad_id": vocab["<pad>"],
    } | other
    return ScGPT(CellConfig(**shape)).eval().requires_grad_(False)  # type: ignore[arg-type]


def test_masks_hide_a_share_of_each_cell_and_never_what_is_no_gene(forty: Expression):
    vocab = make_vocab(forty.gene_names)
    batch = tokenise(forty, vocab)
    hidden = masks(batch, 0.3, 4, seed=5)
    genes = (~batch.padding).sum(1) - 1
    assert (hidden.sum(-1) == (0.3 * genes).round()).all()
    assert not (hidden & batch.padding).any()
    assert not hidden[..., 0].any()
    assert torch.equal(hidden, masks(batch, 0.3, 4, seed=5))
    assert len({hidden[i].numpy().tobytes() for i in range(4)}) == 4
    for ratio, draws in ((0.0, 1), (1.0, 1), (0.5, 0)):
        with pytest.raises(BadInput, match="hide nothing, or everything"):
            masks(batch, ratio, draws)


@pytest.mark.parametrize("categorical", [True, False])
def test_every_hidden_value_is_scored_as_by_hand(forty: Expression, categorical: bool):
    vocab = make_vocab(forty.gene_names)
    batch = tokenise(forty.of([0, 1, 2]), vocab, TokenConfig(max_length=12))
    model = model_for(vocab, categorical=categorical)
    hidden = masks(batch, 0.4, 2)
    found = masked_nll(model, batch, hidden)
    assert torch.equal(found.isnan(), ~hidden)
    for draw, cell, pos in hidden.nonzero().tolist():
        seen = batch.values[cell].clone()
        seen[hidden[draw, cell]] = -1.0
        out = model(batch.genes[cell : cell + 1], seen[None], batch.padding[cell : cell + 1])
        value = float(batch.values[cell, pos])
        if categorical:
            assert out.logits is not None
            logits = out.logits[0, pos].double()
            expected = float(logits.exp().sum().log() - logits[int(value)])
        else:
            width = 50 / 12**0.5
            expected = (
                float(0.5 * ((value - out.value_pred[0, pos]) / width) ** 2)
                + log(width)
                + 0.5 * log(2 * pi)
            )
        assert float(found[draw, cell, pos]) == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_a_hidden_value_is_not_seen(forty: Expression):
    vocab = make_vocab(forty.gene_names)
    batch = tokenise(forty.of([0]), vocab, TokenConfig(max_length=12))
    model, hidden = model_for(vocab), masks(batch, 0.4)
    before = model(batch.genes, batch.values.masked_fill(hidden[0], -1.0), batch.padding).value_pred
    batch.values[hidden[0]] = 17.0
    assert torch.equal(
        model(batch.genes, batch.values.masked_fill(hidden[0], -1.0), batch.padding).value_pred,
        before,
    )


def test_the_baseline_is_what_the_gene_does_whatever_the_cell(forty: Expression):
    vocab = make_vocab(forty.gene_names)
    batch = tokenise(forty, vocab, TokenConfig(max_length=800, include_zeros=True))
    marginal = fit_marginal(batch, len(vocab), 51)
    assert torch.allclose(marginal.log_probs.exp().sum(1), torch.ones(len(vocab)), atol=1e-5)
    hidden = masks(batch, 0.4, 2)
    found = marginal.nll(batch, hidden)
    assert torch.equal(found.isnan(), ~hidden)
    # detection of one gene, counted by hand
    gene = int(batch.genes[0, 5])
    at = (batch.genes == gene).nonzero()
    values = [float(batch.values[c, p]) for c, p in at.tolist()]
    genes = ~batch.padding & (batch.genes != vocab["<cls>"])
    overall = (int((batch.values[genes] > 0).sum()) + 1) / (int(genes.sum()) + 2)
    share = (sum(v > 0 for v in values) + 2 * overall) / (len(values) + 2)
    assert float(marginal.log_probs[gene, 0].exp()) == pytest.approx(1 - share, rel=1e-4)
    # the regression's baseline is the mean bin of the gene
    mean = float((marginal.log_probs[gene].exp() * torch.arange(51.0)).sum())
    width = 50 / 12**0.5
    alone = torch.zeros_like(hidden[:1])
    cell, pos = at[0].tolist()
    alone[0, cell, pos] = True
    expected = 0.5 * ((values[0] - mean) / width) ** 2 + log(width) + 0.5 * log(2 * pi)
    assert float(marginal.nll(batch, alone, "regression")[0, cell, pos]) == pytest.approx(
        expected, rel=1e-4
    )
