"""Edits through the model: the target is said, the forecast is what happens, and nothing stays
behind.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import tiny_model
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from surgeon.anatomy import Anatomy
from surgeon.edit import (
    METHODS,
    ContextConfig,
    EditConfig,
    Preparation,
    PrepareConfig,
    PromptBatch,
    Request,
    ValueConfig,
    dense_down,
    edit,
    keys_at,
    layers_by_depth,
    optimise,
    output_change,
    sampled,
)
from surgeon.errors import BadInput, Refused
from surgeon.facts import Fact
from surgeon.patch import Patch
from surgeon.patch.deltas import LowRankDelta
from surgeon.settings import configured
from surgeon.subject import locate
from surgeon.tap import Tap, by_position

Patient = tuple[Anatomy, PreTrainedTokenizerBase]
FACTS = [
    Fact("The capital of {} is", "France", "Rome", "Paris"),
    Fact("The capital of {} is", "Japan", "Madrid", "Tokyo"),
    Fact("Most people in {} speak", "Brazil", "German", "Portuguese"),
]


def says(patient: Patient, prompt: str, target: str) -> float:
    """P of the target's first token, by a plain call."""
    anatomy, tokenizer = patient
    ids = [tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False).input_ids]
    with torch.no_grad():
        p = anatomy.model(torch.tensor([ids])).logits[0, -1].float().softmax(-1)
    return float(p[tokenizer(f" {target}", add_special_tokens=False).input_ids[0]])


def weights(anatomy: Anatomy) -> dict[str, Tensor]:
    return {n: p.clone() for n, p in anatomy.model.named_parameters()}


def keys_seen(anatomy: Anatomy, windows: Tensor, layer: int) -> Tensor:
    """What enters `mlp.down` (tokens, d_mlp) after position 0, in a plain pass."""
    keys: list[Tensor] = []
    with Tap() as tap, torch.no_grad():
        tap.on_input(
            anatomy.module(dense_down(anatomy, layer)),
            lambda x: keys.append(x[:, 1:].flatten(0, 1).double()),
        )
        tap.run(anatomy.model, input_ids=windows, use_cache=False)
    return keys[0]


QUICK = ("rome", "memit", "ft")  # one of each kind


@pytest.mark.parametrize(
    "method", [m if m in QUICK else pytest.param(m, marks=pytest.mark.slow) for m in METHODS]
)
def test_the_model_says_the_target_and_the_forecast_holds(
    patient: Patient, preparation: Preparation, method: str
) -> None:
    anatomy, _ = patient
    before = weights(anatomy)
    some = FACTS if method in ("emmet", "memit", "alphaedit") else FACTS[:1]
    edited = edit(preparation, some, EditConfig(method=method, weight=20.0))
    assert all(torch.equal(p, before[n]) for n, p in anatomy.model.named_parameters())
    for fact in some:
        assert says(patient, fact.text, str(fact.target)) < 0.1
    sites = [f.site for f in edited.preflight.layers]
    assert edited.patch.sites == sites
    assert len(sites) == 1
    windows = preparation._windows(preparation._wanted(0))
    usual = {s: keys_seen(anatomy, windows, int(s.layer or 0)) for s in sites}
    with edited.patch.applied(anatomy):
        for fact in some:
            assert says(patient, fact.text, str(fact.target)) > 0.9
        changed = {n for n, p in anatomy.model.named_parameters() if not torch.equal(p, before[n])}
        assert changed == {anatomy.addresses[s].parameter for s in sites}
        for forecast in edited.preflight.layers:
            old = before[anatomy.addresses[forecast.site].parameter].double()
            new = anatomy.view(forecast.site).read().double()
            assert forecast.update_norm_ratio == pytest.approx(
                float((new - old).norm() / old.norm()), rel=1e-3
            )
            damage = (usual[forecast.site] @ (new - old).T).pow(2).sum(1).mean()
            assert forecast.predicted_damage == pytest.approx(float(damage), rel=0.01)
            assert forecast.usual == pytest.approx(
                float((usual[forecast.site] @ old.T).pow(2).sum(1).mean()), rel=0.01
            )
    assert all(torch.equal(p, before[n]) for n, p in anatomy.model.named_parameters())
    if method.startswith("rome"):
        assert all(
            isinstance(d, LowRankDelta) and d.left.shape[1] == 1 for d in edited.patch.deltas
        )
        key = edited.preflight.facts[0].key
        # one key's edit has the least damage of all that are exact there
        bound = edited.preflight.layers[0].predicted_damage
        if method == "rome-mean":
            assert key is not None
            # the ridge is in one and not in the other
            assert key.expected_damage == pytest.approx(bound, rel=0.15)
    again = edit(preparation, some, EditConfig(method=method, weight=20.0))
    assert again.patch.digest == edited.patch.digest


