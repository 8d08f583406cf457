"""Runs of changed models that go on from the intact one, against whole passes."""

from __future__ import annotations

import pytest
import torch
from tiny import CONFIGS, tiny_model

from surgeon.anatomy import Anatomy, Region
from surgeon.find.damage import DamageInMemory, Variant
from surgeon.find.zeroed import zeroed
from surgeon.measure import window_nll
from surgeon.measure.intact import IntactRun, Sample
from surgeon.patch import ablate

WINDOWS = torch.randint(3, 99, (7, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("model_type", [t for t in CONFIGS if t != "bert"])
def test_a_changed_model_has_the_nll_of_a_whole_pass(model_type: str):
    model = tiny_model(model_type)
    anatomy = Anatomy.of(model)
    run = IntactRun(model, anatomy.layers, WINDOWS)
    assert torch.equal(run.nll, window_nll(model, WINDOWS))
    changed = [
        f"{anatomy.downs(1)[0]}[3, :]",
        *(["final_norm[3, 0]"] if "final_norm" in known(anatomy) else []),
    ]
    for part in map(anatomy.region, changed):
        lowest = anatomy.first_changed([part.site])
        with ablate(anatomy, [part]).applied(anatomy):
            assert torch.equal(run.changed(lowest), window_nll(model, WINDOWS))
            some = run.changed(lowest, Sample(torch.tensor([5, 2])))
            assert some.tolist() == pytest.approx(run.changed(0)[[5, 2]].tolist(), abs=1e-6)
            beginning = run.changed(lowest, Sample(torch.tensor([5, 2]), 9))
            whole = window_nll(model, WINDOWS[[5, 2], :9])
            assert beginning.tolist() == pytest.approx(whole.tolist(), abs=1e-5)


def known(anatomy: Anatomy) -> set[str]:
    return {str(site) for site in anatomy.addresses}


def test_with_little_room_fewer_states_are_kept():
    model = tiny_model("llama")
    anatomy = Anatomy.of(model)
    run = IntactRun(model, anatomy.layers, WINDOWS, room=1)
    part = anatomy.region("L1.mlp.down[3, :]")
    with ablate(anatomy, [part]).applied(anatomy):
        assert torch.equal(run.changed(1), window_nll(model, WINDOWS))


def test_what_a_change_can_reach():
    anatomy = Anatomy.of(tiny_model("llama"))
    first = {
        name: anatomy.first_changed([anatomy.region(f"{name}[0, 0]").site])
        for name in known(anatomy)
        if ".mlp.gate" not in name
    }
    depth = len(anatomy.layers)
    assert first["embed"] == 0
    assert first["final_norm"] == depth
    assert first["L1.mlp.down"] == first["L1.norm.input_layernorm"] == 1
    tied = Anatomy.of(tiny_model("gpt2"))
    assert tied.first_changed([tied.region("unembed[0, 0]").site]) == 0


def test_zeroing_leaves_the_bits_as_they_were():
    model = tiny_model("llama").bfloat16()
    anatomy = Anatomy.of(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    regions = [
        Region.parse(t) for t in ("L1.mlp.down[3, :]", "L1.mlp.down[:, 2]", "final_norm[5, 0]")
    ]
    with zeroed(anatomy, regions):
        matrix = anatomy.view(regions[0].site).read()
        assert not matrix[3].any()
        assert not matrix[:, 2].any()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_damage_of_a_sample_is_that_of_its_windows():
    anatomy = Anatomy.of(tiny_model("llama"))
    damage = DamageInMemory(anatomy, WINDOWS)
    variant = Variant([Region.parse("L0.mlp.down[3, :]")])
    (whole,) = damage.of([variant])
    (some,) = damage.of([variant], sample=Sample(torch.tensor([4, 0])))
    assert some.tolist() == pytest.approx(whole[[4, 0]].tolist(), abs=1e-6)


def test_damage_of_beginnings_comes_with_that_of_the_whole():
    long = torch.randint(3, 99, (5, 72), generator=torch.Generator().manual_seed(1))
    anatomy = Anatomy.of(tiny_model("llama"))
    damage = DamageInMemory(anatomy, long)
    part = Region.parse("L0.mlp.down[3, :]")
    whole, beginning = damage.with_beginning([part])
    assert torch.equal(whole, damage([part]))
    tokens = damage.stages[0].tokens
    (alone,) = DamageInMemory(anatomy, long[:, :tokens]).of([Variant([part])])
    assert beginning.tolist() == pytest.approx(alone.tolist(), abs=1e-6)


def test_a_sample_has_about_so_many_tokens():
    anatomy = Anatomy.of(tiny_model("llama"))
    long = torch.randint(3, 99, (12, 72), generator=torch.Generator().manual_seed(1))
    for exhaustive, wanted in (
        (False, [(128, 4, 32), (130, 4, 33), (900, 12, None)]),
        (True, [(128, 12, None)]),
    ):
        damage = DamageInMemory(anatomy, long, exhaustive)
        few = [(n, damage.few(n)) for n, _, _ in wanted]
        assert [(n, len(one.windows), one.tokens) for n, one in few] == wanted
