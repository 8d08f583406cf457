"""What benchmarks/activations.py prints: fitted clipping, and each tensor alone, against runs by
hand.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from bench import benchmark
from tiny import planted

from surgeon.anatomy import Entry, Site
from surgeon.measure import Reference, mean_nll
from surgeon.quantize import ActivationConfig, activation_table, quantized, quantized_activations
from surgeon.quantize.compare import INT8

table = benchmark("activation_table")
WINDOWS = torch.randint(3, 99, (4, 12), generator=torch.Generator().manual_seed(1))
CRITICAL = [Entry(Site(1, "mlp.down"), 5, 7)]


@pytest.mark.slow
def test_every_method_with_its_fitted_limits():
    anatomy = planted()
    config = ActivationConfig(bits=4)
    ways = table.treatments(anatomy, WINDOWS, config)
    reference = Reference(anatomy.model, WINDOWS[2:])
    rows = activation_table(anatomy, WINDOWS[:2], reference, config, CRITICAL, ways=ways).rows
    names = [(m.name, per) for per in ("tensor", "token") for m in table.METHODS]
    named = dict(zip(names, rows, strict=True))
    config_of = dict(zip(names, [way.config for way in ways], strict=True))
    assert len(named) == 20
    held = {named[name, "token"].held for name in ("holdout", "control", "largest")}
    assert len(held) == 1
    assert held.pop() > 0
    for clip in ("z", "percentile"):
        row = named[f"clip {clip}", "tensor"]
        with quantized(anatomy, INT8):
            own = config_of[f"clip {clip}", "tensor"]
            with quantized_activations(anatomy, own):
                assert row.nll == pytest.approx(mean_nll(anatomy.model, WINDOWS[2:]), abs=1e-6)

        def clipped(value: float, own: ActivationConfig = own):
            stack = ExitStack()
            stack.enter_context(quantized(anatomy, INT8))
            stack.enter_context(quantized_activations(anatomy, replace(own, clip_value=value)))
            return stack

        kls = {
            value: Reference(anatomy.model, WINDOWS[:2]).compare(lambda v=value: clipped(v)).kl
            for value in table.VALUES[clip]
        }
        assert own.clip_value == min(kls, key=kls.get)


def test_each_tensor_alone():
    anatomy = planted()
    config = ActivationConfig(4, "tensor", tensors=("inputs", "down", "residual"), hold=0)
    rows = {
        (r.label, r.place.tensor): r for r in table.tensor_table(anatomy, WINDOWS, config, CRITICAL)
    }
    assert len(rows) == 3 * (4 + 1 + 1)
    spoilt = rows["L1.residual", "residual"]
    assert len(spoilt.place.channels) == 1
    assert spoilt.peak > 30
    assert spoilt.held_error < 0.1 * spoilt.naive_error
    with quantized_activations(
        anatomy, config, only=lambda p: p.label in ("L2.attn.q", "L2.attn.k", "L2.attn.v")
    ):
        alone = mean_nll(anatomy.model, WINDOWS[2:])
    assert rows["into L2.attn", "inputs"].naive_nats == alone - mean_nll(anatomy.model, WINDOWS[2:])
    untouched = rows["L0.residual", "residual"]
    assert untouched.held_error == untouched.naive_error
