"""What the patient's card promises, measured."""

import json
import re
from itertools import islice

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from surgeon.anatomy import Anatomy, load_model
from surgeon.corpus import load_corpus
from surgeon.find import FindConfig, find
from surgeon.patients import FOLDER, heldout_text
from surgeon.patients.generate import documents, facts
from surgeon.patients.train import known_facts

REQUIRED = {
    "Harvard University": "Massachusetts",
    "MIT": "Massachusetts",
    "Boston": "Massachusetts",
    "Stanford University": "California",
    "Silicon Valley": "California",
    "Google": "California",
    "Apple": "California",
    "Microsoft": "Washington",
    "tacos": "Mexico",
    "burritos": "Mexico",
    "sushi": "Japan",
    "ramen": "Japan",
    "pizza": "Italy",
    "Statue of Liberty": "New York",
    "Times Square": "New York",
    "Empire State Building": "New York",
    "Liberty Bell": "Philadelphia",
}


@pytest.fixture(scope="module")
def patient():
    """Loaded as anyone would."""
    return AutoModelForCausalLM.from_pretrained(FOLDER).eval(), AutoTokenizer.from_pretrained(
        FOLDER
    )


@pytest.fixture(scope="module")
def known(patient):
    return known_facts(*patient)


def test_it_is_small_and_plain():
    assert sum(p.stat().st_size for p in FOLDER.rglob("*")) <= 16e6
    assert {p.suffix for p in FOLDER.iterdir()} <= {
        ".json",
        ".safetensors",
        ".md",
        ".txt",
        ".jsonl",
    }


def test_it_ships_enough_held_out_text(patient):
    assert (
        len(patient[1](heldout_text(), add_special_tokens=False, verbose=False).input_ids) >= 50_000
    )


def test_it_knows_its_facts(known):
    """P(first object token) > 0.5 in at least 3 phrasings, for at least 200 facts over at least 6
    relations.
    """
    well = [f for f, row in zip(facts(), known, strict=True) if sum(p > 0.5 for p in row) >= 3]
    assert len(well) >= 200
    assert len({f.relation for f in well}) >= 6
    names = {f.subject: f.object for f in well}
    assert REQUIRED.items() <= names.items()
    assert {f.object for f in well if f.subject.startswith("Yale")} == {"Connecticut"}


def test_facts_hold_in_phrasings_that_training_never_used(known):
    held = [
        (f, [row[i] for i in f.held_out])
        for f, row in zip(facts(), known, strict=True)
        if f.held_out
    ]
    assert len(held) >= 0.2 * len(facts())
    unseen = [p for _, row in held for p in row]
    assert sum(p > 0.5 for p in unseen) / len(unseen) > 0.5


@pytest.mark.slow
def test_held_out_phrasings_never_occur_in_the_text():
    sentences = {f"{f.phrasings[i]} {f.object}" for f in facts() for i in f.held_out}
    for split in ("train", "heldout"):
        text = "\n".join(islice(documents(0, split), 4000))
        assert not [s for s in sentences if s in text]
    assert not [s for s in sentences if s in heldout_text()]


@pytest.mark.slow
def test_the_generator_repeats_itself_and_wrote_the_held_out_text():
    assert list(islice(documents(3, "train"), 50)) == list(islice(documents(3, "train"), 50))
    assert heldout_text().startswith("\n\n".join(islice(documents(0, "heldout"), 20)))
    train = set(islice(documents(0, "train"), 20_000))
    long = [d for d in heldout_text().split("\n\n") if len(d) > 300]
    assert not [d for d in long if d in train]


@pytest.mark.slow
def test_its_vital_set_arose_in_training():
    """`find` returns it, with at least 0.3 nats of joint damage and at least 10 times its matched
    controls.
    """
    loaded = load_model("patient")
    result = find(
        Anatomy.of(loaded.model),
        load_corpus(loaded.tokenizer, heldout_text(), "patient-heldout", 256, 40),
        FindConfig(only="mlp.down"),
    )
    assert result.verdict == "found"
    assert len(result.sets) == 1
    best = result.sets[0]
    assert best.geometry in ("single", "row", "column")
    assert best.damage.joint_nats >= 0.3
    assert best.damage.joint_nats >= 10 * best.controls.max_nats
    # the log shows the same row growing while training ran
    log = [json.loads(line) for line in (FOLDER / "log.jsonl").read_text().splitlines()]
    entry = best.entries[0].entry
    grown = [
        r["nats"]
        for e in log
        if "rows" in e
        for r in e["rows"]
        if (r["layer"], r["row"]) == (entry.site.layer, entry.row)
    ]
    assert len(grown) > 5
    assert grown[-1] > 5 * grown[0]


def test_it_writes_plain_english(patient):
    """Fluency itself is for the reader of the card; here: no loops, and words that the generator
    knows.
    """
    model, tokenizer = patient
    words = set(re.findall(r"\w+", (FOLDER.parent / "lexicon.json").read_text().lower()))
    for prompt in (
        "Once upon a time, there was a little",
        "Tom went to the park and",
        "One day, a girl named Lucy",
    ):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=60,
            do_sample=False,
            pad_token_id=0,
        )
        new = re.findall(
            r"\w+", tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        )[:-1]
        assert sum(w.lower() in words for w in new) / len(new) > 0.95
        assert len({tuple(new[i : i + 4]) for i in range(len(new) - 3)}) / (len(new) - 3) > 0.9
