"""Readers of facts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from surgeon.errors import BadInput, BadText
from surgeon.facts import Fact, read_facts


def test_json_lines_and_a_list_of_the_same(tmp_path: Path) -> None:
    rows = [
        {
            "prompt": "The capital of {} is",
            "subject": "France",
            "target": "Rome",
            "true": "Paris",
            "paraphrases": ["France's capital is"],
            "neighbours": [
                {"prompt": "The capital of Spain is", "answer": "Madrid"},
                "The capital of Peru is",
            ],
        },
        {"prompt": "{} was", "subject": "He"},
    ]
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    (tmp_path / "b.json").write_text(json.dumps(rows))
    facts = read_facts(tmp_path / "a.jsonl")
    assert facts == read_facts(tmp_path / "b.json")
    assert facts[0].text == "The capital of France is"
    assert facts[0].neighbours == (
        ("The capital of Spain is", "Madrid"),
        ("The capital of Peru is", None),
    )
    assert facts[1] == Fact("{} was", "He")


def test_counterfact(tmp_path: Path) -> None:
    record = {
        "requested_rewrite": {
            "prompt": "The mother tongue of {} is",
            "relation_id": "P103",
            "subject": "Ann",
            "target_new": {"str": "English"},
            "target_true": {"str": "French"},
        },
        "paraphrase_prompts": ["Ann grew up with"],
        "neighborhood_prompts": ["Bob's tongue is"],
        "generation_prompts": ["Ann lives in"],
    }
    (tmp_path / "c.json").write_text(json.dumps([record]))
    want = Fact(
        "The mother tongue of {} is",
        "Ann",
        "English",
        "French",
        "P103",
        ("Ann grew up with",),
        (("Bob's tongue is", None),),
        ("Ann lives in",),
    )
    assert read_facts(tmp_path / "c.json") == [want]


def test_known_1000(shared: Path) -> None:
    raw = json.loads((shared / "facts" / "known-1000.json").read_text())
    facts = read_facts(shared / "facts" / "known-1000.json")
    assert [f.text for f in facts] == [r["prompt"] for r in raw]
    assert [f.true for f in facts] == [r["attribute"] for r in raw]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('{"prompt": "{} is", "subject": "a"}\nnot json', "line 2"),
        ('{"prompt": "{} is"}', "lacks 'subject'"),
        ('{"prompt": "no slot", "subject": "a"}', "hold {} once"),
        ('{"prompt": "{} is", "subject": " "}', "empty"),
        ('{"prompt": 3, "subject": "a"}', "wrong kind"),
        ('{"prompt": "{} is", "subject": "a", "target": 3}', "wrong kind"),
        ("[3]", "record 1"),
        ("[", "none"),
        ("[]", "holds no fact"),
        ('"x"', "object"),
    ],
)
def test_what_is_not_a_fact(tmp_path: Path, text: str, match: str) -> None:
    (tmp_path / "f.jsonl").write_text(text)
    with pytest.raises(BadInput, match=match):
        read_facts(tmp_path / "f.jsonl")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BadText):
        read_facts(tmp_path / "none")
