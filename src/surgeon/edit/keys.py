"""Prompts as one batch, and what reaches `mlp.down` at the subject's last token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from ..anatomy import Anatomy, Site
from ..errors import BadInput
from ..subject import SubjectPrompt
from ..tap import Tap, by_position

ROWS = 64  # prompts in one pass


@dataclass(frozen=True, eq=False)
class PromptBatch:
    """Prompts padded on the right. Shapes: ids (batch, pos); last (batch,) position of the
    subject's last token; length (batch,).

    The model is causal, so what stands on the right of a position does not change it and no mask is
    needed.
    """

    ids: Int64[Tensor, "batch pos"]
    last: Int64[Tensor, " batch"]
    length: Int64[Tensor, " batch"]

    @classmethod
    def of(
        cls, prompts: Sequence[SubjectPrompt], tails: Sequence[Sequence[int]] | None = None
    ) -> PromptBatch:
        """The prompts, each with the ids of its tail behind it."""
        rows = [
            [*p.ids, *tail] for p, tail in zip(prompts, tails or [()] * len(prompts), strict=True)
        ]
        width = max(map(len, rows))
        ids = torch.tensor([row + [row[-1]] * (width - len(row)) for row in rows])
        return cls(
            ids, torch.tensor([p.last for p in prompts]), torch.tensor([len(row) for row in rows])
        )

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, chosen: Tensor) -> PromptBatch:
        return PromptBatch(self.ids[chosen], self.last[chosen], self.length[chosen])


def dense_down(anatomy: Anatomy, layer: int) -> Site:
    """The `mlp.down` of a layer.

    Raises: BadInput for a layer that is not there, or one whose MLP is a mixture of experts.
    """
    n = len(anatomy.layers)
    if not 0 <= layer < n:
        raise BadInput(f"layer {layer} does not exist: this model has {n} layers, 0 to {n - 1}.")
    dense = [s for s in anatomy.downs(layer) if s.expert is None]
    if len(dense) != 1 or not isinstance(anatomy.module(dense[0]), (torch.nn.Linear, Conv1D)):
        others = [i for i in range(n) if any(s.expert is None for s in anatomy.downs(i))]
        raise BadInput(
            f"the MLP of layer {layer} is a mixture of experts, where a subject has no single key;"
            " choose a dense layer"
            + (f" ({', '.join(map(str, others))})." if others else "; this model has none.")
        )
    return dense[0]


@torch.no_grad()
def keys_at(
    anatomy: Anatomy, batch: PromptBatch, layers: Sequence[int]
) -> dict[int, Float[Tensor, "batch d_mlp"]]:
    """For each layer, what enters `mlp.down` at the subject's last token, in float32 (float64
    stays), on the CPU.

    One pass that ends after the last of the layers.
    """
    keys: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    device = next(anatomy.model.parameters()).device
    for start in range(0, len(batch), ROWS):
        rows = batch.rows(torch.arange(len(batch))[start : start + ROWS])
        with Tap() as tap:
            for layer in layers:
                tap.on_input(
                    anatomy.module(dense_down(anatomy, layer)),
                    partial(_keep, keys[layer], rows.last),
                )
            tap.stop_after(anatomy.layers[max(layers)])
            tap.run(anatomy.model, input_ids=rows.ids.to(device), use_cache=False)
    return {layer: torch.cat(parts) for layer, parts in keys.items()}


def _keep(keys: list[Tensor], at: Tensor, x: Tensor) -> None:
    here = by_position(x, len(at))[torch.arange(len(at), device=x.device), at.to(x.device)]
    keys.append(here.to("cpu", torch.float64 if x.dtype == torch.float64 else torch.float32))
