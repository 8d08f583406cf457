"""Training: figures, the same bytes for the same seed, and what cannot be trained on."""

from __future__ import annotations

from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cells_tiny import expression_of

from surgeon.cells import (
    Expression,
    TrainConfig,
    expression,
    load_cells,
    masked_nll,
    masks,
    tokenise,
    train,
)
from surgeon.errors import BadInput, SurgeonError

from .conftest import TINY


def test_the_same_seed_gives_the_same_bytes_and_leaves_torchs_seed_alone(
    checkpoint: Path, forty: Expression, tmp_path: Path
):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    seen: list[tuple[str, int, int]] = []
    again = train(forty, TINY, lambda *a: seen.append(a))
    assert torch.equal(torch.rand(1), expected)
    assert seen[-1] == ("training", 20, 20)
    again.save(tmp_path)
    names = sorted(p.name for p in checkpoint.iterdir())
    assert names == sorted(p.name for p in tmp_path.iterdir())
    assert names == [
        "args.json",
        "best_model.pt",
        "marginal.safetensors",
        "model.safetensors",
        "training.json",
        "vocab.json",
    ]
    assert [n for n in names if (checkpoint / n).read_bytes() != (tmp_path / n).read_bytes()] == []
    other = train(forty, replace(TINY, seed=1, steps=10))
    assert other.split != again.split


def test_the_figures_are_those_of_the_held_out_cells(checkpoint: Path, forty: Expression):
    loaded = load_cells(checkpoint)
    split = loaded.training["split"]
    parts = [set(split[name]) for name in ("train", "validation", "test")]
    assert [len(p) for p in parts] == [28, 6, 6]
    assert set.union(*parts) == set(forty.cell_names)
    test = forty.of([i for i, name in enumerate(forty.cell_names) if name in parts[2]])
    batch = tokenise(test, loaded.vocab, loaded.tokens, seed=0)
    hidden = masks(batch, seed=0)
    assert float(masked_nll(loaded.model, batch, hidden).nanmean((0, 2)).mean()) == pytest.approx(
        loaded.training["nll"], rel=1e-5
    )
    assert loaded.marginal is not None
    assert float(loaded.marginal.nll(batch, hidden).nanmean((0, 2)).mean()) == pytest.approx(
        loaded.training["baseline_nll"], rel=1e-5
    )


LEARNS = TrainConfig(
    layers=2,
    d_model=24,
    heads=2,
    d_mlp=32,
    steps=80,
    look_every=20,
    batch=32,
    genes=24,
    warmup=10,
)


def structured(cells: int = 240, genes: int = 24) -> Expression:
    """Two cell types, each with half of the genes: what one gene does tells the others."""
    random = np.random.default_rng(0)
    kind = random.random(cells) < 0.5
    rate = np.where((np.arange(genes) < genes // 2)[None] == kind[:, None], 4.0, 0.1)
    return expression_of(random.poisson(rate))


def test_structure_is_learned_and_beats_the_baseline():
    figures = train(structured(), LEARNS).figures
    assert figures.lead_nats > 0.3
    assert figures.lead_ci95[0] > 0.2
    assert abs(figures.nll - figures.train_nll) < 0.15
    assert figures.cells == {"test": 36, "validation": 36, "train": 168}


def test_noise_is_not_learned():
    random = np.random.default_rng(1)
    noise = expression_of(random.poisson(1.0, (150, 20)))
    small = replace(LEARNS, layers=1, d_model=16, d_mlp=16, steps=60, genes=20)
    # bins are quantiles of the cell, so a few counts of it tell a little of the others; nothing
    # like what structure gives
    assert train(noise, small).figures.lead_nats < 0.1


@pytest.mark.parametrize(
    ("cells", "match"),
    [(list(range(10)), "training needs 20"), (list(range(19)), "training needs 20")],
)
def test_too_few_cells(forty: Expression, cells: list[int], match: str):
    with pytest.raises(BadInput, match=match):
        train(forty.of(cells), TINY)


@pytest.mark.parametrize("settings", [{"steps": 0}, {"held_out": 0.6}, {"lr": 0.0}, {"genes": 1}])
def test_settings_that_cannot_be(settings: dict[str, Any]):
    with pytest.raises(BadInput):
        TrainConfig(**settings)


def test_divergence_is_said(forty: Expression):
    with pytest.raises(SurgeonError, match="diverged"):
        train(forty, replace(TINY, lr=1e20, warmup=1, steps=4, look_every=2))


def test_without_zeros(forty: Expression):
    made = train(forty, replace(TINY, include_zeros=False, steps=4, look_every=2))
    assert not made.tokens.include_zeros
    assert isfinite(made.figures.nll)


@pytest.mark.slow
def test_the_defaults_beat_the_baseline_on_the_example(pbmc: Any):
    made = train(expression(pbmc), TrainConfig(steps=150, look_every=75, warmup=20))
    assert made.figures.lead_ci95[0] > 0
    assert abs(made.figures.nll - made.figures.train_nll) < 0.02
