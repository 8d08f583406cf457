"""What `quantize` writes: a folder of one of the formats, from the files of the lab's model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..anatomy import Entry, Site, StreamedAnatomy
from ..anatomy.load import locate
from ..errors import BadInput
from ..files import check_new_folder, unfinished
from ..quantize import EXPORTS, ExportPlan, MatrixReport, QuantizeConfig
from ..quantize.formats import KEEP, TYPES
from ..result import record
from ..settings import setting
from .lab import Lab


@dataclass(frozen=True)
class ExportSettings:
    """What is written, and how."""

    output: str | None = setting(
        None,
        "new folder for the quantized checkpoint; without it only the table is made",
        short="-o",
        metavar="DIR",
    )
    export: str = setting("dense", "format that is written", choices=sorted(EXPORTS))
    keep: str = setting(
        "8bit",
        "how compressed-tensors and torchao keep the matrices with critical entries: they have no"
        " room for single ones",
        choices=KEEP,
        group="Export",
    )
    gguf: str | None = setting(
        None,
        "show the --tensor-type flags with which llama-quantize keeps those matrices so",
        choices=TYPES,
        group="Export",
    )

    def __post_init__(self) -> None:
        if self.output is not None:
            check_new_folder(Path(self.output))


@record
class Written:
    """A checkpoint that was written.

    matrices: what was done to each, which its format may not allow to be what the table is of; None
    where a matrix is as it was.
    """

    kind: str
    folder: str
    bytes: int
    matrices: dict[Site, MatrixReport | None]


def source_of(lab: Lab, asked: ExportSettings) -> Path | None:
    """The folder that is quantized, if one is to be written. Raises: BadInput."""
    if asked.output is None:
        return None
    if lab.opened_by is None:
        raise BadInput(
            "a checkpoint is written from the files of a model, and one that was made of a module"
            " has none; save it, and open its folder."
        )
    source = locate(lab.opened_by)
    check_new_folder(Path(asked.output), source)
    return source


def written(
    lab: Lab,
    asked: ExportSettings,
    source: Path | None,
    config: QuantizeConfig,
    critical: Sequence[Entry],
    squares: Mapping[Site, Tensor],
) -> Written | None:
    """The checkpoint, if one is asked for. squares: the mean square of each input column."""
    if asked.output is None or source is None:
        return None
    target = Path(asked.output)
    shards = None
    # a streamed model's own, which hash on the way what is read; not of another commit of the Hub
    if isinstance(lab.anatomy, StreamedAnatomy) and lab.anatomy.shards.folder == source:
        shards = lab.anatomy.shards
    plan = ExportPlan(
        source, target, config, tuple(critical), squares, lab.tell, asked.keep, shards
    )
    try:
        matrices = EXPORTS[asked.export](plan)
    except KeyboardInterrupt:
        # unlike other work, this goes on where it was stopped, which must be said
        raise KeyboardInterrupt(
            f"finished shards stay in {unfinished(target)}, and the same command goes on from them."
        ) from None
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    return Written(asked.export, str(target), size, matrices)
