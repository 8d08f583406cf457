"""Damage: paired masked negative log-likelihood of the intact and the broken model on the same
tokenised cells and the same masks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from math import nan

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from ..tap import LayerInput, Tap, resume
from .likelihood import masked_nll
from .model import ScGPT
from .parts import Part, scaled
from .tokenise import Batch

CHUNK = 16  # cells in one forward pass
KEPT_BYTES = 2**30  # states of lower layers that are kept for later passes
Progress = Callable[[str, int, int], None]


class Damage:
    """What a change of the model costs on fixed cells and fixed masks; layers below the change are
    computed once.

    batch: tokenised once, since binning breaks ties at random. masked: (draw, cell, pos), True
    where a value is hidden and scored. `intact` is the NLL (draw, cell, pos) in nats, NaN where
    nothing is scored.
    """

    def __init__(self, model: ScGPT, batch: Batch, masked: Bool[Tensor, "draw cell pos"]) -> None:
        self.model, self.batch, self.masked = model, batch, masked
        self._pieces = [slice(at, at + CHUNK) for at in range(0, len(batch.cell_names), CHUNK)]
        self._kept: dict[int, list[LayerInput]] = {}
        self.intact = self.nll()

    @property
    def base(self) -> float:
        """NLL of the intact model in nats per masked value, cells weighing alike."""
        return float(by_cell(self.intact).nanmean())

    def of(self, parts: Sequence[Part], factor: float = 0.0) -> Float[Tensor, "draw cell pos"]:
        """Damage (draw, cell, pos) in nats with all of `parts` scaled together, by default to
        zero.
        """
        with scaled(self.model, parts, factor):
            return self.change(min(p.layer for p in parts))

    def change(self, lowest: int = 0) -> Float[Tensor, "draw cell pos"]:
        """NLL of the model as it is now, less the intact one's.

        lowest: the lowest layer that differs from the intact model.
        """
        return self.nll(lowest) - self.intact

    def nll(self, lowest: int = 0) -> Float[Tensor, "draw cell pos"]:
        """NLL of the model as it is now.

        Layers below `lowest` must be as they were when this object was made.
        """
        entries = self._entries(lowest)
        found = torch.full(self.masked.shape, nan, dtype=torch.float32)
        for i, (draw, piece) in enumerate(self._passes()):
            with resume(self.model.layers, entries[i]) if entries else nullcontext():
                found[draw, piece] = self._call(draw, piece)
        return found

    def _passes(self) -> Iterator[tuple[int, slice]]:
        return ((draw, piece) for draw in range(len(self.masked)) for piece in self._pieces)

    def _call(self, draw: int, piece: slice) -> Tensor:
        return masked_nll(
            self.model, cells_of(self.batch, piece), self.masked[draw : draw + 1, piece]
        )[0]

    def _entries(self, start: int) -> list[LayerInput]:
        """What enters layer `start` in each pass of the intact model; nothing where that saves no
        work or takes too much memory.
        """
        layers = self.model.layers
        size = self.masked.numel() * self.model.d_model * 4
        if start < 1 or len(self._kept) * size + (start not in self._kept) * size > KEPT_BYTES:
            return self._kept.get(start, [])
        if start not in self._kept:
            kept: list[LayerInput] = []
            with Tap() as tap:
                tap.on_output(
                    layers[start - 1],
                    lambda states: kept.append(LayerInput(start, states.detach(), False)),
                )
                for draw, piece in self._passes():
                    self._call(draw, piece)
            self._kept[start] = kept
        return self._kept[start]


def cells_of(batch: Batch, piece: slice | Tensor) -> Batch:
    """Some of the cells of a batch."""
    at = range(len(batch.cell_names))[piece] if isinstance(piece, slice) else piece.tolist()
    return Batch(
        batch.genes[piece],
        batch.values[piece],
        batch.padding[piece],
        batch.gene_names,
        [batch.cell_names[i] for i in at],
    )


def by_cell(values: Float[Tensor, "draw cell pos"]) -> Float64[Tensor, " cell"]:
    """Mean over the scored values of each cell, all draws together; NaN for a cell without any."""
    return values.double().nanmean(dim=(0, 2))


def by_gene(
    values: Float[Tensor, "draw cell pos"], batch: Batch, least: int
) -> tuple[list[str], Float64[Tensor, " gene"], list[int]]:
    """Mean over the scored values of each gene that has at least `least` of them: names, means, and
    how many values each has.
    """
    scored = ~values.isnan()
    ids = batch.genes.expand(values.shape)[scored]
    known, inverse, counts = torch.unique(ids, return_inverse=True, return_counts=True)
    means = (
        torch.zeros(len(known), dtype=torch.float64).index_add_(0, inverse, values[scored].double())
        / counts
    )
    enough = counts >= least
    names = [batch.gene_names[i] for i in known[enough].tolist()]
    return names, means[enough], counts[enough].tolist()


def by_type(per_cell: Float64[Tensor, " cell"], types: Sequence[str]) -> dict[str, float]:
    """Mean over the cells of each type, in nats."""
    found: dict[str, list[float]] = {}
    for value, name in zip(per_cell.tolist(), types, strict=True):
        if value == value:
            found.setdefault(name, []).append(value)
    return {name: sum(v) / len(v) for name, v in sorted(found.items())}