@pytest.mark.slow
def test_rome_holds_at_the_keys_it_was_asked_for(
    patient: Patient, preparation: Preparation
) -> None:
    anatomy, tokenizer = patient
    request = Request.of(tokenizer, FACTS[0].prompt, FACTS[0].subject, "Rome", preparation.prefixes)
    assert len(request.prompts) == 11
    keys = keys_at(anatomy, PromptBatch.of(request.prompts), [0])[0].double()
    plain = [
        keys_seen(anatomy, torch.tensor([p.ids]), 0)[p.last - 1] for p in request.prompts
    ]  # position 0 is left out there
    torch.testing.assert_close(keys, torch.stack(plain), rtol=1e-4, atol=1e-5)
    delta = optimise(anatomy, [request], 0).delta[0].double()
    for method, exact in (
        ("rome", ("mean", "bare")),
        ("rome-mean", ("mean",)),
        ("rome-bare", ("bare",)),
        ("rome-legacy", ("bare",)),
    ):
        (d,) = edit(preparation, FACTS[:1], EditConfig(method=method)).patch.deltas
        assert isinstance(d, LowRankDelta)
        change = d.left.double() @ d.right.double()
        for name, key in (("mean", keys.mean(0)), ("bare", keys[0])):
            off = float((change @ key - delta).norm() / delta.norm())
            assert (off < 1e-4) == (name in exact), (method, name, off)


