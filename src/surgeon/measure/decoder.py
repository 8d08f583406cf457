"""A model that reads its own tokens, each call only the new ones."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

# what transformers calls the kept keys and values, in a model's output and among its arguments:
# from 5.24 on, and before
CACHE_NAMES = ("cache", "past_key_values")


class Decoder:
    """The logits of the next token, after all the tokens read so far; for one text only.

    A model that keeps no keys and values is given all tokens anew in each call.

    >>> import surgeon
    >>> decoder = Decoder(surgeon.load_model("patient").model)
    >>> decoder.read(torch.tensor([[0, 17, 42]])).shape, decoder.read(torch.tensor([[7]])).shape
    (torch.Size([1, 4096]), torch.Size([1, 4096]))
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._device = next(model.parameters()).device
        self._cache: dict[str, Any] = {}
        self._unread: Tensor | None = None  # tokens that no cache holds

    def read(self, ids: Int64[Tensor, "batch pos"]) -> Float[Tensor, "batch d_vocab"]:
        """Read further tokens (batch, pos), and give the logits of the one that follows.

        Shapes: logits (batch, d_vocab), in float32.
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
