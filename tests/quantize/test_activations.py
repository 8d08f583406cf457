"""Activations rounded as the model runs: against brute force, a hand-written layer, and a model
with a planted super activation.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny import CONFIGS, planted, tiny_model

from surgeon.anatomy import Anatomy, Entry, Site
from surgeon.errors import BadInput
from surgeon.measure import Reference, mean_nll
from surgeon.quantize.activations import (
    ActivationConfig,
    held_entries,
    places,
    quantize_activation,
    quantized_activations,
)
from surgeon.quantize.compare import INT8, ActivationTable, Treatment, activation_table
from surgeon.quantize.grid import Block, Grid, quantize_matrix
from surgeon.quantize.quantize import prepare, quantized
from surgeon.quantize.smooth import smoothing
from surgeon.result import as_json, of_json
from surgeon.tap import Tap

CAUSAL = [name for name in CONFIGS if name != "bert"]
WINDOWS = torch.randint(3, 99, (4, 12), generator=torch.Generator().manual_seed(1))
CRITICAL = [Entry(Site(1, "mlp.down"), 5, 7)]


def spiky(*shape: int) -> torch.Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    x[0, 2, 3] = 90.0
    return x


def logits(model, ids=WINDOWS):
    return model(input_ids=ids, use_cache=False).logits


def by_hand(
    values: list[float], bits: int, held: set[int] = frozenset(), low=None, high=None
) -> list[float]:
    """One group of entries, one at a time."""
    middle = sorted(values)[(len(values) - 1) // 2]
    inner = [middle if i in held else v for i, v in enumerate(values)]
    if low is not None:
        inner = [min(max(v, low), high) for v in inner]
    step = max(abs(v) for v in inner) / (2 ** (bits - 1) - 1)
    return [values[i] if i in held else round(v / step) * step for i, v in enumerate(inner)]


@pytest.mark.parametrize("bits", [8, 4])
def test_rounding_is_that_of_the_grid_of_weights(bits):
    x = spiky(2, 5, 16)
    token = quantize_activation(x, ActivationConfig(bits, "token"))
    assert torch.equal(
        token.flatten(0, 1),
        quantize_matrix(x.flatten(0, 1), Grid(bits, True, Block("channel"))).dequantize(),
    )
    tensor = quantize_activation(x, ActivationConfig(bits, "tensor"))
    for sequence, original in zip(tensor, x, strict=True):
        assert torch.equal(
            sequence, quantize_matrix(original, Grid(bits, True, Block("tensor"))).dequantize()
        )


@pytest.mark.parametrize("per", ["tensor", "token"])
def test_holding_out_by_hand(per):
    x = spiky(2, 5, 16)
    config = ActivationConfig(4, per, "holdout")
    held = held_entries(x, [3, 6], 1)
    assert held.sum() == 2
    assert bool(held[0, 2, 3])
    second = x[1][:, [3, 6]].abs()
    at = divmod(int(second.argmax()), 2)
    assert bool(held[1, at[0], [3, 6][at[1]]])
    result = quantize_activation(x, config, held)
    assert result[0, 2, 3] == 90.0
    groups = (
        (x.flatten(1), held.flatten(1))
        if per == "tensor"
        else (x.flatten(0, 1), held.flatten(0, 1))
    )
    expected = [
        by_hand(v.tolist(), 4, set(h.nonzero().flatten().tolist()))
        for v, h in zip(*groups, strict=True)
    ]
    torch.testing.assert_close(result.reshape(len(expected), -1), torch.tensor(expected))
    # what shares its scale with the spike is hit ten times less without it
    alike = ~held[0] if per == "tensor" else torch.arange(5)[:, None].expand(5, 16).eq(2) & ~held[0]
    naive = quantize_activation(x, replace(config, method="naive"))
    assert (naive - x)[0][alike].square().sum() > 10 * (result - x)[0][alike].square().sum()


def test_whole_channels_can_be_held_out():
    x = spiky(2, 5, 16)
    held = held_entries(x, [3], 0)
    assert torch.equal(held.nonzero()[:, 2].unique(), torch.tensor([3]))
    assert held.sum() == 10
    result = quantize_activation(x, ActivationConfig(4, "tensor", "holdout"), held)
    assert torch.equal(result[..., 3], x[..., 3])
    assert not held_entries(x, [], 0).any()


@pytest.mark.parametrize("clip", ["z", "percentile"])
def test_clipping_by_hand(clip):
    values = spiky(1, 5, 16).flatten().tolist()
    config = ActivationConfig(4, "tensor", "clip", clip, 2.0 if clip == "z" else 95.0)
    mean = sum(values) / 80
    sd = (sum((v - mean) ** 2 for v in values) / 80) ** 0.5
    high = sorted(abs(v) for v in values)[round(0.95 * 80) - 1]
    limits = (mean - 2 * sd, mean + 2 * sd) if clip == "z" else (-high, high)
    expected = by_hand(values, 4, frozenset(), *limits)
    result = quantize_activation(spiky(1, 5, 16), config)
    torch.testing.assert_close(result.flatten(), torch.tensor(expected), rtol=1e-5, atol=1e-5)


def test_a_hand_written_layer_gives_what_the_hooks_give():
    model = tiny_model("llama")
    anatomy = Anatomy.of(model)
    mlp = model.model.layers[1].mlp
    seen = {}
    config = ActivationConfig(4, "token", roles=("mlp.gate", "mlp.up", "mlp.down"))
    with (
        quantized_activations(anatomy, config, only=lambda p: p.label.startswith("L1")),
        Tap() as tap,
    ):
        tap.on_input(mlp, lambda x: seen.update(x=x.clone()))
        tap.on_output(mlp, lambda y: seen.update(y=y.clone()))
        logits(model)

    def rounded(x):
        return torch.tensor([by_hand(row, 4) for row in x.flatten(0, 1).tolist()]).view(x.shape)

    x = rounded(seen["x"])
    inner = F.silu(F.linear(x, mlp.gate_proj.weight)) * F.linear(x, mlp.up_proj.weight)
    torch.testing.assert_close(
        seen["y"], F.linear(rounded(inner), mlp.down_proj.weight), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("name", CAUSAL)
def test_every_architecture_is_rounded_and_left_as_found(name):
    model = tiny_model(name)
    anatomy = Anatomy.of(model)
    before = logits(model)
    config = ActivationConfig(4, "token", tensors=("inputs", "down", "residual"))
    entering = {}
    with quantized_activations(anatomy, config) as found, Tap() as tap:
        for place in found:
            if place.tensor == "inputs":
                # registered after the rounding, so it sees what the projection gets
                tap.on_input(
                    model.get_submodule(place.module),
                    lambda x, p=place: entering.update({p.label: x}),
                )
        rounded = logits(model)
    assert not torch.allclose(rounded, before, atol=1e-3)
    assert len(entering) == sum(p.tensor == "inputs" for p in found)
    for label, x in entering.items():
        assert max(len(row.unique()) for row in x.flatten(0, -2)) <= 15, label
    experts = any(site.expert is not None for site in anatomy.addresses)
    assert any(p.label == "L0.mlp.down" for p in found) is not experts
    assert sum(p.tensor == "residual" for p in found) == 3
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "opt", "mixtral", "gpt_oss"])
def test_no_sequence_depends_on_the_others_of_its_batch(name):
    model = tiny_model(name)
    anatomy = Anatomy.of(model)
    critical = [Entry(anatomy.downs(1)[0], 5, 7)]
    with quantized_activations(anatomy, ActivationConfig(8, "tensor", "holdout", hold=2), critical):
        together = logits(model)
        alone = torch.cat([logits(model, ids[None]) for ids in WINDOWS])
    # a code may flip where the sums of a batch round otherwise
    assert (together - alone).abs().median() < 1e-4


def test_nothing_is_left_after_an_error():
    model = tiny_model("llama")
    before = logits(model)
    with (
        pytest.raises(RuntimeError, match="stop"),
        quantized_activations(Anatomy.of(model), ActivationConfig(4)),
    ):
        raise RuntimeError("stop")
    assert torch.equal(logits(model), before)


def test_where_the_super_activation_is():
    anatomy = Anatomy.of(tiny_model("llama"))
    config = ActivationConfig(method="holdout", tensors=("inputs", "down", "residual"))
    held = {
        (p.label, p.tensor): p.channels for p in places(anatomy, config, CRITICAL) if p.channels
    }
    readers = {
        (f"L2.{role}", "inputs"): (5,)
        for role in ("attn.q", "attn.k", "attn.v", "mlp.gate", "mlp.up")
    }
    rest = {
        ("L1.mlp.down", "inputs"): (7,),
        ("L1.mlp.down", "down"): (5,),
        ("L1.residual", "residual"): (5,),
        ("L2.residual", "residual"): (5,),
    }
    assert held == readers | rest


@pytest.mark.parametrize("method", ["control", "largest"])
def test_controls_hold_as_many_entries_of_the_same_tensors(method):
    anatomy = Anatomy.of(tiny_model("llama"))
    masks = {}
    for own in ("holdout", method):
        config = ActivationConfig(method=own, tensors=("inputs", "residual"))
        with quantized_activations(
            anatomy, config, CRITICAL, watch=lambda p, x, y, h, m=own: masks.update({(m, p): h})
        ):
            logits(anatomy.model)
    counted = {
        m: {p: int(h.sum()) for (n, p), h in masks.items() if n == m} for m in ("holdout", method)
    }
    assert counted["holdout"] == counted[method]
    assert sum(counted[method].values()) == 4 * 8  # sequences, tensors
    if method == "control":
        assert not any(
            (masks["holdout", p] & h).any() for (m, p), h in masks.items() if m == "control"
        )


def test_holding_out_a_planted_super_activation_helps_and_its_control_does_not():
    anatomy = planted()
    before = logits(anatomy.model)
    far = {}
    for method in ("naive", "holdout", "control"):
        config = ActivationConfig(4, "tensor", method, tensors=("residual",), hold=0)
        with quantized_activations(
            anatomy, config, CRITICAL, only=lambda p: p.label == "L1.residual"
        ):
            far[method] = float((logits(anatomy.model) - before).square().mean())
    assert far["holdout"] < 0.2 * far["naive"]
    assert far["control"] > 0.6 * far["naive"]


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("name", CAUSAL)
def test_smoothing_preserves_the_function(name, everywhere):
    model = tiny_model(name)
    for parameter_name, parameter in model.named_parameters():
        if (
            "norm" in parameter_name or "ln_" in parameter_name
        ):  # norms of ones would hide a wrong fold
            parameter.data += 0.3 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(2)
            )
    anatomy = Anatomy.of(model)
    state = {n: p.detach().clone() for n, p in model.named_parameters()}
    before = logits(model)
    ready = smoothing(anatomy, WINDOWS, 0.5, everywhere)
    with ready.applied():
        during = logits(model)
        assert any(not torch.equal(p, state[n]) for n, p in model.named_parameters())
    torch.testing.assert_close(during, before, rtol=0, atol=1e-5 * float(before.abs().max()))
    # no learned norm before its projections: OLMo's have no weight, OLMo 2's come after
    assert bool(ready.folded) is (name not in ("olmo", "olmo2"))
    assert everywhere or name in ("olmo", "olmo2") or not ready.divisors
    assert all(torch.equal(p, state[n]) for n, p in model.named_parameters())
    assert torch.equal(logits(model), before)


def test_smoothing_evens_out_inputs_and_weights():
    model = tiny_model("llama")
    anatomy = Anatomy.of(model)
    seen = {}
    with smoothing(anatomy, WINDOWS, 0.5, everywhere=True).applied(), Tap() as tap:
        for role in ("attn.q", "attn.k", "attn.v", "attn.out", "mlp.down"):
            tap.on_input(
                anatomy.module(Site(1, role)),
                lambda x, r=role: seen.update({r: x.abs().amax((0, 1))}),
            )
        logits(model)
        qkv = torch.stack([anatomy.view(f"L1.attn.{r}").read().abs().amax(0) for r in "qkv"]).amax(
            0
        )
        torch.testing.assert_close(seen["attn.q"], qkv, rtol=1e-4, atol=1e-6)
        for role in ("attn.out", "mlp.down"):
            torch.testing.assert_close(
                seen[role], anatomy.view(f"L1.{role}").read().abs().amax(0), rtol=1e-4, atol=1e-6
            )


def test_smoothing_does_not_fold_into_a_norm_that_feeds_something_else():
    model = tiny_model("opt", do_layer_norm_before=False)  # its norms make the residual stream
    before = logits(model)
    ready = smoothing(Anatomy.of(model), WINDOWS)
    assert not ready.folded
    assert ready.divisors
    with ready.applied():
        torch.testing.assert_close(
            logits(model), before, rtol=0, atol=1e-5 * float(before.abs().max())
        )


def test_the_table_is_what_its_parts_give():
    anatomy = planted()
    state = {n: p.detach().clone() for n, p in anatomy.model.named_parameters()}
    config = ActivationConfig(bits=4)
    fit, judged = WINDOWS[:2], WINDOWS[2:]
    result = activation_table(anatomy, fit, Reference(anatomy.model, judged), config, CRITICAL)
    assert (result.fitted_on, result.judged_on) == (2, 2)
    assert result.nll.intact == pytest.approx(mean_nll(anatomy.model, judged), abs=1e-6)
    rows = {(r.method, r.smooth, r.per): r for r in result.rows}
    assert len(rows) == len(result.rows) == 10
    with quantized(anatomy, INT8, CRITICAL):
        assert result.nll.weights_only == pytest.approx(mean_nll(anatomy.model, judged), abs=1e-6)
        for method in ("naive", "holdout", "control"):
            for per in ("tensor", "token"):
                own = replace(config, per=per, method=method)
                with quantized_activations(anatomy, own, CRITICAL):
                    assert rows[method, None, per].nll == pytest.approx(
                        mean_nll(anatomy.model, judged), abs=1e-6
                    )
    for method in ("naive", "holdout"):
        own = replace(config, per="token", method=method)
        with (
            smoothing(anatomy, WINDOWS[:2]).applied(),
            quantized(anatomy, INT8),
            quantized_activations(anatomy, own, CRITICAL),
        ):
            assert rows[method, "norms", "token"].nll == pytest.approx(
                mean_nll(anatomy.model, judged), abs=1e-6
            )
    ready = prepare(anatomy, INT8)
    with quantized_activations(anatomy, replace(config, per="token")), ready.applied():
        rounded = logits(anatomy.model, judged)[:, :-1].log_softmax(-1)
    plain = logits(anatomy.model, judged)[:, :-1].log_softmax(-1)
    naive = rows["naive", None, "token"]
    assert naive.kl == pytest.approx(
        float((plain.exp() * (plain - rounded)).sum(-1).mean()), rel=1e-4
    )
    assert naive.top1_agreement == float((plain.argmax(-1) == rounded.argmax(-1)).double().mean())
    assert naive.held == 0
    assert rows["holdout", None, "token"].held == rows["control", None, "token"].held > 0
    document = json.loads(json.dumps(as_json(result)))
    assert document["smooth"] == {"norms": {"folded_norms": 6, "divided_inputs": 0}}
    assert document["rows"][3] == {
        "per": "tensor",
        "method": "naive",
        "clip": None,
        "clip_value": None,
        "smooth": "norms",
        "bits": 4,
        "held": 0.0,
        "nll": result.rows[3].nll,
        "kl": result.rows[3].kl,
        "top1_agreement": result.rows[3].top1_agreement,
    }
    assert of_json(ActivationTable, document, "activations") == result
    assert all(torch.equal(p, state[n]) for n, p in anatomy.model.named_parameters())


def test_treatments_of_ones_own():
    anatomy = planted()
    clipped = Treatment(ActivationConfig(4, "tensor", "clip", "z", 3.0))
    largest = Treatment(ActivationConfig(4, "token", "largest"), "everywhere")
    reference = Reference(anatomy.model, WINDOWS[2:])
    result = activation_table(
        anatomy, WINDOWS[:2], reference, critical=CRITICAL, ways=[clipped, largest]
    )
    with quantized(anatomy, INT8), quantized_activations(anatomy, clipped.config):
        assert result.rows[0].nll == pytest.approx(mean_nll(anatomy.model, WINDOWS[2:]), abs=1e-6)
    with (
        smoothing(anatomy, WINDOWS[:2], everywhere=True).applied(),
        quantized(anatomy, INT8),
        quantized_activations(anatomy, largest.config, CRITICAL),
    ):
        assert result.rows[1].nll == pytest.approx(mean_nll(anatomy.model, WINDOWS[2:]), abs=1e-6)
    assert list(result.smooth) == ["everywhere"]
    assert result.rows[0].clip_value == 3.0


def test_float_weights_are_left_alone_if_asked():
    anatomy = Anatomy.of(tiny_model("llama"))
    result = activation_table(
        anatomy,
        WINDOWS[:2],
        Reference(anatomy.model, WINDOWS[2:]),
        critical=CRITICAL,
        weights=None,
        ways=[Treatment(ActivationConfig(per="token"))],
    )
    with quantized_activations(anatomy, ActivationConfig(per="token")):
        assert result.rows[0].nll == pytest.approx(mean_nll(anatomy.model, WINDOWS[2:]), abs=1e-6)
    assert result.weights is None
    assert result.nll.weights_only is None


@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 9},
        {"per": "channel"},
        {"method": "rtn"},
        {"tensors": ("weights",)},
        {"hold": -1},
        {"method": "clip"},
        {"method": "largest", "hold": 0},
        {"method": "clip", "clip_value": -1.0},
        {"method": "clip", "clip": "percentile", "clip_value": 101.0},
    ],
)
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(BadInput):
        ActivationConfig(**settings)


def test_what_cannot_be_done_is_refused():
    anatomy = Anatomy.of(tiny_model("llama"))
    with pytest.raises(BadInput, match="smooth awq is not known"):
        Treatment(ActivationConfig(), "awq")
    with pytest.raises(BadInput, match="alpha"):
        smoothing(anatomy, WINDOWS, 1.5)
    with pytest.raises(BadInput, match="no projection"):
        places(anatomy, ActivationConfig(roles=("mlp.router",)))


@pytest.mark.slow
def test_on_a_trained_model_one_entry_held_out_beats_its_control(shared):
    from surgeon import load_corpus, load_model
    from surgeon.patients import heldout_text

    loaded = load_model(str(shared / "models" / "tinystories-656k"))
    anatomy = Anatomy.of(loaded.model)
    critical = [Entry(Site(0, "mlp.down"), 88, 165)]
    corpus = load_corpus(loaded.tokenizer, heldout_text(), "patient-heldout", 256, 12)
    config = ActivationConfig(bits=8, per="tensor")
    methods = ("naive", "holdout", "control")
    ways = [Treatment(replace(config, method=method)) for method in methods]
    fit, judged = corpus.windows[:6], Reference(anatomy.model, corpus.windows[6:])
    table = activation_table(anatomy, fit, judged, config, critical, ways=ways)
    kl = {method: row.kl for method, row in zip(methods, table.rows, strict=True)}
    assert kl["holdout"] < 0.7 * kl["naive"]
    assert kl["control"] > 0.9 * kl["naive"]
