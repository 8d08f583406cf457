"""What each predicted token of a corpus is: its text, its word, its frequency, its document."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from math import log

from transformers import PreTrainedTokenizerBase

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
    """Where the documents of a text begin, what they are called, and the rule that found them.

    starts: in characters, ascending.
    """

    starts: list[int]
    names: list[str]
    rule: str

    def at(self, character: int) -> int:
        """The document that a character of the text belongs to, as an index."""
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
    """Documents by their titles as WikiText writes them if there are at least two, else by gaps.

    A gap is a blank line. What stands before the first title belongs to the first document.

    >>> split_documents("The first one.\\n\\nAnd the second.").names
    ['The first one.', 'And the second.']
    """
    titles = list(_TITLE.finditer(text))
    if len(titles) > 1:
        names = [title.group().strip(" =") for title in titles]
        return Documents([title.start() for title in titles], names, TITLES)
    gaps = [gap.end() for gap in _GAP.finditer(text) if gap.end() < len(text)]
    starts = [0, *gaps]
    names = []
    for start, stop in pairwise([*starts, len(text)]):
        one_line = " ".join(text[start:stop].split())
        names.append(one_line[:_NAME_CHARS])
    return Documents(starts, names, GAPS)


def frequency_class(count: int) -> int:
    """0 for 1-3 occurrences, 1 for 4-15, 2 for 16-63, ...

    >>> [frequency_class(count) for count in (1, 3, 4, 16)]
    [0, 0, 1, 2]
    """
    # half an occurrence more, so that rounding of the logarithm cannot miss a power of four
    return int(log(max(count, 1) + 0.5, CLASS_BASE))


def class_name(index: int) -> str:
    """The occurrences of a frequency class, as in "4-15"."""
    return f"{CLASS_BASE**index}-{CLASS_BASE ** (index + 1) - 1}"


def label_tokens(tokenizer: PreTrainedTokenizerBase, text: str, corpus: Corpus) -> Tokens:
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
    ids: list[int] = encoded.input_ids
    n, width = corpus.windows.shape
    step = width - corpus.bos  # tokens of the text in one window
    of_windows = ids[: n * step]
    if of_windows != corpus.windows[:, int(corpus.bos) :].flatten().tolist():
        raise BadInput(
            f"the windows of {corpus.name} were not cut from the text that came with them; give the"
            " text they were made of."
        )
    pieces = _pieces(tokenizer, of_windows)
    words = _words(pieces)
    source = split_documents(text)
    word_counts = Counter(word.casefold() for word in _WORD.findall(text))
    token_counts = Counter(ids)

    def count(i: int) -> int:
        if _WORD.search(words[i]):
            # a word that decodes to something else than it is in the text counts as rare
            return word_counts.get(words[i], 1)
        return token_counts[ids[i]]  # punctuation is counted as a token

    def context(i: int) -> str:
        window_start = i - i % step
        return "".join(pieces[max(window_start, i - CONTEXT_TOKENS) : i])

    # without BOS the first token of a window is not predicted
    first = int(not corpus.bos)
    at = [i for i in range(n * step) if i % step >= first]
    return Tokens(
        ids=[ids[i] for i in at],
        windows=[i // step for i in at],
        positions=[i % step + corpus.bos for i in at],
        texts=[pieces[i] for i in at],
        words=[words[i] for i in at],
        counts=[count(i) for i in at],
        token_counts=[token_counts[ids[i]] for i in at],
        contexts=[context(i) for i in at],
        documents=[source.at(encoded.offset_mapping[i][1] - 1) for i in at],
        source=source,
    )


def _pieces(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """The text that each token adds.

    A lone token may lose its space, so each is decoded behind the one before it.
    """

    def decode(some: list[int]) -> str:
        return str(tokenizer.decode(some, clean_up_tokenization_spaces=False))

    pieces = [decode(ids[:1])]
    for before, own in pairwise(ids):
        both = decode([before, own])
        pieces.append(both[len(decode([before])) :])
    return pieces


def _words(pieces: list[str]) -> list[str]:
    """The word in which each token's first letter or digit stands; else the token itself."""
    spans = list(_WORD.finditer("".join(pieces)))
    ends = [span.end() for span in spans]
    words = []
    begin = 0
    for piece in pieces:
        inside = _WORD.search(piece)
        word = piece.strip()
        if inside:
            word = spans[bisect_right(ends, begin + inside.start())].group()
        words.append(word.casefold())
        begin += len(piece)
    return words
