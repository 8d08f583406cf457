"""`find` beyond `mlp.down`, on a small trained model, against zeroing by hand."""

from __future__ import annotations

import pytest
import torch

from surgeon.anatomy import Anatomy, Region, load_model
from surgeon.corpus import load_corpus, read_text
from surgeon.find import DetectConfig, FindConfig, FindResult, VerifyConfig, find
from surgeon.find.controls import matched_controls
from surgeon.measure import window_nll
from surgeon.patch import ablate

PROBE = 8


@pytest.fixture(scope="module")
def model(shared):
    loaded = load_model(str(shared / "models" / "tinystories-656k"))
    text = shared / "text" / "tinystories-sample.txt"
    return Anatomy.of(loaded.model), load_corpus(
        loaded.tokenizer, read_text(text), text.name, 256, 24
    )


@pytest.fixture(scope="module")
def found(model) -> FindResult:
    return find(*model)


def test_a_vital_scale_is_found_beside_the_row(model, found: FindResult):
    anatomy, corpus = model
    parts = {str(part): one for one in found.sets for part in one.parts}
    assert "L0.mlp.down[88, 165]" in parts
    scale = parts["L1.norm.input_layernorm[88, 0]"]
    assert scale.vital
    held_out = corpus.windows[PROBE:]
    before = window_nll(anatomy.model, held_out).mean()
    with ablate(anatomy, scale.parts).applied(anatomy):
        after = window_nll(anatomy.model, held_out).mean()
    assert scale.damage.joint_nats == pytest.approx(float(after - before), abs=1e-4)
    assert (scale.geometry, scale.size, scale.channels) == ("single", 1, [])


def test_what_is_no_set_of_its_own_is_said(found: FindResult):
    why = {one.entry: one.reason for one in found.rejected}
    assert "reads what L1.norm.input_layernorm[88, 0] scales" in why["L1.attn.k[:, 88]"]
    tokens = [one for one in found.measured if one.kind == "token"]
    assert tokens
    assert not {str(one.part) for one in tokens} & {str(p) for s in found.sets for p in s.parts}


def test_the_published_search_stays_in_mlp_down(model, found: FindResult):
    only = find(*model, FindConfig(only="mlp.down"))
    assert {part.site.role for one in only.sets for part in one.parts} == {"mlp.down"}
    assert only.measured == []
    assert [one.damage for one in only.sets] == [one.damage for one in found.sets if one.channels]


def test_layers_limit_the_whole_search(model):
    limited = find(*model, FindConfig(DetectConfig(layers=(1, 2)), measured=4))
    assert limited.measured
    assert {one.part.site.layer for one in limited.measured} == {1}


@pytest.mark.slow
def test_measuring_everything_gives_the_same_verdicts(model, found: FindResult):
    config = FindConfig(verify=VerifyConfig(exhaustive=True), measured=8)
    exhaustive = find(*model, config)
    whole = {str(part) for one in exhaustive.sets for part in one.parts}
    assert {str(part) for one in found.sets for part in one.parts if not one.channels} <= whole


def test_what_is_taken_is_no_control_while_others_are_left(model):
    anatomy, _ = model
    part = anatomy.region("L1.norm.input_layernorm[88, 0]")
    taken = [Region(part.site, row, 0) for row in range(0, 128, 2)]
    controls = matched_controls(anatomy, [part], 20, 0, taken)
    assert not {one.row for control in controls for one in control} & set(range(0, 128, 2))
    everything = [Region(part.site, row, 0) for row in range(128)]
    controls = matched_controls(anatomy, [part], 20, 0, everything)
    assert len(controls) == 20
    assert 88 not in {one.row for control in controls for one in control}


def test_a_whole_line_is_matched_by_lines(model):
    anatomy, _ = model
    part = anatomy.region("L0.mlp.down[88, :]")
    norms = torch.linalg.vector_norm(anatomy.view(part.site).read(), dim=1)
    controls = matched_controls(anatomy, [part], 20, 0)
    assert all([one.geometry for one in control] == ["row"] for control in controls)
    rows = [control[0].row for control in controls]
    assert 88 not in rows
    distance = (norms - norms[88]).abs()
    assert float(distance[rows].max()) <= float(distance.sort().values[4 * 20])
