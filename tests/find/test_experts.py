"""The profile of experts against brute force on the weights, and planted super experts."""

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_model

from surgeon.anatomy import Anatomy, open_stream
from surgeon.errors import BadInput
from surgeon.find import profile_experts
from surgeon.tap import Tap

WINDOWS = torch.randint(3, 99, (6, 24), generator=torch.Generator().manual_seed(0))
MOE = ["mixtral", "olmoe", "qwen3_moe"]
LAYER, EXPERT, ROW, COL = 2, 2, 5, 7


def plant(model_type):
    model = tiny_model(model_type)
    anatomy = Anatomy.of(model)
    view = anatomy.view(f"L{LAYER}.mlp.down.e{EXPERT}")
    view.set_(torch.tensor([ROW]), torch.tensor([COL]), torch.tensor([60.0]))
    return model, anatomy


def brute_force(anatomy, layer):
    """Peak, share of tokens and weighted size of every expert, from the weights as the sites name
    them, token by token.
    """
    calls = []
    with Tap() as tap:
        tap.on_call(anatomy.module(anatomy.downs(layer)[0]), calls.append)
        tap.run(anatomy.model, WINDOWS)
    states, chosen, weights = calls[0]
    result = []
    for expert in range(4):
        gate, up, down = (
            anatomy.view(f"L{layer}.mlp.{r}.e{expert}").read() for r in ("gate", "up", "down")
        )
        peak, tokens, size = 0.0, 0, 0.0
        for x, experts, factors in zip(states.flatten(0, -2), chosen, weights, strict=True):
            for e, factor in zip(experts.tolist(), factors.tolist(), strict=True):
                if e == expert:
                    y = down @ (F.silu(gate @ x) * (up @ x))
                    peak, tokens, size = (
                        max(peak, float(y.abs().max())),
                        tokens + 1,
                        size + factor * float(y.norm()),
                    )
        result.append((peak, tokens / WINDOWS.numel(), size))
    total = sum(size for *_, size in result)
    return {e: (peak, routed, size / total) for e, (peak, routed, size) in enumerate(result)}


@pytest.mark.parametrize("model_type", MOE)
def test_the_profile_equals_brute_force(model_type):
    _, anatomy = plant(model_type)
    profile = profile_experts(anatomy, WINDOWS)
    assert [p.peak for p in profile] == sorted((p.peak for p in profile), reverse=True)
    layers = sorted({p.layer for p in profile})
    assert layers == (
        [0, 2] if model_type == "qwen3_moe" else [0, 1, 2]
    )  # layer 1 of that one is dense
    for layer in layers:
        want = brute_force(anatomy, layer)
        for p in (p for p in profile if p.layer == layer):
            assert (p.peak, p.routed, p.share) == pytest.approx(want[p.expert], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("model_type", MOE)
def test_the_planted_expert_is_super_and_no_other(model_type, tmp_path):
    model, anatomy = plant(model_type)
    profile = profile_experts(anatomy, WINDOWS)
    assert [(p.layer, p.expert, p.channel) for p in profile if p.is_super] == [(LAYER, EXPERT, ROW)]
    model.save_pretrained(tmp_path)
    assert profile_experts(open_stream(str(tmp_path))[1], WINDOWS) == profile
    below = profile_experts(anatomy, WINDOWS, end=2)
    assert {p.layer for p in below} == {p.layer for p in profile} - {2}
    assert [p for p in profile if p.layer < 2] == [
        type(p)(**{**vars(p), "is_super": False}) for p in below
    ]


def test_a_dense_model_has_no_profile():
    with pytest.raises(BadInput, match="no mixture of experts"):
        profile_experts(Anatomy.of(tiny_model("llama")), WINDOWS)