def test_the_value_does_what_it_says_whoever_is_beside_it(
    patient: Patient, preparation: Preparation, monkeypatch: pytest.MonkeyPatch
) -> None:
    anatomy, tokenizer = patient
    requests = [
        Request.of(tokenizer, f.prompt, f.subject, str(f.target), preparation.prefixes[:4])
        for f in FACTS
    ]
    config = ValueConfig(steps=12)
    together = optimise(anatomy, requests, 0, config)
    for i, request in enumerate(requests):
        alone = optimise(anatomy, [request], 0, config)
        torch.testing.assert_close(alone.delta[0], together.delta[i], rtol=1e-2, atol=1e-3)
        # added by the test's own hook, the target has the probability that was reported
        worst = 1.0
        for prompt, target in zip(request.prompts, request.targets, strict=True):

            def add(y: Tensor, at: int = prompt.last, i: int = i) -> Tensor:
                y = y.clone()
                y[:, at] += together.delta[i]
                return y

            ids = torch.tensor([[*prompt.ids, *target[:-1]]])
            with Tap() as tap, torch.no_grad():
                tap.on_output(anatomy.module(dense_down(anatomy, 0)), add)
                log_p = (
                    tap.run(anatomy.model, input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
                )
            start = len(prompt.ids) - 1
            mean = sum(float(log_p[start + j, t]) for j, t in enumerate(target)) / len(target)
            worst = min(worst, 2.718281828**mean)
        assert float(together.probability[i]) == pytest.approx(worst, rel=2e-3)
    monkeypatch.setattr("surgeon.edit.value.TOKENS", 1)
    torch.testing.assert_close(
        optimise(anatomy, requests, 0, config).delta, together.delta, rtol=1e-2, atol=1e-3
    )
    small = optimise(anatomy, requests, 0, replace(config, clamp=0.1))
    assert bool((small.delta.norm(dim=1) <= 0.1 * small.norm * 1.001).all())
    early = optimise(anatomy, requests, 0, ValueConfig(stop=0.0))
    assert bool((early.steps < 60).all())
    assert bool((early.probability < 0.98).any())


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "opt", "gemma2", "phi", "bloom"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_architectures(kind: str, dtype: torch.dtype, patient: Patient) -> None:
    """The value is added where the key is read: after the edit, the state behind the layer is the
    optimised one, prefix or not.
    """
    tokenizer = patient[1]
    anatomy = Anatomy.of(tiny_model(kind, vocab_size=4096, scale=0.15).to(dtype))
    preparation = Preparation(
        anatomy,
        tokenizer,
        PrepareConfig(contexts=ContextConfig(contexts=2, context_tokens=4), tokens=400, bos="no"),
    )
    fact = Fact("The old {} is", "New York", "red")
    config = EditConfig(method="rome-bare", layers=(0,), rounds=1, value=ValueConfig(steps=5))
    edited = edit(preparation, [fact], config)
    located = locate(tokenizer, fact.prompt, fact.subject, "no")
    request = Request.of(tokenizer, fact.prompt, fact.subject, "red", preparation.prefixes, "no")
    delta = optimise(anatomy, [request], 0, config.value).delta[0]

    def write() -> Tensor:
        states: list[Tensor] = []
        with Tap() as tap, torch.no_grad():
            tap.on_output(
                anatomy.module(dense_down(anatomy, 0)),
                lambda y: states.append(by_position(y, 1)[0, located.last].float()),
            )
            tap.run(anatomy.model, input_ids=torch.tensor([located.ids]), use_cache=False)
        return states[0]

    before = write()
    with edited.patch.applied(anatomy):
        moved = write() - before
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-3
    assert float((moved - delta).norm() / delta.norm()) < tolerance


@pytest.mark.parametrize("method", ["memit", "alphaedit"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_several_layers_share_what_is_missing(kind: str, method: str, patient: Patient) -> None:
    """The state behind the last layer moves to the optimised one, and more of it with each
    layer.
    """
    tokenizer = patient[1]
    anatomy = Anatomy.of(tiny_model(kind, vocab_size=4096, scale=0.15, num_hidden_layers=4))
    preparation = Preparation(
        anatomy,
        tokenizer,
        PrepareConfig(contexts=ContextConfig(contexts=2, context_tokens=4), tokens=400, bos="no"),
    )
    facts = [Fact("The old {} is", "New York", "red"), Fact("The dog of {} is", "Anna", "big")]
    value = ValueConfig(steps=5)
    edited = edit(
        preparation,
        facts,
        EditConfig(method=method, layers=(1, 2), value=value, weight=0.01, energy=0.6),
    )
    assert [f.site.layer for f in edited.preflight.layers] == [1, 2]
    requests = [
        Request.of(tokenizer, f.prompt, f.subject, str(f.target), preparation.prefixes, "no")
        for f in facts
    ]
    delta = optimise(anatomy, requests, 2, value.settled(together=True), "state").delta
    batch = PromptBatch.of([r.bare for r in requests])

    def states() -> Tensor:
        states: list[Tensor] = []
        with Tap() as tap, torch.no_grad():
            tap.on_output(
                anatomy.layers[2], lambda y: states.append(y[torch.arange(2), batch.last].clone())
            )
            tap.run(anatomy.model, input_ids=batch.ids, use_cache=False)
        return states[0]

    before = states()
    parts = []
    for sites in ([edited.patch.sites[0]], edited.patch.sites):
        patches = [
            Patch.low_rank(anatomy, s, *[t for d in edited.patch.on(s) for t in (d.left, d.right)])
            for s in sites[:1]
        ]
        with edited.patch.applied(anatomy) if len(sites) == 2 else patches[0].applied(anatomy):
            parts.append(float((states() - before - delta).norm() / delta.norm()))
    assert parts[1] < parts[0] < 1
    assert parts[1] < 0.35


@pytest.mark.slow
def test_several_facts_one_after_the_other(patient: Patient, preparation: Preparation) -> None:
    anatomy, _ = patient
    edited = edit(preparation, FACTS, EditConfig())
    assert len(edited.patch.deltas) == 3
    with edited.patch.applied(anatomy):
        for fact in FACTS:
            assert (
                says(patient, fact.text, str(fact.target)) > 0.5
            )  # later edits wear earlier ones down


def test_radar_is_what_happens(patient: Patient, preparation: Preparation) -> None:
    anatomy, tokenizer = patient
    (d,) = edit(preparation, FACTS[:1], EditConfig()).patch.deltas
    assert isinstance(d, LowRankDelta)
    prompts = [
        locate(tokenizer, "The capital of {} is", s) for s in ("Spain", "Peru", "Germany", "Japan")
    ]
    batch = PromptBatch.of(prompts)
    module = anatomy.module(dense_down(anatomy, 0))

    def writes() -> Tensor:
        writes: list[Tensor] = []
        with Tap() as tap, torch.no_grad():
            tap.on_output(
                module, lambda y: writes.append(y[torch.arange(len(batch)), batch.last].double())
            )
            tap.run(anatomy.model, input_ids=batch.ids, use_cache=False)
        return writes[0]

    before = writes()
    change = output_change(
        keys_at(anatomy, batch, [0])[0].double(), (d.left.double(), d.right.double())
    )
    patch = Patch.low_rank(anatomy, d.site, d.left, d.right)
    with patch.applied(anatomy):
        torch.testing.assert_close((writes() - before).norm(dim=1), change, rtol=1e-3, atol=1e-4)


def test_text_that_the_model_writes(patient: Patient) -> None:
    anatomy, tokenizer = patient
    ids = sampled(anatomy, tokenizer, 70, 9, 3)
    assert ids.shape == (70, 10)
    assert set(ids[:, 0].tolist()) == {tokenizer.bos_token_id}
    assert torch.equal(ids, sampled(anatomy, tokenizer, 70, 9, 3))
    assert not torch.equal(ids, sampled(anatomy, tokenizer, 70, 9, 4))
    with torch.no_grad():
        nll = -anatomy.model(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).mean()
    assert float(nll) < 4  # of 8.3 for tokens drawn at random
    assert sampled(anatomy, tokenizer, 7, 3, 0, "no").shape == (7, 4)


@pytest.mark.parametrize(
    ("facts", "settings", "kind", "match"),
    [
        ([Fact("The capital of {} is", "France")], {}, BadInput, "no target"),
        (FACTS[:1], {"layers": (5,)}, BadInput, "does not exist"),
        (FACTS[:1], {"layers": (1,)}, BadInput, "is the last"),
        (FACTS[:1], {"layers": (0, 1)}, BadInput, "one layer"),
        (FACTS[:1], {"method": "x"}, BadInput, "not known"),
        (FACTS[:1], {"rounds": 0}, BadInput, "at least 1"),
        (FACTS[:1], {"weight": 0.0}, BadInput, "above 0"),
        (FACTS[:1], {"value_clamp": 0.0}, BadInput, "above 0"),
        (FACTS[:1], {"value_stop": 1.0}, BadInput, "value_stop is 1; it must be below 1"),
        (FACTS[:1], {"value_lr": 0.0}, BadInput, "value_lr is 0; it must be above 0"),
        (FACTS[:1], {"ft_lr": 0.0}, BadInput, "above 0"),
        (FACTS[:1], {"ft_stop": 1.0}, BadInput, "below 1"),
        (FACTS[:1], {"energy": 1.0}, BadInput, "below 1"),
        ([FACTS[0], replace(FACTS[0], target="Oslo")], {}, Refused, "at once"),
    ],
)
def test_what_is_no_edit(
    preparation: Preparation,
    facts: list[Fact],
    settings: dict[str, object],
    kind: type[Exception],
    match: str,
) -> None:
    with pytest.raises(kind, match=match):
        edit(preparation, facts, configured(EditConfig, settings))


@pytest.mark.parametrize(
    ("depth", "one", "several"),
    [
        (1, 0, (0,)),
        (2, 0, (0,)),
        (3, 0, (0, 1)),
        (6, 1, (0, 1)),
        (28, 5, (3, 4, 5, 6, 7)),
        (32, 5, (3, 4, 5, 6, 7)),
    ],
)
def test_default_layers(depth: int, one: int, several: tuple[int, ...]) -> None:
    assert layers_by_depth(depth, "rome") == (one,)
    assert layers_by_depth(depth, "memit") == several


@pytest.mark.slow
def test_a_second_round_makes_good_what_the_edit_costs(
    patient: Patient, preparation: Preparation
) -> None:
    """The value is found at the subject's last token alone; the edit acts at ' Harvard' too."""
    anatomy, _ = patient
    fact = Fact("Everyone knows that {} is in", "Harvard University", "California")
    reached = []
    for rounds in (1, 2):
        edited = edit(preparation, [fact], EditConfig(rounds=rounds))
        (d,) = edited.patch.deltas
        assert isinstance(d, LowRankDelta)
        assert d.left.shape[1] == 1
        with edited.patch.applied(anatomy):
            reached.append(says(patient, fact.text, "California"))
    assert reached[0] < 0.98 <= reached[1]
