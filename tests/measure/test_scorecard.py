"""The scorecard, against probabilities asked one by one; a model that did not change scores no
change.
"""

from __future__ import annotations

import copy
from math import exp

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from surgeon.anatomy import load_model
from surgeon.corpus import Corpus
from surgeon.errors import BadInput
from surgeon.facts import Fact
from surgeon.measure import (
    Scorecard,
    ScoreConfig,
    compared_controls,
    continuations,
    examine,
    mean_nll,
    next_tokens,
    scorecard,
    with_neighbours,
)
from surgeon.measure.scorecard import ngram_entropy

Patient = tuple[PreTrainedModel, PreTrainedTokenizerBase]
FACTS = [
    Fact(
        "The capital of {} is",
        "France",
        "Tokyo",
        "Paris",
        "capital",
        ("The main city of France is",),
        (("The capital of Japan is", "Tokyo"),),
    ),
    Fact("The capital of {} is", "Egypt", "Paris", "Cairo", "capital"),
    Fact("Most people in {} speak", "Brazil", "German"),
]
CONFIG = ScoreConfig(new_tokens=6)


@pytest.fixture(scope="module")
def patient() -> Patient:
    loaded = load_model("patient")
    assert loaded.tokenizer is not None
    return loaded.model, loaded.tokenizer  # type: ignore[return-value]


@pytest.fixture(scope="module")
def edited(patient: Patient) -> PreTrainedModel:
    """Paris and Tokyo have changed places among the words that the model can say."""
    model, tokenizer = copy.deepcopy(patient[0]), patient[1]
    a, b = (tokenizer(f" {w}", add_special_tokens=False).input_ids[0] for w in ("Paris", "Tokyo"))
    head = model.get_output_embeddings()
    weight = head.weight.detach().clone()
    weight[[a, b]] = weight[[b, a]]
    head.weight = torch.nn.Parameter(weight, requires_grad=False)  # untied from the embedding
    return model


def one_by_one(patient: Patient, prompt: str, words: str) -> list[float]:
    """log P of each token of the words, each from its own pass."""
    model, tokenizer = patient
    ids = [tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False).input_ids]
    answers = []
    for token in tokenizer(f" {words}", add_special_tokens=False).input_ids:
        with torch.no_grad():
            answers.append(
                float(model(torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)[token])
            )
        ids.append(token)
    return answers


