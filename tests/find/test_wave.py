"""Variants that go through the layers together, against one after the other."""

from __future__ import annotations

import pytest
import torch
from tiny import CONFIGS, tiny_model

from surgeon.anatomy import Anatomy
from surgeon.find.damage import DamageInMemory, Variant
from surgeon.measure.intact import Sample

WINDOWS = torch.randint(3, 99, (6, 40), generator=torch.Generator().manual_seed(0))
SAMPLE = Sample(torch.tensor([4, 1, 5]), 24)


@pytest.mark.parametrize("model_type", [t for t in CONFIGS if t != "bert"])
def test_together_as_one_by_one(model_type: str):
    anatomy = Anatomy.of(tiny_model(model_type))
    damage = DamageInMemory(anatomy, WINDOWS)
    low, high = anatomy.downs(0)[0], anatomy.downs(2)[0]
    named = [
        [f"{low}[3, :]"],
        [f"{high}[3, 4]"],
        [f"{low}[:, 2]", f"{high}[5, :]"],
        ["embed[:, 12]"],
        ["L1.attn.out[7, :]", "unembed[9, :]"],
        *([["final_norm[4, 0]"]] if model_type != "olmo" else []),
    ]
    variants = [Variant([anatomy.region(text) for text in texts]) for texts in named] * 9
    before = {name: p.clone() for name, p in anatomy.model.named_parameters()}
    together = damage.of(variants, sample=SAMPLE)
    alone = [damage.of([one], sample=SAMPLE)[0] for one in variants[: len(named)]]
    assert max(float(one.abs().max()) for one in alone) > 1e-3
    for number, one in enumerate(together):
        want = alone[number % len(named)]
        assert one.tolist() == pytest.approx(want.tolist(), abs=2e-5)
    assert all(torch.equal(p, before[name]) for name, p in anatomy.model.named_parameters())
