"""`cells train`: a small model of gene expression, from scratch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from .. import files
from ..cells.checkpoint import require_free
from ..cells.data import DataSettings
from ..cells.train import CellTraining, TrainConfig, train
from ..settings import nested, setting
from .desk import Desk


@dataclass(frozen=True, kw_only=True)
class Settings(DataSettings):
    """Train a small scGPT on DATA, on a CPU in minutes, with cells held out and a gene-marginal
    baseline beside it.
    """

    output: str = setting(
        help="folder for the checkpoint, in the published scGPT layout", metavar="DIR", short="-o"
    )
    overwrite: bool = setting(False, "replace a model that is there already")
    training: TrainConfig = nested(TrainConfig)


def run(desk: Desk, settings: Settings) -> CellTraining:
    if not settings.overwrite:
        require_free(settings.output)
    values = settings.read()
    files.make_folder(Path(settings.output))
    trained = train(values, settings.training, desk.tell)
    result = replace(
        trained.figures,
        output=settings.output,
        provenance=desk.provenance(settings, model=settings.output),
    )
    result.to_json()  # raises for a figure that is not finite, before anything is written
    trained.save(settings.output)
    return result
