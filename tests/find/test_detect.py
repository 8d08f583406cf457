"""Detection and verification on planted models, where the truth is known, and on real ones, where
brute force is.
"""

import copy
from contextlib import nullcontext

import pytest
import torch
from tiny import CONFIGS, tiny_model

from surgeon.anatomy import Anatomy, Entry, Region, Site
from surgeon.corpus import Corpus
from surgeon.errors import BadInput, SurgeonError
from surgeon.find import (
    DetectConfig,
    FindConfig,
    VerifyConfig,
    detect,
    find,
    matched_controls,
    verify,
)
from surgeon.measure import mean_nll
from surgeon.patch import ablate
from surgeon.settings import configured
from surgeon.tap import Tap

WINDOWS = torch.randint(3, 99, (6, 24), generator=torch.Generator().manual_seed(0))
CORPUS = Corpus("random", WINDOWS, bos=False)
CAUSAL = [t for t in CONFIGS if t != "bert"]
ROW, COL = 5, 7


def plant(model_type: str, size: float = 400.0):
    """A tiny model with one entry of L1.mlp.down so large that its channel towers over the others
    from there on.
    """
    model = tiny_model(model_type)
    anatomy = Anatomy.of(model)
    site = anatomy.downs(1)[0]
    view = anatomy.view(site)
    view.set_(torch.tensor([ROW]), torch.tensor([COL]), torch.tensor([size]))
    return model, anatomy, site


@pytest.mark.parametrize("model_type", CAUSAL)
def test_the_planted_entry_is_named_in_every_architecture(model_type):
    """It contributes most to the channel it writes, and that channel is the tallest."""
    _, anatomy, site = plant(model_type)
    # a norm after the MLP (gemma2, gemma3, olmo2) holds any one channel of its output below
    # sqrt(d_model) = 5.7
    detection = detect(anatomy, WINDOWS, DetectConfig(min_height=1.5, persistence=0.0))
    candidates = [c for c in detection.candidates if c.channel == ROW]
    assert candidates, detection.rejected
    assert (candidates[0].layer, str(candidates[0].contributions[0].entry)) == (
        1,
        f"{site}[{ROW}, {COL}]",
    )
    assert candidates[0].contributions[0].share > 0.5
    assert detection.candidates[0].channel == ROW


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral", "gpt_oss"])
def test_shares_are_what_zeroing_takes_from_the_write(model_type):
    """The peak shares of a row against brute force: zero one entry, look how much of the write is
    gone.
    """
    _, anatomy, _ = plant(model_type)
    candidate = next(
        c
        for c in detect(anatomy, WINDOWS, DetectConfig(persistence=0.0)).candidates
        if c.channel == ROW
    )

    def write():
        kept = []
        with Tap() as tap:
            tap.on_output(
                anatomy.module(candidate.contributions[0].entry.site),
                lambda y: kept.append(y.flatten(0, -2)[:, ROW].clone()),
            )
            tap.run(anatomy.model, WINDOWS)
        return kept[0]

    before = write()
    peaks = before.abs().topk(8).indices
    for contribution in candidate.contributions[:3]:
        view, entry = anatomy.view(contribution.entry.site), contribution.entry
        at = torch.tensor([entry.row]), torch.tensor([entry.col])
        old = view.get(*at)
        view.set_(*at, torch.zeros(1))
        lost = ((before - write()) * before.sign())[peaks].mean() / before.abs()[peaks].mean()
        view.set_(*at, old)
        assert contribution.peak_share == pytest.approx(float(lost), abs=2e-3)


def test_a_rescaled_neuron_fools_nothing():
    """1000 times the neuron and a 1000th of its outputs: the function is the same, and so must be
    every candidate.
    """
    model = tiny_model("llama")
    decoy = copy.deepcopy(model)
    mlp = decoy.model.layers[1].mlp
    mlp.up_proj.weight[7] *= 1000
    mlp.down_proj.weight[:, 7] /= 1000
    config = DetectConfig(min_height=1.5, persistence=0.0)
    one, two = (detect(Anatomy.of(m), WINDOWS, config) for m in (model, decoy))
    assert [(c.channel, c.layer) for c in one.candidates] == [
        (c.channel, c.layer) for c in two.candidates
    ]
    assert one.candidates
    for a, b in zip(one.candidates, two.candidates, strict=True):
        assert a.contributions[0].entry == b.contributions[0].entry
        assert a.contributions[0].share == pytest.approx(b.contributions[0].share, rel=1e-3)


