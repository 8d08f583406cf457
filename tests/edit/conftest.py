"""The patient, and what its edits share, prepared once."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerBase

from surgeon.anatomy import Anatomy, load_model
from surgeon.edit import Preparation, PrepareConfig


@pytest.fixture(scope="session")
def patient() -> tuple[Anatomy, PreTrainedTokenizerBase]:
    loaded = load_model("patient")
    assert loaded.tokenizer is not None
    return Anatomy.of(loaded.model), loaded.tokenizer


@pytest.fixture(scope="session")
def preparation(patient: tuple[Anatomy, PreTrainedTokenizerBase]) -> Preparation:
    return Preparation(*patient, PrepareConfig())