def test_continuations_are_those_of_single_passes(
    patient: Patient, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = [
        ("The capital of France is", "Paris"),
        ("Most people in Brazil speak", "Portuguese and sing"),
        ("A", "very long story"),
    ]
    for tokens in (4096, 8):
        monkeypatch.setattr("surgeon.measure.continuation.TOKENS_PER_BATCH", tokens)
        answers = continuations(*patient, pairs)
        for (log_p, _), pair in zip(answers, pairs, strict=True):
            torch.testing.assert_close(
                log_p, torch.tensor(one_by_one(patient, *pair)), rtol=1e-4, atol=1e-4
            )
        assert [says for _, says in answers] == [True, False, False]
        token, p = next_tokens(*patient, ["The capital of France is"])[0]
        assert (token, p) == (
            " Paris",
            pytest.approx(
                exp(one_by_one(patient, "The capital of France is", "Paris")[0]), rel=1e-4
            ),
        )
    with pytest.raises(BadInput):
        continuations(*patient, [("a", "")])


def test_a_swapped_head_scores_as_an_edit(patient: Patient, edited: PreTrainedModel) -> None:
    model, tokenizer = patient
    corpus = Corpus(
        "x",
        torch.tensor(
            [
                [
                    tokenizer.bos_token_id,
                    *tokenizer("The cat sat on the mat and", add_special_tokens=False).input_ids,
                ]
            ]
        ),
        True,
    )
    controls = ["The capital of France is", "Most people in Brazil speak"]
    before = examine(model, tokenizer, FACTS, controls, corpus, CONFIG)
    after = examine(edited, tokenizer, FACTS, controls, corpus, CONFIG)
    card, changes = scorecard(before, after), compared_controls(before, after)
    p = {w: exp(one_by_one(patient, "The capital of France is", w)[0]) for w in ("Paris", "Tokyo")}
    assert (before.own[0].true, before.own[0].target) == (
        pytest.approx(p["Paris"], rel=1e-4),
        pytest.approx(p["Tokyo"], rel=1e-4),
    )
    assert (after.own[0].target, after.own[0].true) == (
        pytest.approx(p["Paris"], rel=1e-4),
        pytest.approx(p["Tokyo"], rel=1e-4),
    )
    assert (card.efficacy.prompts, card.efficacy.before, card.efficacy.after) == (
        3,
        0.0,
        pytest.approx(1 / 3),
    )
    assert (card.paraphrase.prompts, card.paraphrase.before, card.paraphrase.after) == (1, 0.0, 1.0)
    assert (card.neighbours_known_before, card.neighbours_kept) == (1, 0)
    assert (card.neighbourhood.before, card.neighbourhood.after) == (
        0.0,
        0.0,
    )  # target and its answer are one word there
    assert card.harmonic_mean == 0.0
    assert [one.changed for one in changes] == [True, False]
    assert (changes[0].before[0], changes[0].after[0]) == (" Paris", " Tokyo")
    assert changes[0].before[1] == pytest.approx(p["Paris"], rel=1e-4)
    assert (before.free_hits, after.free_hits) == ([False] * 3, [True, False, False])
    assert before.nll == pytest.approx(mean_nll(model, corpus.windows))
    magnitude = sum(answer.target - (answer.true or 0.0) for answer in after.own) / 3
    assert card.efficacy.magnitude_after == pytest.approx(magnitude)
    assert (card.free_generation_success.before, card.free_generation_success.after) == (
        0.0,
        pytest.approx(1 / 3),
    )
    assert card.facts[0].free[0].before.strip().startswith("Paris")
    assert len(card.facts[0].free) == 4
    same = scorecard(before, before)
    for share in (same.efficacy, same.paraphrase, same.neighbourhood):
        assert share.before == share.after
        assert share.magnitude_before == share.magnitude_after
    assert same.neighbours_kept == same.neighbours_known_before == 1
    assert same.ppl is not None
    assert same.nll is not None
    assert same.ppl.before == same.ppl.after == exp(same.nll.before)


def test_a_mean_is_harmonic_only_where_all_three_are_there(patient: Patient) -> None:
    some = examine(*patient, [FACTS[0]], config=CONFIG)
    assert scorecard(some, some).harmonic_mean == 0.0
    assert scorecard(some, some).nll is None
    few = examine(*patient, [FACTS[2]], config=CONFIG)
    card: Scorecard = scorecard(few, few)
    assert card.harmonic_mean is None
    assert card.paraphrase.ci95 is None


def test_known_subjects_of_the_relation_become_neighbours(patient: Patient) -> None:
    wrong = Fact("The capital of {} is", "Peru", "Rome", "Paris", "capital")
    completed = with_neighbours(*patient, [*FACTS, wrong], 5)
    assert completed[0] == FACTS[0]
    assert completed[1].neighbours == (("The capital of France is", "Paris"),)
    assert completed[2].neighbours == ()
    assert set(completed[3].neighbours) == {
        ("The capital of France is", "Paris"),
        ("The capital of Egypt is", "Cairo"),
    }


def test_entropy_of_ngrams() -> None:
    assert ngram_entropy([1, 1, 1, 1, 1]) == 0
    assert ngram_entropy([]) == ngram_entropy([1]) == 0
    # 4 different 2-grams, 3 different 3-grams: (2/3 * 2 + 4/3 * log2 3) / 2
    assert ngram_entropy([1, 2, 3, 4, 5]) == pytest.approx((2 / 3 * 2 + 4 / 3 * 1.5849625) / 2)
