"""A tiny model with a tokenizer of its own and a text of three titled documents, one of them about
the sea, full of markup.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from tiny import tiny_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from surgeon.anatomy import Anatomy
from surgeon.corpus import Corpus, load_corpus

SEA = "the crab saw the sea . a fish in the sea , a crab on the stone"
LAND = "the cat saw the house . a dog in the garden , a fox on the road"
HOSTILE = "[red] the [/red] \x1b[2J <script> of [link=file:///x] the dog [/"
TITLES = ["The Sea", "[bold]Land[/bold] \x1b[31m", "More Sea"]
TEXT = "".join(
    f" = {title} = \n\n {body} \n\n"
    for title, body in zip(
        TITLES, (f"{SEA} " * 3, f"{LAND} {HOSTILE} " * 3, f"{LAND} {SEA} " * 2), strict=True
    )
)


def make_tokenizer(prepends: bool) -> PreTrainedTokenizerFast:
    """One token a piece between spaces; it prepends <s> by itself, or not."""
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    words = sorted(set(TEXT.split()))
    core = Tokenizer(
        WordLevel({word: i for i, word in enumerate(special + words)}, unk_token="<unk>")
    )
    core.pre_tokenizer = WhitespaceSplit()
    if prepends:
        core.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


class Case(NamedTuple):
    anatomy: Anatomy
    tokenizer: PreTrainedTokenizerFast
    corpus: Corpus


@pytest.fixture(params=[True, False], ids=["bos", "no-bos"])
def case(request: pytest.FixtureRequest) -> Case:
    tokenizer = make_tokenizer(request.param)
    return Case(
        Anatomy.of(tiny_model("llama")), tokenizer, load_corpus(tokenizer, TEXT, "three", 16)
    )


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("explain") / "model"
    model = tiny_model("llama")
    with torch.no_grad():  # most likely next: markup
        model.get_output_embeddings().weight[make_tokenizer(True).get_vocab()["[/red]"]] *= 4
    model.save_pretrained(path)
    make_tokenizer(True).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("explain-text") / "three.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path
