"""FT-M: fine-tune the matrix on the target's tokens alone; the baseline of the editors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..anatomy import Anatomy, Site
from ..patch.deltas import wide
from ..settings import setting
from .adam import Adam
from .value import Request, frozen

MASKED = -100  # the label of a position that is not asked for


@dataclass(frozen=True)
class FineTuneConfig:
    """Settings of the fine-tuning."""

    steps: int = setting(60, "most steps", low=1, group="Fine-tuning")
    lr: float = setting(
        0.05, "learning rate, as a share of the RMS weight", above=0, group="Fine-tuning"
    )
    stop: float = setting(
        0.98,
        "end when every target has this probability at the bare prompt",
        above=0,
        below=1,
        group="Fine-tuning",
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
    ids, labels = _batch(requests, parameter.device)
    matrix = before.to(wide(before.dtype), copy=True)
    size = float(matrix.pow(2).mean().sqrt())
    # gradients of single weights are small, and a larger eps would shorten their steps
    adam = Adam(matrix, eps=1e-12)
    n_out, n_in = matrix.shape
    every = torch.arange(n_out).repeat_interleave(n_in), torch.arange(n_in).repeat(n_out)
    positions = view.positions(*every)  # of the matrix, row by row, in the parameter
    try:
        with frozen(anatomy.model):
            for _ in range(config.steps):
                parameter.requires_grad_(True)
                losses = _losses(anatomy, ids, labels)
                if float((-losses.detach()).exp().min()) >= config.stop:
                    break
                (gradient,) = torch.autograd.grad(losses.mean(), parameter)
                parameter.requires_grad_(False)  # torch writes to no leaf that takes gradients
                gradient = gradient.flatten()[positions].view(n_out, n_in).to(matrix)
                matrix -= config.lr * size * adam.stride(gradient)
                view.assign_(matrix)
        return view.read().clone()
    finally:
        parameter.requires_grad_(False)
        view.assign_(before)


def _batch(requests: Sequence[Request], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and labels (request, pos) of the bare prompts with their targets; all but the targets'
    tokens is masked.
    """
    rows = [[*r.bare.ids, *r.targets[0]] for r in requests]
    width = max(map(len, rows))
    ids = torch.tensor([row + [row[-1]] * (width - len(row)) for row in rows], device=device)
    labels = torch.full_like(ids, MASKED)
    for i, request in enumerate(requests):
        start = len(request.bare.ids)
        labels[i, start : start + len(request.targets[0])] = torch.tensor(request.targets[0])
    return ids, labels


def _losses(anatomy: Anatomy, ids: Tensor, labels: Tensor) -> Float[Tensor, " request"]:
    """The mean cross-entropy of each target's tokens."""
    logits = anatomy.model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    wanted = labels[:, 1:]
    losses = F.cross_entropy(
        logits.flatten(0, 1), wanted.flatten(), ignore_index=MASKED, reduction="none"
    )
    per_request: Tensor = losses.view(len(ids), -1).sum(1) / (wanted != MASKED).sum(1)
    return per_request
