"""Masked likelihood: hide some values of a cell, and score what the model says about them.

A model with a head over bins gives a true log-likelihood of each hidden bin. One that only
regresses, as the published checkpoints do, gives none: its squared error is put on the scale of
nats by a Gaussian of fixed width, and compared with nothing but itself.

`MaskedNLL` is how everything here measures damage: fixed cells, tokenised once, and fixed masks, so
that the intact and the broken model are asked the same. Means are over the hidden values of a cell
first, then over cells. States that enter a layer are kept, so that a change further up does not
compute the layers below again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from math import log, nan, pi
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Float32, Float64
from safetensors.torch import load, save
from torch import Tensor

from ..anatomy import Anatomy, Region
from ..errors import BadInput
from ..patch import injured
from ..tap import LayerInput, Tap, resume
from .model import ScGPT
from .tokenise import Batch

Values = Float[Tensor, "draw cell pos"]
Masks = Bool[Tensor, "draw cell pos"]

STRENGTHS = (3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
RATIO = 0.4  # of the values hidden, as in the published fine-tuning
CHUNK = 16  # cells in one forward pass
KEPT_BYTES = 2**30  # of states of lower layers that are kept for later passes


def masks(batch: Batch, ratio: float = RATIO, draws: int = 1, seed: int = 0) -> Masks:
    """Which values are hidden in each draw: `ratio` of each cell's genes, at least one.

    Raises: BadInput for a ratio outside (0, 1) or fewer than one draw.
    """
    if not 0 < ratio < 1 or draws < 1:
        raise BadInput(
            f"{draws} draws of {ratio:g} of the values hide nothing, or everything; use a ratio"
            " between 0 and 1, and a draw."
        )
    generator = torch.Generator().manual_seed(seed)
    chance = torch.rand((draws, *batch.genes.shape), generator=generator)
    order = chance.masked_fill(~batch.scored, 2.0).argsort(-1).argsort(-1)
    return order < (batch.scored.sum(-1) * ratio).round().clamp(min=1)[:, None]


@torch.no_grad()
def masked_nll(model: ScGPT, batch: Batch, masked: Masks) -> Values:
    """NLL of each hidden value in nats, NaN where none is hidden; the other values are seen.

    Of a regressing model it is `gaussian` around what it says: a squared error in other units, no
    likelihood.
    """
    nats = torch.full(masked.shape, nan)
    for draw, hidden in enumerate(masked):
        values = batch.values.masked_fill(hidden, model.shape.mask_value)
        output = model(batch.genes, values, batch.padding)
        if output.logits is None:
            said = output.value_pred.float().cpu()
            nats[draw] = gaussian(said, batch.values, model.shape.n_bins)
        else:
            log_probs = output.logits.float().log_softmax(-1).cpu()
            nats[draw] = -log_probs.gather(-1, _bins(batch)[..., None]).squeeze(-1)
    return nats.masked_fill(~masked, nan)


def gaussian(predicted: Tensor, values: Tensor, n_bins: int) -> Tensor:
    """NLL of the values under a Gaussian around what is predicted, as wide as a bin that may be
    any.
    """
    width = (n_bins - 1) / 12**0.5
    return 0.5 * ((values - predicted) / width).square() + log(width) + 0.5 * log(2 * pi)


def _bins(batch: Batch) -> Tensor:
    # <cls> and padding hold no bin; they are never hidden
    return batch.values.long().clamp(min=0)


class MaskedNLL:
    """NLL of fixed hidden values, of the model as it is when asked.

    anatomy: of the model, intact. read: what scores a batch under masks. keep: whether layers below
    a change are computed once, which takes layers that return a tensor. `intact` is the NLL (draw,
    cell, pos) of the model as it was given, NaN where nothing is hidden.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        batch: Batch,
        masked: Masks,
        read: Callable[[Any, Batch, Tensor], Tensor] = masked_nll,
        keep: bool = True,
    ) -> None:
        self.anatomy, self.batch, self.masked, self._read = anatomy, batch, masked, read
        self._room = KEPT_BYTES if keep else 0
        self._passes = [
            (draw, piece) for draw in range(len(masked)) for piece in batch.pieces(CHUNK)
        ]
        self._kept: dict[int, list[LayerInput]] = {}
        self.intact = self.values()

    @property
    def base(self) -> float:
        """NLL of the intact model in nats per hidden value, cells weighing alike."""
        return float(by_cell(self.intact).mean())

    @property
    def predicted(self) -> int:
        """How many values are hidden, over all draws."""
        return int(self.masked.sum())

    def nll(self, lowest_layer: int) -> Callable[[], Float64[Tensor, " cell"]]:
        """NLL of each cell of the model as it is then; nothing below `lowest_layer` may differ."""
        return lambda: by_cell(self.values(lowest_layer))

    def values(self, lowest: int = 0) -> Values:
        """NLL of the model as it is now. Layers below `lowest` must be as they were at first."""
        entries = self._entries(lowest)
        nats = torch.full(self.masked.shape, nan)
        for i, (draw, piece) in enumerate(self._passes):
            with resume(self.anatomy.layers, entries[i]) if entries else nullcontext():
                nats[draw, piece] = self._pass(draw, piece)
        return nats

    def damage(self, parts: Sequence[Region], mode: str = "zero") -> Values:
        """What `parts` cost together, if they become what `mode` of `ablate` says."""
        with injured(self.anatomy, parts, mode):
            return self.values(min(part.site.layer or 0 for part in parts)) - self.intact

    def cost(self, parts: Sequence[Region], mode: str = "zero") -> float:
        """The mean of `damage` over cells, in nats per hidden value."""
        return float(by_cell(self.damage(parts, mode)).mean())

    def see(self, piece: slice) -> None:
        """One pass of some cells with nothing hidden, for whoever watches it."""
        self._read(
            self.anatomy.model, self.batch.of(piece), torch.zeros_like(self.masked[:1, piece])
        )

    def _pass(self, draw: int, piece: slice) -> Tensor:
        hidden = self.masked[draw : draw + 1, piece]
        return self._read(self.anatomy.model, self.batch.of(piece), hidden)[0]

    def _entries(self, start: int) -> list[LayerInput]:
        """What enters layer `start` in each pass of the intact model; nothing where that saves no
        work or takes too much memory.
        """
        size = self.masked.numel() * self.anatomy.d_model * 4
        if start < 1 or start in self._kept or (len(self._kept) + 1) * size > self._room:
            return self._kept.get(start, [])
        kept: list[LayerInput] = []
        with Tap() as tap:
            before = self.anatomy.layers[start - 1]
            tap.on_output(before, lambda s: kept.append(LayerInput(start, s.detach(), False)))
            for draw, piece in self._passes:
                self._pass(draw, piece)
        self._kept[start] = kept
        return kept


