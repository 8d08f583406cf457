"""Every measure against a plain computation with torch and transformers alone."""

import pytest
import torch
import torch.nn.functional as F
from tiny import CONFIGS, tiny_model

from surgeon.anatomy import Anatomy
from surgeon.errors import BadInput
from surgeon.measure import (
    Reference,
    generate,
    interval,
    loop_rate,
    mean_nll,
    require_causal,
    stop_word_share,
    window_nll,
)
from surgeon.measure.likelihood import TOKENS_PER_BATCH, ResumedNLL
from surgeon.patch import ablate

WINDOWS = torch.randint(3, 99, (7, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral"])
def test_nll_is_the_plain_cross_entropy(model_type):
    model = tiny_model(model_type)
    plain = model(WINDOWS, labels=WINDOWS).loss.item()
    assert mean_nll(model, WINDOWS) == pytest.approx(plain, abs=1e-5)
    each = [model(w[None], labels=w[None]).loss.item() for w in WINDOWS]
    assert window_nll(model, WINDOWS).tolist() == pytest.approx(each, abs=1e-5)


def test_nll_does_not_depend_on_the_batches(monkeypatch):
    model = tiny_model("llama")
    whole = window_nll(model, WINDOWS)
    monkeypatch.setattr("surgeon.measure.likelihood.TOKENS_PER_BATCH", 48)
    assert torch.allclose(window_nll(model, WINDOWS), whole, atol=1e-6)
    assert TOKENS_PER_BATCH >= 48


@pytest.mark.parametrize("model_type", [t for t in CONFIGS if t != "bert"])
def test_resuming_gives_the_same_nll_also_of_an_injured_model(model_type):
    model = tiny_model(model_type)
    anatomy = Anatomy.of(model)
    resumed = ResumedNLL(model, anatomy.layers, 1, WINDOWS)
    assert torch.equal(resumed(), window_nll(model, WINDOWS))
    with ablate(anatomy, [anatomy.region(f"{anatomy.downs(1)[0]}[3, :]")]).applied(anatomy):
        injured = window_nll(model, WINDOWS)
        assert torch.equal(resumed(), injured)


def test_divergence_is_kl_from_base_to_changed():
    model = tiny_model("llama")
    anatomy = Anatomy.of(model)
    injury = ablate(anatomy, [anatomy.region("L0.mlp.down[3, :]")])
    base = F.log_softmax(model(WINDOWS).logits[:, :-1], -1)
    with injury.applied(anatomy):
        changed = F.log_softmax(model(WINDOWS).logits[:, :-1], -1)
    comparison = Reference(model, WINDOWS).compare(lambda: injury.applied(anatomy))
    kl = F.kl_div(changed, base, log_target=True, reduction="none").sum(-1).mean().item()
    assert comparison.kl == pytest.approx(kl, rel=1e-4)
    assert comparison.kl > 0
    assert comparison.top1_agreement == pytest.approx(
        (base.argmax(-1) == changed.argmax(-1)).float().mean().item()
    )


def test_the_bootstrap_interval_covers_as_often_as_it_says():
    generator = torch.Generator().manual_seed(1)
    samples = torch.randn(200, 40, generator=generator, dtype=torch.float64) + 0.3
    hits = [
        low <= 0.3 <= high for low, high in (interval(s, seed=i) for i, s in enumerate(samples))
    ]
    assert 0.88 <= sum(hits) / len(hits) <= 0.99
    assert interval(torch.tensor([0.7], dtype=torch.float64)) == pytest.approx((0.7, 0.7))
    assert interval(samples[0], seed=3) == interval(samples[0], seed=3)


def test_loop_rate():
    assert loop_rate([1, 2, 3, 4, 5, 6]) == 0
    assert loop_rate([7] * 12) == 0.9  # ten 3-grams, one kind
    assert loop_rate([1, 2]) == loop_rate([]) == 0


def test_stop_word_share_is_a_mean_probability():
    model = tiny_model("llama")
    p = model(WINDOWS).logits[:, :-1].softmax(-1)
    assert stop_word_share(model, WINDOWS, [4, 9]) == pytest.approx(
        p[..., [4, 9]].sum(-1).mean().item(), rel=1e-4
    )
    assert stop_word_share(model, WINDOWS, range(99)) == pytest.approx(1, rel=1e-4)


def test_generation_is_greedy_and_equals_transformers(shared):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = shared / "models" / "tinystories-656k"
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    prompt = "Once upon a time"
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    theirs = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20, pad_token_id=0
    )
    (mine,) = generate(model, tokenizer, [prompt], 20)
    assert mine.text == tokenizer.decode(theirs[0, ids.shape[1] :], skip_special_tokens=True)


def test_a_masked_model_has_no_next_token_likelihood():
    with pytest.raises(BadInput, match="not a causal language model"):
        require_causal(tiny_model("bert"))
    require_causal(tiny_model("llama"))
