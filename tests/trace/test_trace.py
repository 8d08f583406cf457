"""Traces against one plain forward pass a site and sample, and what must hold in any causal
model.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from tiny import CONFIGS, tiny_model
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from surgeon.anatomy import Anatomy, load_model
from surgeon.errors import BadInput
from surgeon.settings import configured, settings_of
from surgeon.trace import Corruption, Trace, TraceConfig, TraceResult, trace
from surgeon.trace import restore as restore_module

from .naive import Naive

PROMPT, SUBJECT = "the capital of New York is", "New York"
TWO = TraceConfig(samples=2, window=2)


def tiny(model_type: str, **overrides: Any) -> Anatomy:
    return Anatomy.of(tiny_model(model_type, **overrides))


def naive_of(anatomy: Anatomy, model_type: str, one: Trace) -> Naive:
    width, n = (
        anatomy.model.get_input_embeddings()(torch.tensor([[1]])).shape[-1],
        one.prompt.stop - one.prompt.start,
    )
    noise = torch.randn(
        one.config.samples, n, width, generator=torch.Generator().manual_seed(one.config.seed)
    )
    return Naive(
        anatomy.model, model_type, list(one.prompt.ids), one.prompt.start, one.sigma * noise
    )


def each(naive: Naive, one: Trace, layers_of: Any, kind: str, sever: Any = None) -> Tensor:
    """(layer, pos, sample): probability of what the model says."""
    answer = int(naive.clean_logits.argmax())
    n_layers, n, samples = naive.n_layers, len(one.prompt.ids), one.config.samples
    effects = torch.zeros(n_layers, n, samples)
    for layer in range(n_layers):
        for t in range(n):
            for s in range(samples):
                effects[layer, t, s] = (
                    naive.restored(kind, layers_of(layer), t, s, sever and sever(layer))
                    .float()
                    .softmax(-1)[answer]
                )
    return effects


def hooks(anatomy: Anatomy) -> list[Any]:
    return [
        m
        for m in anatomy.model.modules()
        if m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__
    ]


def state_layer(layer: int) -> range:
    return range(layer, layer + 1)


def named(settings: dict[str, Any]) -> bool:
    """Whether they have names for a caller; the noise and the words are one setting there."""
    return set(settings) <= {one.name for one in settings_of(TraceConfig)}


def pair(layer: int) -> range:
    """A window of two: the layer and the one below it."""
    return range(max(0, layer - 1), layer + 1)


@pytest.mark.parametrize("model_type", [t for t in CONFIGS if t != "bert"])
def test_every_site_is_what_one_pass_says(model_type: str, words: PreTrainedTokenizerBase) -> None:
    anatomy = tiny(model_type)
    before = {name: p.clone() for name, p in anatomy.model.named_parameters()}
    one = trace(anatomy, words, PROMPT, SUBJECT, TWO)
    naive = naive_of(anatomy, model_type, one)
    assert one.clean == pytest.approx(float(naive.clean_logits.float().softmax(-1).max()), abs=1e-6)
    answer = int(naive.clean_logits.argmax())
    torch.testing.assert_close(
        one.corrupt,
        torch.stack([x.float().softmax(-1)[answer] for x in naive.corrupt_logits]),
        rtol=0,
        atol=1e-5,
    )
    for kind, layers_of in (("state", state_layer), ("mlp", pair), ("attn", pair)):
        expected = each(naive, one, layers_of, kind)
        torch.testing.assert_close(one.effects[kind], expected, rtol=0, atol=1e-5)
        # a kind whose restoration changed nothing would agree with anything
        assert (expected - one.corrupt).abs().max() > 1e-4
    assert not hooks(anatomy)
    assert all(torch.equal(p, before[name]) for name, p in anatomy.model.named_parameters())


@pytest.mark.parametrize("model_type", ["gpt2", "gptj", "bloom", "opt", "mixtral"])
@pytest.mark.parametrize("sever", ["mlp", "attn"])
def test_severed_paths(model_type: str, sever: str, words: PreTrainedTokenizerBase) -> None:
    anatomy = tiny(model_type)
    one = trace(
        anatomy, words, PROMPT, SUBJECT, TraceConfig(samples=2, kinds=("state",), sever=sever)
    )
    naive = naive_of(anatomy, model_type, one)
    expected = each(
        naive, one, state_layer, "state", lambda layer: (sever, range(layer + 1, naive.n_layers))
    )
    torch.testing.assert_close(one.effects["severed"], expected, rtol=0, atol=1e-5)
    assert (one.effects["severed"] - one.effects["state"])[:-1].abs().max() > 1e-4
    assert torch.equal(
        one.effects["severed"][-1], one.effects["state"][-1]
    )  # nothing lies above the last layer


def test_in_float64_the_agreement_is_exact_to_the_metrics_float32(
    words: PreTrainedTokenizerBase,
) -> None:
    anatomy = Anatomy.of(tiny_model("llama").double())
    one = trace(anatomy, words, PROMPT, SUBJECT, TWO)
    expected = each(naive_of(anatomy, "llama", one), one, state_layer, "state")
    torch.testing.assert_close(one.effects["state"], expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_float32_metrics(
    dtype: torch.dtype, words: PreTrainedTokenizerBase
) -> None:
    anatomy = Anatomy.of(tiny_model("llama").to(dtype))
    one = trace(anatomy, words, PROMPT, SUBJECT, TWO)
    assert {v.dtype for v in one.effects.values()} == {torch.float32}
    assert (one.effects["state"][-1, -1] - one.clean).abs().max() < 5e-3


def test_the_patient_against_one_pass_a_site(
    patient: tuple[Anatomy, PreTrainedTokenizerBase],
) -> None:
    anatomy, tokenizer = patient
    one = trace(anatomy, tokenizer, "The capital of France is", "France", TraceConfig(samples=2))
    assert (one.answer, one.window) == (" Paris", 1)
    assert one.clean > 0.9 > 0.5 > float(one.corrupt.mean())
    naive = naive_of(anatomy, "patient", one)
    for kind in ("state", "mlp", "attn"):
        torch.testing.assert_close(
            one.effects[kind], each(naive, one, state_layer, kind), rtol=0, atol=1e-5
        )


def test_the_noise_is_three_standard_deviations_of_all_embeddings(
    words: PreTrainedTokenizerBase,
) -> None:
    for model_type in ("llama", "gemma3_text"):  # the second scales what it looks up
        anatomy = tiny(model_type)
        everything = anatomy.model.get_input_embeddings()(torch.arange(99))
        one = trace(anatomy, words, PROMPT, SUBJECT, TraceConfig(samples=1, kinds=("state",)))
        assert one.sigma == pytest.approx(
            3 * float(everything.double().std(correction=0)), rel=1e-6
        )
        assert one.result().corruption.sigma_of == "all tokens"


@pytest.mark.parametrize("model_type", ["gpt2", "falcon", "gpt_oss"])
def test_what_cannot_act_does_not(
    model_type: str, words: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the subject nothing is corrupted, and above the last layer nothing is read but the
    last position: no pass is spent there.

    With every site passed through the model after all, the cells are the same.
    """
    anatomy = tiny(model_type)
    one = trace(anatomy, words, PROMPT, SUBJECT, TWO)
    start = one.prompt.start
    assert start == 4
    for values in one.effects.values():
        assert torch.equal(values[:, :start], one.corrupt.expand(3, start, -1))
    torch.testing.assert_close(
        one.effects["state"][-1, -1], torch.full((2,), one.clean), rtol=0, atol=1e-6
    )
    monkeypatch.setattr(
        restore_module.Restorer, "_live", lambda self, kind, layer: range(len(self.prompt.ids))
    )
    everywhere = trace(anatomy, words, PROMPT, SUBJECT, TWO)
    for kind, values in one.effects.items():
        torch.testing.assert_close(values, everywhere.effects[kind], rtol=0, atol=1e-6)


