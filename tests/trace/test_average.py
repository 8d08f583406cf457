"""Averages over facts, against the single traces and their means by hand."""

from __future__ import annotations

import json

import pytest
import torch
from tiny import tiny_model
from transformers import PreTrainedTokenizerBase

from surgeon.anatomy import Anatomy
from surgeon.errors import BadInput, SurgeonError
from surgeon.facts import Fact
from surgeon.trace import (
    PLACES,
    Spread,
    TraceAverage,
    TraceConfig,
    suggest_prior,
    trace,
    trace_facts,
)

Patient = tuple[Anatomy, PreTrainedTokenizerBase]
FACTS = [
    Fact("The capital of {} is", "France", true="Paris"),
    Fact("The capital of {} is", "Peru", true="Paris"),  # not so
    Fact("The capital of {} is", "Japan", true="Tokyo"),
    Fact("The capital of {} is", "Spain"),  # nothing to compare with
    Fact("The {} is in", "headquarters of Harvard University", true="Massachusetts"),
]
CONFIG = TraceConfig(samples=3, sever="mlp")


def test_the_average_is_that_of_the_single_traces(patient: Patient) -> None:
    anatomy, tokenizer = patient
    average = trace_facts(anatomy, tokenizer, FACTS, CONFIG)
    known = [FACTS[0], FACTS[2], FACTS[4]]
    assert (len(average.clean), average.skipped) == (3, 2)
    singles = [
        trace(
            anatomy,
            tokenizer,
            f.prompt,
            f.subject,
            CONFIG,
            f.true,
            spread=Spread(average.sigma / 3, ""),
        )
        for f in known
    ]
    assert average.clean.tolist() == pytest.approx([t.clean for t in singles])
    assert average.corrupt.tolist() == pytest.approx([float(t.corrupt.mean()) for t in singles])
    for kind in ("state", "mlp", "attn", "severed"):
        for layer in range(2):
            effects = [t.mean(kind)[layer] - t.corrupt.mean() for t in singles]
            by_hand = {
                "first subject token": [float(effects[2][singles[2].prompt.start])],
                "middle subject tokens": [
                    float(
                        effects[2][singles[2].prompt.start + 1 : singles[2].prompt.stop - 1].mean()
                    )
                ],
                "last subject token": [
                    float(e[t.prompt.last]) for e, t in zip(effects, singles, strict=True)
                ],
                "first token after": [float(effects[2][singles[2].prompt.stop])],
                "last token": [float(e[-1]) for e in effects],
            }
            for place, values in by_hand.items():
                cell = average.cell(kind, layer, place)
                assert cell is not None
                assert cell[0] == pytest.approx(sum(values) / len(values), abs=1e-6)
                assert min(values) - 1e-6 <= cell[1][0] <= cell[0] + 1e-6
                assert cell[0] - 1e-6 <= cell[1][1] <= max(values) + 1e-6
    result = average.result()
    assert (result.facts, result.skipped) == (3, 2)
    assert result.facts_with_place == [1, 1, 3, 1, 0, 3]
    assert result.state is not None
    assert result.state[0][PLACES.index("further tokens")] is None
    assert len(result.rows()) == 4 * 2 * len(PLACES)
    document = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert TraceAverage.from_json(document) == result


def test_the_noise_is_scaled_by_the_subjects_that_are_traced(patient: Patient) -> None:
    anatomy, tokenizer = patient
    embed = anatomy.model.get_input_embeddings()
    ids = [
        i
        for f in (FACTS[0], FACTS[2])
        for i in tokenizer(f" {f.subject}", add_special_tokens=False).input_ids
    ]
    average = trace_facts(anatomy, tokenizer, FACTS[:4], CONFIG)
    assert average.sigma == pytest.approx(
        3 * float(embed(torch.tensor(ids)).double().std(correction=0)), rel=1e-6
    )
    assert average.sigma_of == "the tokens of 2 subjects"
    # one subject says too little about a spread, so all tokens do
    assert trace_facts(anatomy, tokenizer, FACTS[:1], CONFIG).sigma == pytest.approx(
        3 * float(embed.weight.double().std(correction=0))
    )


def test_the_prior_is_the_mlp_effect_at_the_last_subject_token(patient: Patient) -> None:
    anatomy, tokenizer = patient
    average = trace_facts(anatomy, tokenizer, FACTS, CONFIG)
    prior = suggest_prior(average)
    assert sorted(layer for layer, _, _ in prior) == [0, 1]
    assert [e for _, e, _ in prior] == sorted((e for _, e, _ in prior), reverse=True)
    cells = {layer: average.cell("mlp", layer, "last subject token") for layer in (0, 1)}
    assert {layer: (effect, ci) for layer, effect, ci in prior} == cells
    one = trace(anatomy, tokenizer, "The capital of France is", "France", CONFIG)
    best, effect, (low, high) = suggest_prior(one)[0]
    assert best == 0
    assert effect == pytest.approx(
        float((one.effects["mlp"][0, one.prompt.last] - one.corrupt).mean()), abs=1e-6
    )
    assert low <= effect <= high
    with pytest.raises(BadInput, match="restored no MLP"):
        suggest_prior(
            trace(
                anatomy,
                tokenizer,
                "The capital of France is",
                "France",
                TraceConfig(samples=1, kinds=("state",)),
            )
        )


def test_facts_that_cannot_be_averaged(patient: Patient) -> None:
    with pytest.raises(
        SurgeonError,
        match="of 2 facts the model answers none as their file does, and 1 have no true answer",
    ):
        trace_facts(*patient, [FACTS[1], FACTS[3]], CONFIG)
    with pytest.raises(BadInput, match="one subject only"):
        trace_facts(*patient, FACTS, TraceConfig(replace="Spain"))
    with pytest.raises(BadInput, match="not a causal"):
        trace_facts(Anatomy.of(tiny_model("bert")), patient[1], FACTS, CONFIG)
