"""The table: what a model loses at some bits, blocks and methods, its peers among them, judged in one way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from math import isfinite
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..anatomy import Anatomy, Entry, Site
from ..measure.likelihood import batches, logits_of
from .config import METHODS, QuantizeConfig
from .export import Progress
from .grid import Block, Grid
from .peers import GPTQ, PEERS, gptq_tensors, peer_tensors
from .quantize import QuantizeResult, prepare, quantized_sites, swapped

KEPT = 2**28  # numbers of the intact predictions that are kept between rows: 1 GiB

Examine = Callable[[], Mapping[str, float]]


@dataclass(frozen=True)
class Row:
    """One way to quantize. nll, kl: nats per token, None where they are not finite. accuracy: of each task, by name."""

    method: str
    bits: int
    block: str
    bits_per_weight: float
    nll: float | None
    kl: float | None
    top1_agreement: float
    accuracy: Mapping[str, float]
    result: QuantizeResult | None = None

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "result"} | {"accuracy": dict(self.accuracy)}


def table(
    anatomy: Anatomy,
    windows: Tensor,
    config: QuantizeConfig,
    critical: Sequence[Entry] = (),
    mean_squares: Mapping[Site, Tensor] | None = None,
    examine: Examine | None = None,
    methods: Sequence[str] = METHODS,
) -> list[Row]:
    """The same bits and blocks with each method. Shapes: windows (n, window). examine: called on the model as it stands, accuracy by task.

    The model is as before, bit for bit, afterwards. Raises: as `quantize_`.
    """
    judge = _Judge(anatomy, windows, examine)
    return _methods(anatomy, judge, config, critical, mean_squares, methods)


def _methods(
    anatomy: Anatomy,
    judge: _Judge,
    config: QuantizeConfig,
    critical: Sequence[Entry],
    mean_squares: Mapping[Site, Tensor] | None,
    methods: Sequence[str] = METHODS,
) -> list[Row]:
    rows = []
    for method in methods:
        ready = prepare(anatomy, replace(config, method=method), critical, mean_squares)
        label = (method, config.grid.bits, str(config.grid.block))
        rows.append(judge(label, ready.result.bits_per_weight, ready.applied, ready.result))
    return rows


def sweep(
    anatomy: Anatomy,
    windows: Tensor,
    config: QuantizeConfig,
    bits: Sequence[int],
    blocks: Sequence[Block],
    critical: Sequence[Entry] = (),
    mean_squares: Mapping[Site, Tensor] | None = None,
    examine: Examine | None = None,
    progress: Progress | None = None,
    calibration: Tensor | None = None,
) -> list[Row]:
    """Bits x block x method, and the installed peers where they know such a block.

    calibration: windows (n, window) for the peer that learns from text; without them it is left out. They must not be those judged on.
    """
    grids = [Grid(n, config.grid.symmetric, block, config.grid.pad) for n in bits for block in blocks]
    judge = _Judge(anatomy, windows, examine)
    rows: list[Row] = []
    for done, grid in enumerate(grids):
        rows += _methods(anatomy, judge, replace(config, grid=grid), critical, mean_squares)
        sites = quantized_sites(anatomy, config)
        peers = {name: peer_tensors(anatomy, peer, grid.bits, grid.block, sites) for name, peer in PEERS.items()}
        if calibration is not None:
            peers[GPTQ] = gptq_tensors(anatomy, grid.bits, grid.block, sites, calibration)
        for name, found in peers.items():
            if found is not None:
                tensors, stored = found
                label = (name, grid.bits, str(grid.block))
                rows.append(judge(label, stored, partial(swapped, anatomy, tensors)))
        if progress is not None:
            progress("sweep", done + 1, len(grids))
    return rows


def pareto(rows: Iterable[Row]) -> list[Row]:
    """Those rows that no other beats: none has as few bits per weight and a lower NLL. From few bits to many."""
    front: list[Row] = []
    for row in sorted((r for r in rows if r.nll is not None), key=lambda r: (r.bits_per_weight, r.nll or 0.0)):
        if not front or (row.nll or 0.0) < (front[-1].nll or 0.0):
            front.append(row)
    return front


class _Judge:
    """Judges changes of one model on one text: NLL, KL to the model as it is, top-1 agreement, and tasks. Shapes: windows (n, window)."""

    def __init__(self, anatomy: Anatomy, windows: Tensor, examine: Examine | None) -> None:
        self.model, self.windows, self.examine = anatomy.model, windows, examine
        self.kept: list[Tensor] = []

    @torch.no_grad()
    def __call__(
        self,
        label: tuple[str, int, str],
        bits_per_weight: float,
        change: Callable[[], AbstractContextManager[object]],
        result: QuantizeResult | None = None,
    ) -> Row:
        sums, kl, agree = [], 0.0, 0.0
        for number, ids in enumerate(batches(self.windows)):
            base = self._base(number, ids)
            with change():
                changed = self._predictions(ids)
            losses = -changed.gather(-1, ids[:, 1:, None].to(changed.device))[..., 0]
            sums.append(losses.double().sum(1).cpu())
            kl += float((base.exp() * (base - changed)).sum(-1).double().sum())
            agree += float((base.argmax(-1) == changed.argmax(-1)).sum())
        accuracy: Mapping[str, float] = {}
        if self.examine is not None:
            with change():
                accuracy = self.examine()
        predicted = self.windows.shape[1] - 1
        tokens = len(self.windows) * predicted
        nll = float((torch.cat(sums) / predicted).mean())
        return Row(*label, bits_per_weight, _finite(nll), _finite(kl / tokens), agree / tokens, accuracy, result)

    def _predictions(self, ids: Tensor) -> Tensor:
        """Log-probabilities of the next token, (batch, pos - 1, d_vocab)."""
        return F.log_softmax(logits_of(self.model, ids)[:, :-1].float(), -1)

    def _base(self, number: int, ids: Tensor) -> Tensor:
        """The intact model's, of batch `number`: kept for the next row as long as there is room."""
        if number < len(self.kept):
            return self.kept[number]
        base = self._predictions(ids)
        if number == len(self.kept) and sum(k.numel() for k in self.kept) + base.numel() <= KEPT:
            self.kept.append(base)
        return base


def _finite(value: float) -> float | None:
    return value if isfinite(value) else None
