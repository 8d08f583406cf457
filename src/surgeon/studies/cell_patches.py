"""What a screen finds, patched and audited: folders of cell models where others are of language
models.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from .. import files
from ..anatomy import Site
from ..audit import Weights
from ..cells.checkpoint import load_cells, save_weights
from ..patch import Patch


class CellWeights(Weights):
    """The matrices of a cell model, for an audit."""

    def __init__(self, folder: str) -> None:
        self.name, self.anatomy = folder, load_cells(folder).model.anatomy

    @property
    def bytes_read(self) -> int:
        return sum(p.nbytes for p in self.anatomy.model.parameters())

    def matrix(self, site: Site) -> Float[Tensor, "out in"]:
        return self.anatomy.view(site).read().float()


def patch_cells(
    source: str | Path, patches: Sequence[Patch], target: str | Path, undo: bool = False
) -> None:
    """Copy the cell model in `source` to the new folder `target`, with the patches applied in
    order, or undone.

    Raises: BadInput if no new folder can be made at `target`; as `load_cells`; as `Patch.apply_` or
    `Patch.undo_`, before anything is written.
    """
    files.check_new_folder(Path(target), Path(source))
    loaded = load_cells(source)
    anatomy = loaded.model.anatomy
    for patch in patches:
        if undo:
            patch.undo_(anatomy)
        else:
            patch.apply_(anatomy)
    with files.writing_folder(Path(target)) as part:
        shutil.copytree(source, part, dirs_exist_ok=True)
        save_weights(part, {**loaded.model.state_dict(), **loaded.others})