def by_cell(values: Values) -> Float64[Tensor, " cell"]:
    """Mean over the hidden values of each cell, all draws together; each cell has one at least."""
    return values.double().nanmean(dim=(0, 2))


def by_gene(
    values: Values, batch: Batch, least: int
) -> tuple[list[str], Float64[Tensor, " gene"], list[int]]:
    """Mean over the hidden values of each gene that has at least `least` of them: names, means, and
    how many values each has.
    """
    hidden = ~values.isnan()
    ids = batch.genes.expand(values.shape)[hidden]
    known, inverse, counts = torch.unique(ids, return_inverse=True, return_counts=True)
    sums = torch.zeros(len(known), dtype=torch.float64)
    means = sums.index_add_(0, inverse, values[hidden].double()) / counts
    enough = counts >= least
    names = [batch.gene_names[i] for i in known[enough].tolist()]
    return names, means[enough], counts[enough].tolist()


def by_group(per_cell: Float64[Tensor, " cell"], groups: Sequence[str]) -> dict[str, float]:
    """Mean over the cells of each group (a cell type, a condition), in nats."""
    values: dict[str, list[float]] = {}
    for value, name in zip(per_cell.tolist(), groups, strict=True):
        values.setdefault(name, []).append(value)
    return {name: sum(v) / len(v) for name, v in sorted(values.items())}


@dataclass(frozen=True, eq=False)
class Marginal:
    """The gene-marginal baseline: how often each gene has each bin, whatever the cell.

    Shape of log_probs: (token, bin), in nats.
    """

    log_probs: Float32[Tensor, "token bin"]

    @property
    def mean_bin(self) -> Float32[Tensor, " token"]:
        return self.log_probs.exp() @ torch.arange(self.log_probs.shape[1], dtype=torch.float32)

    def nll(self, batch: Batch, masked: Masks, reading: str = "categorical") -> Values:
        """NLL of the same values that `masked_nll` scores, NaN elsewhere.

        reading: of the model it is compared with.
        """
        if reading == "categorical":
            nats = -self.log_probs[batch.genes, _bins(batch)]
        else:
            n_bins = self.log_probs.shape[1]
            nats = gaussian(self.mean_bin[batch.genes], batch.values, n_bins)
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
    places = (batch.genes[batch.scored], batch.values[batch.scored].long())
    counts = torch.zeros(n_tokens, n_bins, dtype=torch.float64)
    counts.index_put_(places, torch.ones((), dtype=torch.float64), accumulate=True)
    there = counts[:, 1:].sum(1, keepdim=True)
    share = (there.sum() + 1) / (counts.sum() + 2)
    detected = (there + 2 * share) / (counts.sum(1, keepdim=True) + 2)
    usual = (counts[:, 1:].sum(0) + 1) / (there.sum() + n_bins - 1)
    bins = (counts[:, 1:] + strength * usual) / (there + strength)
    return Marginal(torch.cat([1 - detected, detected * bins], 1).log().float())


def best_marginal(fit: Batch, choose: Batch, masked: Masks, n_tokens: int, n_bins: int) -> Marginal:
    """The baseline fitted on some cells, with the smoothing that suits the hidden values of others
    best: no straw man.
    """
    tried = [fit_marginal(fit, n_tokens, n_bins, strength) for strength in STRENGTHS]
    return min(tried, key=lambda m: float(m.nll(choose, masked).nanmean()))
