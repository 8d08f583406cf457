"""Which other places an edit touches: its output change at thousands of keys in one product, and
the loudest seen in the model itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from jaxtyping import Float64, Int64
from torch import Tensor

from ..anatomy import Anatomy, Site
from ..measure.likelihood import batches, logits_of
from ..patch import Patch
from ..patch.deltas import LowRankDelta
from ..result import record
from ..tap import Tap, by_position
from .preflight import Factors

CONTEXT = 12  # tokens shown before a place


@record
class Touched:
    """A token of some text that an edit touches. change: |D k| over the usual size of what the
    matrix writes, largest over its matrices; kl: KL(before || after) of the next token there, in
    nats, by forward passes.
    """

    window: int
    position: int
    context: str
    token: str
    change: float
    kl: float


@record
class Radar:
    """`touched`: the places that change most, in that order. median, largest: of the change over
    all `keys`; median_kl: of all positions in the windows of the touched places.
    """

    keys: int
    median: float
    largest: float
    median_kl: float
    touched: list[Touched]


def output_change(keys: Float64[Tensor, "n in"], factors: Factors) -> Float64[Tensor, " n"]:
    """|D k| for each key.

    For one fact with one key it is |r| |k' C^-1 n| / (k' C^-1 k). Source: follows from Meng et al.
    2022, eq. 2.
    """
    left, right = factors
    written = keys @ right.T
    change: Tensor = ((written @ (left.T @ left)) * written).sum(1).clamp_min(0).sqrt()
    return change


def ranked(change: Float64[Tensor, " n"], top: int) -> list[int]:
    """The keys that change most, as indices."""
    return [int(i) for i in torch.argsort(change, descending=True, stable=True)[:top]]


@torch.no_grad()
def radar(
    anatomy: Anatomy,
    tokenizer: transformers.PreTrainedTokenizerBase,
    patch: Patch,
    windows: Int64[Tensor, "n window"],
    top: int = 10,
) -> Radar:
    """Rank every token of `windows` by what the patch changes there, and run the model at the `top`
    of them, without the patch and with it.

    The model is left as it was.
    """
    by_site = [_relative(anatomy, site, patch, windows) for site in patch.sites]
    changes = torch.stack(by_site).amax(0)
    places = ranked(changes, top)
    width = windows.shape[1]
    chosen = sorted({place // width for place in places})
    before = _predictions(anatomy, windows[chosen])
    with patch.applied(anatomy):
        after = _predictions(anatomy, windows[chosen])
    kl = (before.exp() * (before - after)).sum(-1)
    touched = []
    for place in places:
        window, position = divmod(place, width)
        row = windows[window].tolist()
        touched.append(
            Touched(
                window,
                position,
                str(tokenizer.decode(row[max(0, position - CONTEXT) : position])),
                str(tokenizer.decode([row[position]])),
                float(changes[place]),
                float(kl[chosen.index(window), position]),
            )
        )
    return Radar(
        len(changes), float(changes.median()), float(changes.max()), float(kl.median()), touched
    )


def _predictions(anatomy: Anatomy, windows: Tensor) -> Tensor:
    """Log-probabilities of the next token (window, pos, d_vocab)."""
    logits = [logits_of(anatomy.model, ids).float() for ids in batches(windows)]
    return torch.cat([F.log_softmax(part, -1).cpu() for part in logits])


def _relative(
    anatomy: Anatomy, site: Site, patch: Patch, windows: Tensor
) -> Float64[Tensor, " tokens"]:
    """|D k| / sqrt(E|W k|^2) at every token, window by window."""
    weight = anatomy.view(site).read().double().cpu()
    factors = _factors(weight, patch, site)
    device = next(anatomy.model.parameters()).device
    changes: list[Tensor] = []
    usual: list[Tensor] = []

    def see(batch: int, x: Tensor) -> None:
        keys = by_position(x, batch).flatten(0, 1).double().cpu()
        changes.append(output_change(keys, factors))
        usual.append((keys @ weight.T).pow(2).sum(1))

    for ids in batches(windows):
        with Tap() as tap:
            tap.on_input(anatomy.module(site), partial(see, len(ids)))
            tap.stop_after(anatomy.layers[int(site.layer or 0)])
            tap.run(anatomy.model, input_ids=ids.to(device), use_cache=False)
    return torch.cat(changes) / torch.cat(usual).mean().sqrt()


def _factors(weight: Float64[Tensor, "out in"], patch: Patch, site: Site) -> Factors:
    deltas: Sequence[Any] = patch.on(site)
    if all(isinstance(d, LowRankDelta) for d in deltas):
        return torch.cat([d.left.double() for d in deltas], 1), torch.cat(
            [d.right.double() for d in deltas]
        )
    after = weight.clone()
    for delta in deltas:
        delta.apply_(after)
    return after - weight, torch.eye(weight.shape[1], dtype=torch.float64)
