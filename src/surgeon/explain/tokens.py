"""What each predicted token of a corpus is: its text, the word it is part of, how frequent that is,
the document it stands in.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from math import log

import torch
import transformers

from ..corpus import Corpus
from ..errors import BadInput

_TITLE = re.compile(r"^ ?= [^=\s].* = *$", re.MULTILINE)
_GAP = re.compile(r"\n[ \t]*\n\s*")
_WORD = re.compile(r"\w+")
TITLES = "a document begins at a line of the form ` = Title = `"
GAPS = "a document begins after a blank line"
CONTEXT_TOKENS = 8
CLASS_BASE = 4  # a frequency class spans a factor of four: 1-3, 4-15, 16-63, ...
_NAME_CHARS = 40


@dataclass(frozen=True)
class Documents:
    """Where the documents of a text begin (characters, ascending), what they are called, and the
    rule that found them.
    """

    starts: list[int]
    names: list[str]
    rule: str

    def at(self, character: int) -> int:
        return max(0, bisect_right(self.starts, character) - 1)


@dataclass(frozen=True)
class Tokens:
    """One element for each predicted token, window by window, first to last.

    windows, positions: where it stands (position in the window, at least 1). texts: its own text.
    words: the word it is part of, in lower case; punctuation stands for itself, white space is "".
    counts: how often that word occurs in the whole text. token_counts: the same of the token's id.
    contexts: the text of up to 8 tokens before it. documents: an index into `source.names`.
    """

    ids: list[int]
    windows: list[int]
    positions: list[int]
    texts: list[str]
    words: list[str]
    counts: list[int]
    token_counts: list[int]
    contexts: list[str]
    documents: list[int]
    source: Documents


def split_documents(text: str) -> Documents:
    """Documents by their titles as WikiText writes them if there are at least two, else by blank
    lines.

    What stands before the first title belongs to the first document.
    """
    titles = list(_TITLE.finditer(text))
    if len(titles) > 1:
        return Documents(
            [t.start() for t in titles], [t.group().strip(" =") for t in titles], TITLES
        )
    starts = [0, *(gap.end() for gap in _GAP.finditer(text) if gap.end() < len(text))]
    names = [" ".join(text[a:b].split())[:_NAME_CHARS] for a, b in pairwise([*starts, len(text)])]
    return Documents(starts, names, GAPS)


def frequency_class(count: int) -> int:
    """0 for 1-3 occurrences, 1 for 4-15, 2 for 16-63, ..."""
    # the half keeps rounding from putting a power of the base into the class below
    return int(log(max(count, 1) + 0.5, CLASS_BASE))


def class_name(index: int) -> str:
    return f"{CLASS_BASE**index}-{CLASS_BASE ** (index + 1) - 1}"


def label_tokens(
    tokenizer: transformers.PreTrainedTokenizerBase, text: str, corpus: Corpus
) -> Tokens:
    """Label the predicted tokens of `corpus`, which was cut from `text`.

    Texts and words come from decoding, since some tokenizers' offsets are off by a few characters;
    offsets only choose the document.
    Raises: BadInput for a tokenizer without offsets, or if the corpus was not cut from this text.
    """
    if not tokenizer.is_fast:
        raise BadInput(
            "this tokenizer has no offsets (it is not a fast one), so tokens cannot be told apart"
            " by document."
        )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    n, width = corpus.windows.shape
    step = width - corpus.bos
    ids: list[int] = encoded.input_ids
    if ids[: n * step] != corpus.windows[:, int(corpus.bos) :].flatten().tolist():
        raise BadInput(
            f"the windows of {corpus.name} were not cut from the text that came with them; give the"
            " text they were made of."
        )
    pieces = _pieces(tokenizer, ids[: n * step])
    words = _words(pieces)
    source = split_documents(text)
    counts = Counter(w.casefold() for w in _WORD.findall(text))
    token_counts = Counter(ids)
    # without BOS the first token of a window is not predicted
    at = torch.arange(n * step).view(n, step)[:, int(not corpus.bos) :].flatten().tolist()
    return Tokens(
        ids=[ids[i] for i in at],
        windows=[i // step for i in at],
        positions=[i % step + corpus.bos for i in at],
        texts=[pieces[i] for i in at],
        words=[words[i] for i in at],
        # punctuation is counted as a token; a word that decodes to something else than it is in the
        # text counts as rare
        counts=[
            counts.get(words[i], 1) if _WORD.search(words[i]) else token_counts[ids[i]] for i in at
        ],
        token_counts=[token_counts[ids[i]] for i in at],
        contexts=["".join(pieces[max(i - i % step, i - CONTEXT_TOKENS) : i]) for i in at],
        # by its last character, since a token may begin with the line break before its word
        documents=[source.at(encoded.offset_mapping[i][1] - 1) for i in at],
        source=source,
    )


def _pieces(tokenizer: transformers.PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """The text that each token adds.

    A lone token may lose its space, so each is decoded behind the one before it.
    """

    def decode(some: list[int]) -> str:
        return str(tokenizer.decode(some, clean_up_tokenization_spaces=False))

    return [decode(ids[:1])] + [decode([a, b])[len(decode([a])) :] for a, b in pairwise(ids)]


def _words(pieces: list[str]) -> list[str]:
    """The word in which each token's first letter or digit stands; what has none stands for
    itself.
    """
    spans = list(_WORD.finditer("".join(pieces)))
    ends = [span.end() for span in spans]
    words = []
    begin = 0
    for piece in pieces:
        inside = _WORD.search(piece)
        words.append(
            (
                spans[bisect_right(ends, begin + inside.start())].group()
                if inside
                else piece.strip()
            ).casefold()
        )
        begin += len(piece)
    return words