def test_detection_leaves_the_model_as_it_was():
    model, anatomy, _ = plant("llama")
    before = {n: p.clone() for n, p in model.state_dict().items()}
    find(anatomy, CORPUS, FindConfig(probe_windows=2))
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_none_found_is_a_result_with_its_numbers():
    result = find(Anatomy.of(tiny_model("llama")), CORPUS, FindConfig(probe_windows=2))
    assert result.verdict == "none"
    document = result.to_json()
    assert document["sets"] == []
    assert len(document["detection"]["heights"]) == 3
    assert document["detection"]["bar"] >= 4


def test_a_model_that_is_not_finite_is_said_so():
    model = tiny_model("llama")
    model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(SurgeonError, match="not finite"):
        detect(Anatomy.of(model), WINDOWS)


def test_one_window_is_not_enough():
    with pytest.raises(BadInput, match="at least 2"):
        find(Anatomy.of(tiny_model("llama")), Corpus("one", WINDOWS[:1], bos=False))


# -- verify ------------------------------------------------------------------------------------


def test_verify_equals_brute_force():
    model = tiny_model("llama")
    anatomy = Anatomy.of(model)
    parts = [
        anatomy.region(t)
        for t in (
            "L1.mlp.down[3, 4]",
            "L1.mlp.down[5, :]",
            "L2.mlp.down[:, 9]",
            "L0.attn.out[1, 1]",
        )
    ]
    verified = verify(anatomy, parts, CORPUS)
    base = mean_nll(model, WINDOWS)

    def without(regions):
        broken = copy.deepcopy(model)
        other = Anatomy.of(broken)
        for r in regions:
            matrix = other.view(r.site).read().clone()
            matrix[
                slice(None) if r.row is None else r.row, slice(None) if r.col is None else r.col
            ] = 0
            other.view(r.site).assign_(matrix)
        return mean_nll(broken, WINDOWS) - base

    assert verified.base_nll == pytest.approx(base, abs=1e-6)
    assert verified.single_nats == pytest.approx([without([p]) for p in parts], abs=1e-5)
    assert verified.joint_nats == pytest.approx(without(parts), abs=1e-5)
    assert verified.leave_one_out_nats == pytest.approx(
        [without([q for q in parts if q is not p]) for p in parts], abs=1e-5
    )
    assert verified.ci95[0] <= verified.joint_nats <= verified.ci95[1]
    assert len(verified.controls.nats) == 20


def test_vital_demands_effect_and_significance():
    """A statistically certain but tiny effect is not vital, nor is a large one that its controls
    match.
    """
    anatomy = Anatomy.of(tiny_model("llama"))
    small = verify(anatomy, [anatomy.region("L1.mlp.down[3, 4]")], CORPUS)
    assert abs(small.joint_nats) < 0.1
    assert not small.vital
    row = verify(anatomy, [anatomy.region("L1.mlp.down[5, :]")], CORPUS, VerifyConfig(min_nats=0.0))
    assert row.vital == (
        row.ci95[0] > 0
        and row.p_value <= 0.05
        and row.joint_nats >= 3 * max(row.controls.max_nats, 0)
    )
    assert "whole rows" in row.controls.matched


def test_the_causal_test_restores_the_peak_and_nothing_else():
    """Damage of a set whose channel matters at one position only goes when that position is
    restored.
    """
    model, anatomy, site = plant("llama")
    region = anatomy.region(f"{site}[{ROW}, {COL}]")
    verified = verify(anatomy, [region], CORPUS)
    kept, broken = [], []
    for into, zero in ((kept, False), (broken, True)):
        with ablate(anatomy, [region]).applied(anatomy) if zero else nullcontext(), Tap() as tap:
            tap.on_output(anatomy.module(site), lambda y, into=into: into.append(y.clone()))
            tap.run(model, WINDOWS)
    restored = broken[0].clone()
    for window, position in enumerate(kept[0][..., ROW].abs().argmax(1).tolist()):
        restored[window, position, ROW] = kept[0][window, position, ROW]
    with Tap() as tap:
        tap.on_output(anatomy.module(site), lambda _: restored)
        expected = mean_nll(model, WINDOWS) - verified.base_nll
    assert verified.restored_nats == pytest.approx(expected, abs=1e-5)
    assert abs(verified.restored_nats - verified.joint_nats) > 1e-3


