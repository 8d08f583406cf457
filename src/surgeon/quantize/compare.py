"""The table: what a model loses at some bits, blocks and methods, its peers among them, judged in
one way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from math import isfinite
from typing import Any

from torch import Tensor

from ..anatomy import Anatomy, Entry, Site
from ..measure import Reference
from .config import METHODS, QuantizeConfig
from .export import Progress
from .grid import Block, Grid
from .peers import GPTQ, PEERS, gptq_tensors, peer_tensors
from .quantize import QuantizeResult, prepare, quantized_sites, swapped

Examine = Callable[[], Mapping[str, float]]


@dataclass(frozen=True)
class Row:
    """One way to quantize.

    nll, kl: nats per token, None where they are not finite. accuracy: of each task, by name.
    """

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
        return {name: value for name, value in vars(self).items() if name != "result"} | {
            "accuracy": dict(self.accuracy)
        }


def table(
    anatomy: Anatomy,
    windows: Tensor,
    config: QuantizeConfig,
    critical: Sequence[Entry] = (),
    mean_squares: Mapping[Site, Tensor] | None = None,
    examine: Examine | None = None,
    methods: Sequence[str] = METHODS,
) -> list[Row]:
    """The same bits and blocks with each method. Shapes: windows (n, window). examine: called on
    the model as it stands, accuracy by task.

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

    calibration: windows (n, window) for the peer that learns from text; without them it is left
    out. They must not be those judged on.
    """
    grids = [
        Grid(n, config.grid.symmetric, block, config.grid.pad) for n in bits for block in blocks
    ]
    judge = _Judge(anatomy, windows, examine)
    rows: list[Row] = []
    for done, grid in enumerate(grids):
        rows += _methods(anatomy, judge, replace(config, grid=grid), critical, mean_squares)
        sites = quantized_sites(anatomy, config)
        peers = {
            name: peer_tensors(anatomy, peer, grid.bits, grid.block, sites)
            for name, peer in PEERS.items()
        }
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
    """Those rows that no other beats: none has as few bits per weight and a lower NLL.

    From few bits to many.
    """
    front: list[Row] = []
    for row in sorted(
        (r for r in rows if r.nll is not None), key=lambda r: (r.bits_per_weight, r.nll or 0.0)
    ):
        if not front or (row.nll or 0.0) < (front[-1].nll or 0.0):
            front.append(row)
    return front


class _Judge:
    """Judges changes of one model on one text, and on tasks. Shapes: windows (n, window)."""

    def __init__(self, anatomy: Anatomy, windows: Tensor, examine: Examine | None) -> None:
        self.reference, self.examine = Reference(anatomy.model, windows), examine

    def __call__(
        self,
        label: tuple[str, int, str],
        bits_per_weight: float,
        change: Callable[[], AbstractContextManager[object]],
        result: QuantizeResult | None = None,
    ) -> Row:
        far = self.reference.compare(change)
        accuracy: Mapping[str, float] = {}
        if self.examine is not None:
            with change():
                accuracy = self.examine()
        return Row(
            *label,
            bits_per_weight,
            _finite(far.nll),
            _finite(far.kl),
            far.top1_agreement,
            accuracy,
            result,
        )


def _finite(value: float) -> float | None:
    return value if isfinite(value) else None
