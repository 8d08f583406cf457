"""Text in, tokens out: fixed windows with the BOS policy recorded.

A text is tokenised once without special tokens and cut into disjoint windows. Each begins with BOS
if the policy says so, and the incomplete tail is dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from jaxtyping import Int64
from torch import Tensor

from .errors import BadInput, BadText
from .result import CorpusRecord

BOS_POLICIES = ("auto", "yes", "no")
DEFAULT_WINDOW = 256


@dataclass(frozen=True)
class Corpus:
    """Windows of one text.

    Shapes: windows (n, window), token ids. bos: whether each window begins with BOS.
    """

    name: str
    windows: Int64[Tensor, "n window"]
    bos: bool

    @property
    def predicted(self) -> int:
        """How many tokens the NLL is a mean over: all but the first of each window."""
        n, width = self.windows.shape
        return n * (width - 1)

    def record(self) -> CorpusRecord:
        """What a result says of its text."""
        n, width = self.windows.shape
        return CorpusRecord(self.name, self.predicted, self.bos, n, width)


def bos_ids(tokenizer: transformers.PreTrainedTokenizerBase, policy: str = "auto") -> list[int]:
    """[BOS] or [], by the policy: "yes", "no", or "auto", which is what the tokenizer does itself.

    Raises: BadInput for an unknown policy, or "yes" where the tokenizer has no BOS token.

    >>> import surgeon
    >>> tokenizer = surgeon.load_model("patient").tokenizer
    >>> bos_ids(tokenizer, "auto"), bos_ids(tokenizer, "no")
    ([0], [])
    """
    if policy not in BOS_POLICIES:
        raise BadInput(f"‹bos› {policy} is not known; use {', '.join(BOS_POLICIES)}.")
    if policy == "no":
        return []
    bos = tokenizer.bos_token_id
    if policy == "yes":
        if bos is None:
            raise BadInput(
                "‹bos› yes was asked for, but this tokenizer has no BOS token; use ‹bos› no."
            )
        return [bos]
    # read off the ids: the setting `add_bos_token` is wrong for many tokenizers, and whether BOS
    # is there changes what is measured
    adds_bos = bos is not None and tokenizer("a").input_ids[:1] == [bos]
    return [bos] if adds_bos else []


def prompt_ids(
    tokenizer: transformers.PreTrainedTokenizerBase, prompt: str, policy: str = "auto"
) -> Int64[Tensor, "1 pos"]:
    """One prompt as ids (1, pos) under the BOS policy. Raises: BadInput if it is empty."""
    ids = bos_ids(tokenizer, policy) + tokenizer(prompt, add_special_tokens=False).input_ids
    if not ids:
        raise BadInput(
            "the prompt is empty and this tokenizer prepends no BOS; give at least one token."
        )
    return torch.tensor([ids])


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file. Raises: BadText for a missing, binary or empty one."""
    path = Path(path)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise BadText(f"the text {path} cannot be read: {error.strerror}.") from error
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadText(
            f"{path} is not UTF-8: byte {error.start} is {raw[error.start]:#04x}; save it as UTF-8."
        ) from error
    if "\0" in text:
        at = text.index("\0")
        raise BadText(f"{path} has a NUL byte at character {at}; it is not plain text.")
    if not text.strip():
        raise BadText(f"{path} is empty; an evaluation text needs at least one window of tokens.")
    return text


def load_corpus(
    tokenizer: transformers.PreTrainedTokenizerBase,
    text: str,
    name: str,
    window: int = DEFAULT_WINDOW,
    windows: int | None = None,
    bos: str = "auto",
) -> Corpus:
    """Cut `text` into disjoint windows of `window` tokens, BOS included; keep the first `windows`.

    Raises: BadText if there is not even one whole window; BadInput for a window under 2 tokens or
    a count under 1.

    >>> import surgeon
    >>> tokenizer = surgeon.load_model("patient").tokenizer
    >>> corpus = load_corpus(tokenizer, "The sea is blue. " * 20, "the sea", window=8, windows=3)
    >>> corpus.windows.shape, corpus.predicted, corpus.bos
    (torch.Size([3, 8]), 21, True)
    """
    if window < 2:
        raise BadInput(f"‹window› {window} leaves nothing to predict; use at least 2.")
    if windows is not None and windows < 1:
        raise BadInput(f"‹windows› {windows} leaves no text; use at least 1.")
    head = bos_ids(tokenizer, bos)
    # some tokenizers warn that the text is longer than the model reads; it is cut into windows here
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    step = window - len(head)
    starts = range(0, len(ids) - step + 1, step)[:windows]
    if not starts:
        raise BadText(
            f"{name} has {len(ids)} tokens, less than one window of {step};"
            " give a longer text or a smaller ‹window›."
        )
    rows = [head + ids[start : start + step] for start in starts]
    return Corpus(name, torch.tensor(rows), bool(head))
