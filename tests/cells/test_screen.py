"""The screen: what is planted is found, a rescaled neuron is not, none found is a result, and the
model is left alone.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cells_tiny import tiny

from surgeon.cells.check import CheckConfig, check
from surgeon.cells.damage import Damage, by_cell, cells_of
from surgeon.cells.likelihood import masked_nll
from surgeon.cells.parts import part_of
from surgeon.cells.planted import plant, rescale
from surgeon.cells.screen import Screen, ScreenConfig, matched, screen, worst_candidate
from surgeon.cells.spikes import spikes
from surgeon.errors import BadInput, SurgeonError

CONFIG = ScreenConfig(each=2, verify=2)


def run(config: ScreenConfig = CONFIG) -> Screen:
    t = tiny()
    return screen(t.model, t.batch, t.masked, t.baseline, t.types, config)


def test_the_model_knows_more_than_the_baseline_and_is_left_as_it_was():
    t = tiny()
    before = {name: p.clone() for name, p in t.model.named_parameters()}
    result = run()
    assert result.lead > 0.3
    assert all(torch.equal(before[name], p) for name, p in t.model.named_parameters())


def test_figures_on_the_judging_cells_against_plain_passes():
    t = tiny()
    result = run()
    judged = set(result.verified[0].by_cell)
    at = torch.tensor([i for i, name in enumerate(t.batch.cell_names) if name in judged])
    assert result.cells == {"probe": 9, "judge": 27}
    part = part_of(t.model, result.verified[0].addresses[0])
    intact = masked_nll(t.model, cells_of(t.batch, at), t.masked[:, at])
    stored = t.model.get_parameter(part.parameter)
    old = stored[part.index].clone()
    try:
        stored[part.index] = 0
        broken = masked_nll(t.model, cells_of(t.batch, at), t.masked[:, at])
    finally:
        stored[part.index] = old
    nats = float(by_cell(broken - intact).mean())
    assert result.verified[0].nats == pytest.approx(nats, abs=1e-5)
    lead = float(by_cell(t.baseline[:, at] - intact).mean())
    assert result.verified[0].collapse_share == pytest.approx(nats / lead, rel=1e-3, abs=1e-5)


def test_planted_is_found_and_rescaled_is_not():
    t = tiny()
    found = check(t.model, t.batch, t.masked, t.baseline, t.types, CheckConfig(screen=CONFIG))
    d = found.to_json()
    assert found.passed
    assert d["planted"]["rank"] == 1
    assert d["planted"]["nats"] == pytest.approx(0.25, rel=0.05)
    assert d["planted"]["max_abs_difference"] < 1e-4
    assert d["planted"]["verified"]["controls"]["max_nats"] < 0.05
    assert d["rescaled"]["max_abs_difference"] < 1e-4


def test_a_rescaled_neuron_changes_no_ranking():
    t = tiny()
    changed = rescale(t.model, t.batch)
    names = [[s.part.address for s in spikes(m, t.batch, 3)] for m in (t.model, changed.model)]
    heights = [[s.height for s in spikes(m, t.batch, 3)] for m in (t.model, changed.model)]
    assert names[0] == names[1]
    assert heights[0] == pytest.approx(heights[1], rel=1e-4)
    neuron = changed.model.layers[changed.layer].linear1.weight[changed.neuron]
    assert torch.equal(neuron, t.model.layers[changed.layer].linear1.weight[changed.neuron] * 1000)


def test_spikes_are_the_largest_products_at_any_position():
    t = tiny()
    seen = []
    handle = t.model.layers[1].linear2.register_forward_pre_hook(
        lambda _, args: seen.append(args[0])
    )
    t.model(t.batch.genes, t.batch.values, t.batch.padding)
    handle.remove()
    weight = t.model.layers[1].linear2.weight
    products = (seen[0][:, :, None, :] * weight).abs().amax((0, 1))
    best = divmod(int(products.argmax()), weight.shape[1])
    found = next(s for s in spikes(t.model, t.batch, 1) if s.kind == "mlp" and s.part.layer == 1)
    assert found.part.index == best
    assert found.write == pytest.approx(float(products.max()), rel=1e-5)


def test_none_found_is_a_result_with_its_numbers():
    d = run(replace(CONFIG, min_share=0.9)).to_json()
    assert d["verdict"] == "none"
    assert d["controls"]["n"] == 20
    assert all(c["verified"] is None or not c["verified"]["found"] for c in d["candidates"])
    assert d["together"]["collapse_share"] is not None


def test_a_model_without_a_lead_has_nothing_to_lose():
    t = tiny()
    result = screen(t.model, t.batch, t.masked, t.baseline - 5, None, CONFIG)
    assert result.verdict == "none"
    assert result.verified[0].collapse_share is None
    assert result.verified[0].probe == {}


def test_controls_are_near_in_size_and_not_the_candidate():
    t = tiny()
    part = part_of(t.model, "L0.mlp.down[3, 5]")
    weight = t.model.layers[0].linear2.weight
    controls = matched(t.model, part, 20, [part], torch.Generator().manual_seed(0))
    assert len({c.address for c in controls}) == 20
    assert part.address not in {c.address for c in controls}
    distances = (weight.abs() - weight[part.index].abs()).abs().flatten().sort().values
    assert max(
        float((weight[c.index].abs() - weight[part.index].abs()).abs()) for c in controls
    ) <= float(distances[80])


def test_the_worst_candidate_is_the_most_damaging_of_all():
    t = tiny()
    damage = Damage(t.model, t.batch, t.masked[:1])
    nats = {
        s.part.address: float(by_cell(damage.of([s.part])).mean())
        for s in spikes(t.model, t.batch, 2)
    }
    assert worst_candidate(t.model, t.batch, t.masked, 2).address == max(
        nats, key=lambda a: nats[a]
    )


def test_the_same_seed_gives_the_same_figures():
    assert run().to_json() == run().to_json()


def test_settings_and_data_that_show_nothing_are_refused():
    t = tiny()
    with pytest.raises(BadInput, match="at least 20"):
        ScreenConfig(controls=5)
    few = cells_of(t.batch, slice(0, 5))
    with pytest.raises(BadInput, match="5 cells are too few"):
        screen(t.model, few, t.masked[:, :5], t.baseline[:, :5], None, CONFIG)
    with pytest.raises(BadInput, match="layer 7"):
        plant(t.model, t.batch, t.masked, layer=7)
    with pytest.raises(SurgeonError, match="no constant"):
        plant(t.model, t.batch, t.masked, nats=1e6)
