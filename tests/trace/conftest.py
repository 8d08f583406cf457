"""A tokenizer that every tiny model can read, and the patient."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from surgeon.anatomy import Anatomy, load_model

WORDS = [
    "the",
    "capital",
    "of",
    "is",
    "in",
    "a",
    "city",
    "Zürich",
    "東京",
    "red",
    "green",
    "blue",
    "New",
    "York",
    "Old",
    "Town",
    "and",
]


@pytest.fixture(scope="session")
def words() -> PreTrainedTokenizerBase:
    """One token a word, after BOS."""
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    core = Tokenizer(
        WordLevel({word: i for i, word in enumerate(special + WORDS)}, unk_token="<unk>")
    )
    core.pre_tokenizer = WhitespaceSplit()
    core.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
    )


@pytest.fixture(scope="session")
def patient() -> tuple[Anatomy, PreTrainedTokenizerBase]:
    loaded = load_model("patient")
    assert loaded.tokenizer is not None
    return Anatomy.of(loaded.model), loaded.tokenizer
