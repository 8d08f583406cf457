"""Subject tokens by offset mapping, target tokens as they follow the prompt."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from surgeon.errors import BadInput
from surgeon.patients import FOLDER
from surgeon.subject import locate, target_ids


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.mark.parametrize("bos", ["yes", "no"])
@pytest.mark.parametrize(
    ("prompt", "subject", "prefix", "zero"),
    [
        ("The capital of {} is", "France", "", False),
        ("{} is in the state of", "Harvard University", "", True),
        ("{} is in the state of", "Harvard University", "It rained. ", False),
        ("People in {} speak", "Zürich 東京", "", False),
        ("The Eiffel Tower is in", "Eiffel Tower", "", False),
        ("'{}' is in", "Big Ben", "", False),
    ],
)
def test_the_tokens_decode_to_the_subject(
    tokenizer: PreTrainedTokenizerBase, prompt: str, subject: str, prefix: str, zero: bool, bos: str
) -> None:
    found = locate(tokenizer, prompt, subject, bos, prefix)
    assert tokenizer.decode(list(found.ids[found.start : found.stop])).strip() == subject
    assert (
        list(found.ids[int(bos == "yes") :])
        == tokenizer(found.text, add_special_tokens=False).input_ids
    )
    assert found.bos == (bos == "yes") == (found.ids[0] == tokenizer.bos_token_id)
    assert found.position_zero == zero
    assert len(found.tokens) == len(found.ids)
    assert found.last == found.stop - 1
    assert not found.warnings


def test_a_subject_that_stands_twice_is_the_one_that_is_marked(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    first = locate(tokenizer, "France is large, and France is in", "France")
    marked = locate(tokenizer, "France is large, and {} is in", "France")
    assert first.ids == marked.ids
    assert first.start < marked.start
    assert "2 times" in first.warnings[0]
    assert not marked.warnings


def test_a_token_that_is_shared_with_other_text_is_named(shared: Path) -> None:
    merging = AutoTokenizer.from_pretrained(shared / "models" / "tinystories-656k")
    found = locate(merging, "once, in {}, there was", "France")
    assert any("beside it" in w and "','" in w for w in found.warnings)
    assert found.start == locate(merging, "once, in {} there was", "France").start


@pytest.mark.parametrize(
    ("prompt", "subject", "match"),
    [
        ("The capital of {} is", "", "empty"),
        ("The capital of {} is", "  ", "empty"),
        ("The capital of {} is", " France", "white space"),
        ("no place for it", "France", "not in the prompt"),
        ("{} and {}", "France", "one place"),
    ],
)
def test_what_is_not_a_subject(
    tokenizer: PreTrainedTokenizerBase, prompt: str, subject: str, match: str
) -> None:
    with pytest.raises(BadInput, match=match):
        locate(tokenizer, prompt, subject)


@pytest.mark.parametrize(
    ("prompt", "target", "text"), [("It is", "Rome", " Rome"), ('She said "', "Rome", "Rome")]
)
def test_a_target_is_tokenised_as_it_follows(
    tokenizer: PreTrainedTokenizerBase, prompt: str, target: str, text: str
) -> None:
    ids = target_ids(tokenizer, prompt, target)
    assert tokenizer.decode(ids) == text
    assert (
        tokenizer(prompt, add_special_tokens=False).input_ids + ids
        == tokenizer(prompt + text, add_special_tokens=False).input_ids
    )
    with pytest.raises(BadInput, match="empty"):
        target_ids(tokenizer, prompt, " ")