def test_a_budget_of_one_row_a_pass_changes_nothing(
    words: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    anatomy = tiny("gpt2")
    config = TraceConfig(samples=3, sever="mlp")
    whole = trace(anatomy, words, PROMPT, SUBJECT, config)
    monkeypatch.setattr(restore_module, "LOGITS", 1)
    for kind, values in trace(anatomy, words, PROMPT, SUBJECT, config).effects.items():
        torch.testing.assert_close(values, whole.effects[kind], rtol=0, atol=1e-6)


def test_the_same_seed_gives_the_same_bits_and_another_does_not(
    words: PreTrainedTokenizerBase,
) -> None:
    anatomy = tiny("llama")
    first, again, other = (
        trace(anatomy, words, PROMPT, SUBJECT, TraceConfig(samples=3, seed=s)).result()
        for s in (0, 0, 1)
    )
    assert first == again
    assert first.state != other.state


def test_the_logit_metric(words: PreTrainedTokenizerBase) -> None:
    anatomy = tiny("llama")
    config = TraceConfig(samples=2, kinds=("state",), metric="logit")
    one = trace(anatomy, words, PROMPT, SUBJECT, config, answer="green", versus="red")
    naive = naive_of(anatomy, "llama", one)
    green, red = words.convert_tokens_to_ids(["green", "red"])
    assert one.clean == pytest.approx(
        float(naive.clean_logits[green] - naive.clean_logits[red]), abs=1e-5
    )
    value = naive.restored("state", range(1, 2), 4, 1)
    assert float(one.effects["state"][1, 4, 1]) == pytest.approx(
        float(value[green] - value[red]), abs=1e-5
    )
    # without --versus it is what the corrupted model says, and never the answer itself
    others = torch.stack(naive.corrupt_logits).mean(0)
    others[naive.clean_logits.argmax()] = -torch.inf
    assert trace(anatomy, words, PROMPT, SUBJECT, config).versus == words.decode(
        [int(others.argmax())]
    )


def test_another_answer_than_the_models(words: PreTrainedTokenizerBase) -> None:
    anatomy = tiny("llama")
    one = trace(
        anatomy,
        words,
        PROMPT,
        SUBJECT,
        TraceConfig(samples=1, kinds=("state",)),
        answer="green red",
    )
    ids = torch.tensor([list(one.prompt.ids)])
    assert one.answer == "green"
    assert one.clean == pytest.approx(
        float(anatomy.model(ids).logits[0, -1].softmax(-1)[words.convert_tokens_to_ids("green")]),
        abs=1e-6,
    )


def test_other_words_in_the_subjects_place(words: PreTrainedTokenizerBase) -> None:
    anatomy = tiny("gpt2")
    config = TraceConfig(replace="Old Town", window=2)
    one = trace(anatomy, words, PROMPT, SUBJECT, config, answer="red")
    ids, answer = (
        torch.tensor([words(PROMPT.replace(SUBJECT, "Old Town")).input_ids]),
        words.convert_tokens_to_ids("red"),
    )
    assert float(one.corrupt) == pytest.approx(
        float(anatomy.model(ids).logits[0, -1].softmax(-1)[answer]), abs=1e-6
    )
    assert one.sigma == 0
    result = one.result()
    assert (result.ci.method, result.ci.p_corrupt, result.ci.state) == (None, None, None)
    assert result.corruption == Corruption("replace", 0.0, "nothing", None, "Old Town", 1, 0)


def test_the_place_that_is_marked_is_replaced(words: PreTrainedTokenizerBase) -> None:
    """Where the subject stands twice, `{}` marks the second; the first stays."""
    anatomy = tiny("gpt2")
    one = trace(
        anatomy,
        words,
        "red and {} is",
        "red",
        TraceConfig(replace="blue", kinds=("state",)),
        answer="of",
    )
    ids = torch.tensor([words("red and blue is").input_ids])
    assert one.prompt.start == 3
    answer = words.convert_tokens_to_ids("of")
    assert float(one.corrupt) == pytest.approx(
        float(anatomy.model(ids).logits[0, -1].softmax(-1)[answer]), abs=1e-6
    )


@pytest.mark.parametrize(
    ("prompt", "subject", "bos", "span"),
    [
        ("New York is", "New York", "no", (0, 2)),  # position zero
        ("New York is", "New York", "auto", (1, 3)),
        ("the capital of New York", "the capital of New", "no", (0, 4)),  # all but the last
        ("the capital", "the capital", "no", (0, 2)),  # all of it
        ("a city in 東京 is", "東京", "yes", (4, 5)),
        ("the capital of Zürich is", "Zürich", "no", (3, 4)),
        ("Zürich", "Zürich", "no", (0, 1)),
    ],
)
def test_wherever_the_subject_stands(
    prompt: str, subject: str, bos: str, span: tuple[int, int], words: PreTrainedTokenizerBase
) -> None:
    anatomy = tiny("gpt2")
    one = trace(anatomy, words, prompt, subject, TWO, bos=bos)
    assert (one.prompt.start, one.prompt.stop) == span
    assert one.prompt.bos == (bos != "no")
    naive = naive_of(anatomy, "gpt2", one)
    torch.testing.assert_close(
        one.effects["state"], each(naive, one, state_layer, "state"), rtol=0, atol=1e-5
    )
    torch.testing.assert_close(
        one.effects["attn"], each(naive, one, pair, "attn"), rtol=0, atol=1e-5
    )
    result = one.result()
    assert result.subject_range == span
    assert result.tokens[span[0] : span[1]] == list(one.prompt.subject_tokens)
    document = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert TraceResult.from_json(document) == result


def test_one_layer_is_enough(words: PreTrainedTokenizerBase) -> None:
    anatomy = tiny("llama", num_hidden_layers=1)
    one = trace(anatomy, words, PROMPT, SUBJECT, TraceConfig(samples=2))
    assert one.window == 1
    naive = naive_of(anatomy, "llama", one)
    for kind in ("state", "mlp", "attn"):
        torch.testing.assert_close(
            one.effects[kind], each(naive, one, state_layer, kind), rtol=0, atol=1e-5
        )


def test_windows() -> None:
    assert [TraceConfig().window_of(n) for n in (1, 2, 3, 6, 12, 24, 28, 48)] == [
        1,
        1,
        1,
        2,
        4,
        8,
        10,
        10,
    ]
    assert [TraceConfig(window=5).window_of(n) for n in (3, 5, 48)] == [3, 5, 5]


def test_intervals_hold_the_means(words: PreTrainedTokenizerBase) -> None:
    result = trace(tiny("llama"), words, PROMPT, SUBJECT, TraceConfig(samples=5)).result()
    assert result.ci.p_corrupt is not None
    low, high = result.ci.p_corrupt
    assert low < result.p_corrupt < high
    assert list(result.effects) == ["state", "mlp", "attn"]
    for kind, grid in result.effects.items():
        for means, spans in zip(grid, getattr(result.ci, kind), strict=True):
            assert all(a - 1e-6 <= m <= b + 1e-6 for m, (a, b) in zip(means, spans, strict=True))
    values = [value for row in result.effects["state"] for value in row]
    assert [site.value for site in result.best["state"]] == sorted(values, reverse=True)[:3]
    assert len(result.rows()) == 3 * len(values)


def test_a_corruption_that_does_no_harm_is_said(words: PreTrainedTokenizerBase) -> None:
    one = trace(
        tiny("llama"), words, PROMPT, SUBJECT, TraceConfig(noise=1e-4, samples=2, kinds=("state",))
    )
    assert any("little that a restored state could bring back" in w for w in one.warnings)
    assert one.result().warnings == list(one.warnings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"subject": "house"}, "is not in the prompt"),
        ({"subject": ""}, "the subject is empty"),
        ({"answer": " "}, "target is empty"),
        ({"versus": "red"}, "is for metric logit"),
        ({"prompt": "New York " * 60}, "the model reads 64"),
        ({"config": TraceConfig(replace="red")}, "has 1 tokens there"),
        ({"config": TraceConfig(replace="New York")}, "nothing would be corrupted"),
        (
            {"config": TraceConfig(metric="logit"), "answer": "red", "versus": "red green"},
            "begin with the same token",
        ),
    ],
)
def test_what_cannot_be_traced(
    changes: dict[str, Any], message: str, words: PreTrainedTokenizerBase
) -> None:
    anatomy = tiny("llama")
    with pytest.raises(BadInput, match=message):
        trace(anatomy, words, **{"prompt": PROMPT, "subject": SUBJECT, **changes})
    assert not hooks(anatomy)


