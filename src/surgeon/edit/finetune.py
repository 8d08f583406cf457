"""FT-M: fine-tune the matrix on the target's tokens alone; the baseline of the editors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..anatomy import Anatomy, Site
from ..errors import BadInput
from ..patch.deltas import wide
from .value import Request, frozen


@dataclass(frozen=True)
class FineTuneConfig:
    """Settings of the fine-tuning."""

    steps: int = field(default=60, metadata={"help": "most steps"})
    lr: float = field(
        default=0.05, metadata={"help": "learning rate, as a share of the RMS weight"}
    )
    stop: float = field(
        default=0.98,
        metadata={"help": "end when every target has this probability at the bare prompt"},
    )

    def __post_init__(self) -> None:
        if self.steps < 1 or self.lr <= 0 or not 0 < self.stop < 1:
            raise BadInput(
                "fine-tuning needs at least 1 step, a learning rate above 0, and a stop between 0"
                " and 1."
            )


def fine_tune(
    anatomy: Anatomy,
    site: Site,
    requests: Sequence[Request],
    config: FineTuneConfig = FineTuneConfig(),
) -> Float[Tensor, "out in"]:
    """The matrix after Adam on the cross-entropy of the targets' tokens at the bare prompts, the
    prompts' own tokens masked.

    The model is left as it was. Source: Zhang et al. 2024, arXiv:2401.01286, FT-M; without
    contexts, as there.
    """
    view = anatomy.view(site)
    parameter = anatomy.model.get_parameter(anatomy.addresses[site].parameter)
    before = view.read().clone()
    rows = [[*r.bare.ids, *r.targets[0]] for r in requests]
    width = max(map(len, rows))
    ids = torch.tensor(
        [row + [row[-1]] * (width - len(row)) for row in rows], device=parameter.device
    )
    labels = torch.full_like(ids, -100)
    for i, request in enumerate(requests):
        start = len(request.bare.ids)
        labels[i, start : start + len(request.targets[0])] = torch.tensor(request.targets[0])
    matrix = before.to(wide(before.dtype), copy=True)
    scale = float(matrix.pow(2).mean().sqrt())
    moment, square = torch.zeros_like(matrix), torch.zeros_like(matrix)
    n_out, n_in = matrix.shape
    every = torch.arange(n_out).repeat_interleave(n_in), torch.arange(n_in).repeat(n_out)
    positions = view.positions(*every)
    try:
        with frozen(anatomy.model):
            for step in range(1, config.steps + 1):
                parameter.requires_grad_(True)
                logits = anatomy.model(input_ids=ids, use_cache=False).logits[:, :-1].float()
                losses = F.cross_entropy(
                    logits.flatten(0, 1),
                    labels[:, 1:].flatten(),
                    ignore_index=-100,
                    reduction="none",
                )
                per_row = losses.view(len(rows), -1).sum(1) / (labels[:, 1:] >= 0).sum(1)
                if float((-per_row.detach()).exp().min()) >= config.stop:
                    break
                (gradient,) = torch.autograd.grad(per_row.mean(), parameter)
                parameter.requires_grad_(False)
                gradient = gradient.flatten()[positions].view(n_out, n_in).to(matrix)
                moment.lerp_(gradient, 0.1)
                square.lerp_(gradient**2, 0.001)
                stride = (moment / (1 - 0.9**step)) / ((square / (1 - 0.999**step)).sqrt() + 1e-12)
                matrix -= config.lr * scale * stride
                view.assign_(matrix)
        return view.read().clone()
    finally:
        parameter.requires_grad_(False)
        view.assign_(before)
