"""BASE and OTHER of an audit: their matrices, read from files, and the models where they must run.

Neither is loaded before something asks for it: auditing named entries reads a few matrices, and
only looking for entries, or comparing activations, takes the models.
"""

from __future__ import annotations

import copy
import os
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..anatomy import Anatomy, Entry, Site, StreamedAnatomy, load_model
from ..anatomy.load import DTYPES
from ..audit import (
    Adapter,
    Checkpoint,
    GgufFile,
    Plugin,
    SuperActivation,
    Weights,
    channels,
    open_pair,
    peaks,
)
from ..cells.checkpoint import holds_cells
from ..errors import BadInput, MissingExtra, SurgeonError
from ..patch import load
from ..quantize.formats.packing import pieces
from ..quantize.formats.sidecar_loader import CORRECTION, METHOD, PARTS, SidecarConfig
from .cell_patches import CellWeights
from .desk import Desk
from .lab import Lab, TextSettings, open_lab

_SHARE_OF_MEMORY = 0.5  # of what is free; a larger BASE is read block by block


class Pair:
    """Two models by name: `base` and `other` give matrices; `lab` is BASE, ready to run.

    desk: what asks; a lab of BASE is used as it is.
    Raises: BadInput, BadCheckpoint, MissingExtra as `audit.open_pair`.
    """

    def __init__(self, desk: Desk, base: str, other: str) -> None:
        self.desk = desk
        self.base: Weights
        self.other: Weights
        if holds_cells(base):
            self.base, self.other = CellWeights(base), CellWeights(other)
        else:
            self.base, self.other = open_pair(base, other, {METHOD: Plugin("_codes", _sidecar)})

    @cached_property
    def lab(self) -> Lab:
        """Raises: BadInput for a model of gene expression, which reads no text."""
        if isinstance(self.base, CellWeights):
            raise BadInput(
                f"{self.base.name} is a model of gene expression, which no text can be read with;"
                " name the entries to audit with ‹at› or ‹patches›, and leave out ‹run›."
            )
        if isinstance(self.desk, Lab) and self.desk.opened_by == self.base.name:
            return self.desk
        lab = open_lab(self.base.name, stream=not _fits_memory(self.base.anatomy), whole=False)
        lab.listen(self.desk.tell)
        return lab

    def activations(
        self, entries: list[Entry], text: TextSettings
    ) -> tuple[list[SuperActivation], str | None]:
        """How large the channels that the entries write grow on this text, in both models; or why
        they cannot be compared.
        """
        places = channels(entries)
        if not places:
            return [], "the entries lie in experts that share one module"
        addresses = [self.base.anatomy.addresses[site] for site, _ in places]
        rows = [row for _, row in places]
        windows = self.lab.corpus(text).windows
        before = peaks(self.lab.model, addresses, rows, windows)
        try:
            after = peaks(self._load_other(), addresses, rows, windows)
        except SurgeonError as error:
            return [], str(error)
        each = zip(places, before, after, strict=True)
        return [SuperActivation(site, row, old, new) for (site, row), old, new in each], None

    def _load_other(self) -> Any:
        """OTHER as a model that runs."""
        if isinstance(self.other, Adapter):
            return self._adapted()
        if isinstance(self.other, GgufFile):
            return self._from_gguf(Path(self.other.name))
        return load_model(self.other.name).model

    def _adapted(self) -> Any:
        """A copy of BASE with the adapter merged into it."""
        try:
            import peft
        except ImportError as error:
            raise MissingExtra("running an adapter", "lora") from error
        if isinstance(self.lab.anatomy, StreamedAnatomy):
            raise BadInput(
                f"{self.other.name} is an adapter, which goes onto a model in memory, and"
                f" {self.base.name} is left on disk."
            )
        base = copy.deepcopy(self.lab.model)
        return peft.PeftModel.from_pretrained(base, self.other.name).merge_and_unload()

    def _from_gguf(self, path: Path) -> Any:
        kind = type(self.lab.model)
        try:
            model = kind.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        # transformers raises many types here, all of them about this file
        except Exception as error:
            reason = str(error).partition("\n")[0]
            raise SurgeonError(f"transformers cannot run {path}: {reason}") from error
        return model.eval()


def _fits_memory(anatomy: Anatomy) -> bool:
    """Whether a model of this map, in its own dtype, leaves half of the free memory free."""
    dtype = getattr(anatomy.config, "dtype", None) or torch.float32
    numbers = sum(parameter.numel() for parameter in anatomy.model.parameters())
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return numbers * dtype.itemsize < _SHARE_OF_MEMORY * free


def _sidecar(checkpoint: Checkpoint, name: str, site: Site, place: int) -> Tensor:
    """The matrix of a checkpoint that `surgeon quantize --export sidecar` wrote, its critical
    entries put back.
    """
    config = SidecarConfig(**checkpoint.settings)
    stored = {part: f"{name}_{part}" for part in PARTS if f"{name}_{part}" in checkpoint.tensors}
    tensors = {part: checkpoint.tensors.read(tensor) for part, tensor in stored.items()}
    matrix = pieces(tensors, config.grid)[place].dequantize().to(DTYPES[config.dtype])
    if config.correction is not None:
        for delta in load(checkpoint.folder / CORRECTION).on(site):
            delta.apply_(matrix)
    return matrix
