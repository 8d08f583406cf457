"""A model that reads its own tokens: each call gives it only the new ones, if it keeps keys and
values of the earlier ones.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

# what transformers calls the kept keys and values in a model's output and among its arguments: from
# 5.24 on, and before
CACHE_NAMES = ("cache", "past_key_values")


class Decoder:
    """The logits of the next token, after all the tokens read so far.

    Not to be used for two texts.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._device = next(model.parameters()).device
        self._cache: dict[str, Any] = {}
        self._unread: Tensor | None = None  # tokens that no cache holds

    def read(self, ids: Int64[Tensor, "batch pos"]) -> Float[Tensor, "batch d_vocab"]:
        """Read further tokens (batch, pos), and give the logits (batch, d_vocab) of the one that
        follows, in float32.
        """
        ids = ids.to(self._device)
        step = ids if self._unread is None else torch.cat([self._unread, ids], 1)
        output = self.model(input_ids=step, **self._cache, use_cache=True)
        # the name is read off the output: it is the one that this model's forward takes, whatever
        # wraps it
        name = next((name for name in CACHE_NAMES if name in list(output)), None)
        self._cache = {} if name is None else {name: output[name]}
        self._unread = step if name is None else None
        logits: Tensor = output["logits"]
        return logits[:, -1].float()