def test_there_is_no_causal_test_for_a_column():
    anatomy = Anatomy.of(tiny_model("llama"))
    assert verify(anatomy, [anatomy.region("L1.mlp.down[:, 4]")], CORPUS).restored_nats is None


def test_too_few_controls_are_refused():
    with pytest.raises(BadInput, match="controls is 19; it must be at least 20"):
        configured(VerifyConfig, {"controls": 19})
    with pytest.raises(BadInput, match="name at least one"):
        verify(Anatomy.of(tiny_model("llama")), [], CORPUS)


# -- controls ----------------------------------------------------------------------------------


def test_controls_are_matched_and_never_the_set_itself():
    anatomy = Anatomy.of(tiny_model("llama"))
    site = Site(1, "mlp.down")
    size = anatomy.view(site).read().abs()
    entry = Entry(site, 3, 4)
    singles = matched_controls(anatomy, [entry], 20, seed=1)
    assert len({c[0] for c in singles}) == 20
    assert entry not in {c[0] for c in singles}
    gaps = torch.tensor([abs(float(size[c[0].row, c[0].col] - size[3, 4])) for c in singles])
    typical = (size - size[3, 4]).abs().median()
    assert gaps.max() < typical / 4
    row = [Entry(site, 3, k) for k in range(48)]
    for control in matched_controls(anatomy, row, 20):
        assert {e.row for e in control} != {3}
        assert len({e.row for e in control}) == 1
        assert sorted(e.col for e in control) == list(range(48))
    column = [Entry(site, r, 9) for r in range(32)]
    for control in matched_controls(anatomy, column, 20):
        assert len({e.col for e in control}) == 1
        assert control[0].col != 9
        assert len(control) == 32
    some = [Entry(site, 3, k) for k in (1, 2, 30)]
    for control in matched_controls(anatomy, some, 20):
        assert len(set(control)) == 3
        assert len({e.row for e in control}) == 1
    assert matched_controls(anatomy, some, 20, seed=5) == matched_controls(
        anatomy, some, 20, seed=5
    )
    assert matched_controls(anatomy, some, 20, seed=5) != matched_controls(
        anatomy, some, 20, seed=6
    )


# -- real models -------------------------------------------------------------------------------


def open_shared(folder, text, windows):
    from surgeon.anatomy import load_model
    from surgeon.corpus import load_corpus, read_text

    loaded = load_model(str(folder))
    return Anatomy.of(loaded.model), load_corpus(
        loaded.tokenizer, read_text(text), text.name, 256, windows
    )


@pytest.mark.slow
def test_the_vital_row_of_a_real_model_is_found(shared):
    anatomy, corpus = open_shared(
        shared / "models" / "tinystories-656k", shared / "text" / "tinystories-sample.txt", 24
    )
    result = find(anatomy, corpus, FindConfig(only="mlp.down"))
    assert [s.geometry for s in result.sets] == ["row"]
    (critical,) = result.sets
    assert {(e.entry.site.layer, e.entry.row) for e in critical.entries} == {(0, 88)}
    assert critical.damage.joint_nats > 0.8
    assert critical.damage.joint_nats > 10 * critical.controls.max_nats
    assert critical.agreement == 1


def test_a_healthy_real_model_has_none(shared):
    anatomy, corpus = open_shared(
        shared / "models" / "stories-260k", shared / "text" / "tinystories-sample.txt", 12
    )
    assert find(anatomy, corpus, FindConfig(only="mlp.down")).verdict == "none"


def test_regions_and_sets_agree_on_damage(shared):
    """A whole row named as a region and as its entries is the same change."""
    anatomy, corpus = open_shared(
        shared / "models" / "stories-260k", shared / "text" / "tinystories-sample.txt", 4
    )
    region = anatomy.region("L1.mlp.down[9, :]")
    whole = verify(anatomy, [region], corpus)
    entries = [Region(region.site, 9, c) for c in range(172)]
    listed = verify(anatomy, entries, corpus, listed=0)
    assert whole.joint_nats == pytest.approx(listed.joint_nats, abs=1e-7)
    assert whole.controls.nats == pytest.approx(listed.controls.nats, abs=1e-7)
