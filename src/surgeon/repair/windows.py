"""The windows of a repair: to fit it, to choose its settings, to judge it."""

from __future__ import annotations

import torch
from jaxtyping import Int64
from torch import Tensor

from ..corpus import Corpus
from ..errors import BadInput

CHOOSE, JUDGE = 24, 40  # at most so many windows choose among candidates, and judge the result


def split(corpus: Corpus) -> tuple[Tensor, Tensor, Tensor]:
    """Windows to fit, to choose and to judge; contiguous, so that few documents are in two of
    them.

    Raises: BadInput for fewer than 5 windows.
    """
    n = len(corpus.windows)
    choose, judge = min(CHOOSE, n // 5), min(JUDGE, n // 4)
    if not choose or not judge:
        raise BadInput(
            f"{corpus.name} has {n} windows, and a repair needs 5: to make it, to choose, to judge;"
            " give more text or a smaller ‹window›."
        )
    fit, chosen, judged = torch.split(corpus.windows, [n - choose - judge, choose, judge])
    return fit, chosen, judged


def recut(windows: Int64[Tensor, "n window"], bos: bool, length: int) -> Int64[Tensor, "m length"]:
    """The same text in windows of `length` tokens, each beginning with BOS if these do; nothing is
    padded.

    Raises: BadInput for less text than one window.
    """
    head = int(bos)
    tokens, step = windows[:, head:].flatten(), length - head
    if step < 1 or len(tokens) < step:
        raise BadInput(
            f"the text to train on has {len(tokens)} tokens, less than one window of {length}; give"
            " more text."
        )
    rows = tokens[: len(tokens) // step * step].view(-1, step)
    begin = windows[:1, :head].expand(len(rows), head)
    return torch.cat([begin, rows], 1)
