"""The screen: what is planted is found, a rescaled neuron is not, none found is a result, and the
model is left alone.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cells_tiny import tiny

from surgeon.anatomy import Entry
from surgeon.cells.candidates import Candidate, candidates, screened
from surgeon.cells.likelihood import MaskedNLL, by_cell, masked_nll
from surgeon.cells.model import ScGPT
from surgeon.cells.planted import plant, rescale
from surgeon.errors import BadInput, SurgeonError
from surgeon.find import VerifyConfig, matched_controls
from surgeon.patch import ablate
from surgeon.studies.cells_screen import CellScreen, ScreenConfig, screen, worst_candidate
from surgeon.studies.naming import regions_of

CONFIG = ScreenConfig(each=2, verify=2)


def spikes(model: ScGPT, each: int) -> list[Candidate]:
    t = tiny()
    nll = MaskedNLL(model.anatomy, t.batch, t.masked[:1])
    return candidates(nll, screened(nll.anatomy), each)


def run(config: ScreenConfig = CONFIG) -> CellScreen:
    return screen(tiny(), config)


def test_the_model_knows_more_than_the_baseline_and_is_left_as_it_was():
    t = tiny()
    before = {name: p.clone() for name, p in t.model.named_parameters()}
    result = run()
    assert result.lead_nats > 0.3
    assert all(torch.equal(before[name], p) for name, p in t.model.named_parameters())


def test_figures_on_the_judging_cells_against_plain_passes():
    t = tiny()
    result = run()
    judged = set(result.verified[0].by_cell)
    at = torch.tensor([i for i, name in enumerate(t.batch.cell_names) if name in judged])
    assert result.cells == {"probe": 9, "judge": 27}
    anatomy = t.model.anatomy
    region = result.verified[0].addresses[0]
    stored = t.model.get_parameter(anatomy.addresses[region.site].parameter)
    index = (region.row, region.col) if stored.dim() == 2 else region.row
    old = stored[index].clone()
    intact = masked_nll(t.model, t.batch.of(at), t.masked[:, at])
    try:
        stored[index] = 0
        broken = masked_nll(t.model, t.batch.of(at), t.masked[:, at])
    finally:
        stored[index] = old
    nats = float(by_cell(broken - intact).mean())
    assert result.verified[0].nats == pytest.approx(nats, abs=1e-5)
    lead = float(by_cell(t.baseline[:, at] - intact).mean())
    assert result.verified[0].collapse_share == pytest.approx(nats / lead, rel=1e-3, abs=1e-5)


@pytest.mark.slow
def test_planted_is_found_and_rescaled_is_not():
    result = run(replace(CONFIG, controls_check=True))
    assert CellScreen.from_json(result.to_json()) == result
    assert len(repr(result).splitlines()) <= 40
    check = result.check
    assert check is not None
    assert check.passed
    planted, rescaled = check.planted, check.rescaled
    assert (planted.found, rescaled.found) == (True, False)
    assert planted.rank == 1
    assert planted.nats == pytest.approx(0.25, rel=0.05)
    assert planted.max_abs_difference < 1e-4
    assert planted.verified is not None
    assert planted.verified.controls.max_nats < 0.05
    assert rescaled.max_abs_difference < 1e-4


def test_a_rescaled_neuron_changes_no_ranking():
    t = tiny()
    model, changed = rescale(t.model, t.batch)
    one, other = (spikes(model, 3) for model in (t.model, model))
    assert [c.address for c in one] == [c.address for c in other]
    assert [c.height for c in one] == pytest.approx([c.height for c in other], rel=1e-4)
    neuron = model.layers[changed.layer].linear1.weight[changed.neuron]
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
    found = next(c for c in spikes(t.model, 1) if str(c.address.site) == "L1.mlp.down")
    assert (found.address.row, found.address.col) == best
    assert found.write == pytest.approx(float(products.max()), rel=1e-5)


def test_none_found_is_a_result_with_its_numbers():
    d = run(replace(CONFIG, min_share=0.9)).to_json()
    assert d["verdict"] == "none"
    assert d["controls"]["n"] == 20
    assert all(c["verified"] is None or not c["verified"]["found"] for c in d["candidates"])
    assert d["together"]["collapse_share"] is not None


def test_a_model_without_a_lead_has_nothing_to_lose():
    t = tiny()
    result = screen(replace(t, baseline=t.baseline - 5, types=None), CONFIG)
    assert result.verdict == "none"
    assert result.verified[0].collapse_share is None
    assert result.verified[0].probe == {}


def test_scales_and_shifts_are_ranked_by_what_they_write():
    t = tiny()
    norm = t.model.layers[0].norm2
    seen = []
    handle = norm.register_forward_hook(lambda _, args, y: seen.append(y))
    t.model(t.batch.genes, t.batch.values, t.batch.padding)
    handle.remove()
    scaled = (seen[0] - norm.bias).abs().amax((0, 1))
    expected = {"L0.norm.norm2": scaled, "L0.norm.norm2.bias": norm.bias.abs()}
    for candidate in spikes(t.model, 1):
        writes = expected.pop(str(candidate.address.site), None)
        if writes is not None:
            assert candidate.address.row == int(writes.argmax())
            assert candidate.write == pytest.approx(float(writes.max()), rel=1e-5)
    assert not expected


def test_controls_of_a_norm_are_near_in_size_and_none_of_the_set():
    t = tiny()
    anatomy = t.model.anatomy
    entries = [Entry.parse(f"L0.norm.norm1[{row}, 0]") for row in (3, 20)]
    size = anatomy.view(entries[0].site).read().flatten().abs()
    controls = matched_controls(anatomy, entries, 20, seed=0)
    assert len(controls) == 20
    assert not {e for control in controls for e in control} & {*entries}
    assert all(len(control) == 2 for control in controls)
    one = matched_controls(anatomy, entries[:1], 4, seed=0)
    nearest = (size - size[3]).abs().argsort()[1:17].tolist()
    assert {e.row for control in one for e in control} <= {*nearest}


def test_the_worst_candidate_is_the_most_damaging_of_all():
    t = tiny()
    nll = MaskedNLL(t.model.anatomy, t.batch, t.masked[:1])
    nats = {c.address: nll.cost([c.address]) for c in spikes(t.model, 2)}
    assert worst_candidate(t, 2) == max(nats, key=lambda address: nats[address])


@pytest.mark.slow
def test_what_is_found_becomes_a_patch():
    t = tiny()
    model, planted = plant(t.model, t.batch, t.masked)
    found = screen(replace(t, model=model, types=None), CONFIG)
    assert planted.address in found.entries
    anatomy = model.anatomy
    assert regions_of(anatomy, found) == found.entries
    patch = ablate(anatomy, [planted.address])
    nll = MaskedNLL(anatomy, t.batch, t.masked)
    with patch.applied(anatomy):
        broken = float(by_cell(nll.values()).mean())
    assert broken - nll.base == pytest.approx(planted.nats, abs=1e-5)
    assert anatomy.view(planted.address.site).read()[planted.address.row, -1]
    with pytest.raises(BadInput, match="this screen found nothing"):
        regions_of(anatomy, run(replace(CONFIG, min_share=0.9)))


@pytest.mark.slow
def test_the_same_seed_gives_the_same_figures():
    assert run().to_json() == run().to_json()


def test_settings_and_data_that_show_nothing_are_refused():
    t = tiny()
    with pytest.raises(BadInput, match="at least 20"):
        ScreenConfig(rules=VerifyConfig(controls=5))
    with pytest.raises(BadInput, match="5 cells are too few"):
        screen(t.of(torch.arange(5)), CONFIG)
    with pytest.raises(SurgeonError, match="no constant"):
        plant(t.model, t.batch, t.masked, nats=1e6)