def test_a_masked_model_has_no_answer(words: PreTrainedTokenizerBase) -> None:
    with pytest.raises(BadInput, match="not a causal language model"):
        trace(tiny("bert"), words, PROMPT, SUBJECT)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 0}, "samples is 0; it must be at least 1"),
        ({"window": 0}, "window is 0; it must be at least 1"),
        ({"noise": 0.0}, "above 0"),
        ({"noise": float("nan")}, "above 0"),
        ({"replace": " "}, "are empty"),
        ({"kinds": ("head",)}, "kinds head is not known; use state, mlp, attn"),
        ({"kinds": "state,head"}, "kinds head is not known"),
        ({"kinds": ()}, "names nothing to restore"),
        ({"sever": "state"}, "sever state is not known"),
        ({"metric": "rank"}, "metric rank is not known"),
    ],
)
def test_settings_that_make_no_trace(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        configured(TraceConfig, settings) if named(settings) else TraceConfig(**settings)


def test_an_exception_leaves_no_hook(words: PreTrainedTokenizerBase) -> None:
    anatomy = tiny("llama")
    plain = anatomy.model(torch.tensor([[1, 5, 6]])).logits
    passes = 0

    def stop(what: str, done: int, total: int) -> None:
        nonlocal passes
        passes = done
        if done == 4:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        trace(anatomy, words, PROMPT, SUBJECT, TWO, progress=stop)
    assert passes == 4
    norm = anatomy.layers[2].input_layernorm  # and one from inside a pass
    own = norm.forward
    norm.forward = lambda x: (_ for _ in ()).throw(RuntimeError("inside"))
    with pytest.raises(RuntimeError, match="inside"):
        trace(anatomy, words, PROMPT, SUBJECT, TWO)
    norm.forward = own
    del norm.__dict__["forward"]
    assert not hooks(anatomy)
    assert torch.equal(anatomy.model(torch.tensor([[1, 5, 6]])).logits, plain)


def test_no_single_state_of_facts_gpt2_carries_a_fact(shared: Any) -> None:
    """What this model knows of a subject is spread over its many tokens, and one pass a site says
    so as well.
    """
    loaded = load_model(str(shared / "models" / "facts-gpt2"))
    anatomy, tokenizer = Anatomy.of(loaded.model), loaded.tokenizer
    one = trace(
        anatomy,
        tokenizer,
        "Nonchan Noriben was created in",
        "Nonchan Noriben",
        TraceConfig(samples=2, kinds=("state",)),
    )
    expected = each(naive_of(anatomy, "gpt2", one), one, state_layer, "state")
    torch.testing.assert_close(one.effects["state"], expected, rtol=0, atol=1e-5)
    half = (float(one.corrupt.mean()) + one.clean) / 2
    assert expected.mean(-1)[:, one.prompt.start : one.prompt.stop].max() < half
