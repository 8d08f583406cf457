"""What an export gets to work with; the exports themselves are one module each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from ..anatomy import Entry, Site
from .config import QuantizeConfig

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, eq=False)
class ExportPlan:
    """One export: the checkpoint `folder` goes quantized into the new folder `target`.

    critical: the entries that `config.method` may hold out. mean_squares: E[x^2] of each column of
    a site, (in,), where the clip search is weighted by it. The model is not in memory:
    `checkpoint.Source(plan.folder)` gives its map and its tensors, one at a time, and
    `holdout.treat` the codes of a matrix, the same as in memory. keep: what a format that has no
    room for single entries does with the matrices that hold critical ones: "8bit" or "dense".
    """

    folder: Path
    target: Path
    config: QuantizeConfig
    critical: tuple[Entry, ...] = ()
    mean_squares: Mapping[Site, Tensor] = field(default_factory=dict)
    progress: Progress | None = None
    keep: str = "8bit"


Export = Callable[[ExportPlan], None]
