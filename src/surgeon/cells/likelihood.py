"""Masked likelihood: hide some values of a cell, and score what the model says about them.

A model with a head over bins gives a true log-likelihood of each hidden bin. One that only
regresses, as the published checkpoints do, gives none: its squared error is put on the scale of
nats by a Gaussian of fixed width, and compared with nothing but itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log, nan, pi
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Float32
from safetensors.torch import load, save
from torch import Tensor

from ..errors import BadInput
from .model import ScGPT
from .tokenise import CLS, Batch

STRENGTHS = (3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
RATIO = 0.4  # of the values hidden, as in the published fine-tuning


def masks(
    batch: Batch, ratio: float = RATIO, draws: int = 1, seed: int = 0
) -> Bool[Tensor, "draw cell pos"]:
    """Which values are hidden in each draw: `ratio` of each cell's genes, at least one, never <cls>
    or padding.

    Raises: BadInput for a ratio outside (0, 1) or fewer than one draw.
    """
    if not 0 < ratio < 1 or draws < 1:
        raise BadInput(
            f"{draws} draws of {ratio:g} of the values hide nothing, or everything; use a ratio"
            " between 0 and 1, and a draw."
        )
    generator = torch.Generator().manual_seed(seed)
    genes = scored(batch)
    order = (
        torch.rand((draws, *genes.shape), generator=generator)
        .masked_fill(~genes, 2.0)
        .argsort(-1)
        .argsort(-1)
    )
    return order < (genes.sum(-1) * ratio).round().clamp(min=1)[:, None]


def scored(batch: Batch) -> Bool[Tensor, "cell pos"]:
    """Where a gene stands whose value can be hidden."""
    genes = ~batch.padding
    return (
        genes & (batch.genes != batch.gene_names.index(CLS)) if CLS in batch.gene_names else genes
    )


@torch.no_grad()
def masked_nll(
    model: ScGPT, batch: Batch, masked: Bool[Tensor, "draw cell pos"]
) -> Float[Tensor, "draw cell pos"]:
    """NLL of each hidden value in nats, NaN where none is hidden; the other values of the cell are
    seen.

    Of a regressing model it is the Gaussian of `spread(n_bins)` around what it says: a squared
    error in other units, no likelihood.
    """
    found = torch.full(masked.shape, nan, dtype=torch.float32)
    device = model.encoder.enc_norm.weight.device
    for draw, hidden in enumerate(masked):
        seen = batch.values.masked_fill(hidden, model.shape.mask_value)
        output = model(batch.genes.to(device), seen.to(device), batch.padding.to(device))
        nats = (
            _of_logits(output.logits, batch.values)
            if output.logits is not None
            else _of_values(model, output.value_pred, batch.values)
        )
        found[draw] = nats.masked_fill(~hidden, nan)
    return found


def spread(n_bins: int) -> float:
    """The standard deviation of a bin that may be any: the fixed width under which a regression is
    scored.
    """
    return float((n_bins - 1) / 12**0.5)


def _of_logits(logits: Tensor, values: Tensor) -> Tensor:
    bins = (
        values.long().clamp(min=0).to(logits.device)
    )  # <cls> and padding hold no bin; they are never hidden
    return -logits.float().log_softmax(-1).gather(-1, bins[..., None]).squeeze(-1).cpu()


def _of_values(model: ScGPT, predicted: Tensor, values: Tensor) -> Tensor:
    return gaussian(predicted.float().cpu(), values, model.shape.n_bins)


def gaussian(predicted: Tensor, values: Tensor, n_bins: int) -> Tensor:
    """NLL of the values under a Gaussian of `spread(n_bins)` around what is predicted."""
    width = spread(n_bins)
    return 0.5 * ((values - predicted) / width).square() + log(width) + 0.5 * log(2 * pi)


@dataclass(frozen=True, eq=False)
class Marginal:
    """The gene-marginal baseline: how often each gene has each bin, whatever the cell.

    Shape of log_probs: (token, bin), in nats.
    """

    log_probs: Float32[Tensor, "token bin"]

    def nll(
        self, batch: Batch, masked: Bool[Tensor, "draw cell pos"], reading: str = "categorical"
    ) -> Float[Tensor, "draw cell pos"]:
        """NLL of the same values that `masked_nll` scores, NaN elsewhere.

        reading: of the model it is compared with.
        """
        if reading == "categorical":
            nats = -self.log_probs[batch.genes, batch.values.long().clamp(min=0)]
        else:
            n_bins = self.log_probs.shape[1]
            nats = gaussian(
                (self.log_probs.exp() @ torch.arange(n_bins, dtype=torch.float32))[batch.genes],
                batch.values,
                n_bins,
            )
        return nats.expand(masked.shape).masked_fill(~masked, nan)

    def to_bytes(self) -> bytes:
        return save({"log_probs": self.log_probs})

    @classmethod
    def read(cls, path: Path) -> Marginal:
        return cls(load(path.read_bytes())["log_probs"])


def fit_marginal(batch: Batch, n_tokens: int, n_bins: int, strength: float = 10.0) -> Marginal:
    """How often each gene of these cells is detected, and has each bin where it is.

    Smoothed by what holds for all genes together, which counts as 2 further cells for detection,
    and for the bin as `strength` of them.
    """
    at = scored(batch)
    counts = torch.zeros(n_tokens, n_bins, dtype=torch.float64)
    counts.index_put_(
        (batch.genes[at], batch.values[at].long()),
        torch.ones((), dtype=torch.float64),
        accumulate=True,
    )
    there = counts[:, 1:].sum(1, keepdim=True)
    share = (there.sum() + 1) / (counts.sum() + 2)
    detected = (there + 2 * share) / (counts.sum(1, keepdim=True) + 2)
    usual = (counts[:, 1:].sum(0) + 1) / (there.sum() + n_bins - 1)
    bins = (counts[:, 1:] + strength * usual) / (there + strength)
    return Marginal(torch.cat([1 - detected, detected * bins], 1).log().float())


def best_marginal(
    fit: Batch, choose: Batch, masked: Bool[Tensor, "draw cell pos"], n_tokens: int, n_bins: int
) -> Marginal:
    """The baseline fitted on some cells, with the smoothing that suits the hidden values of others
    best: no straw man.
    """
    tried = [fit_marginal(fit, n_tokens, n_bins, strength) for strength in STRENGTHS]
    return min(tried, key=lambda m: float(m.nll(choose, masked).nanmean()))
