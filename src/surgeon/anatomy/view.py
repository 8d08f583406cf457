"""A site's matrix as (out, in), whatever layout the tensor has that stores it."""

# How this works.
#
# A stored tensor may hold more than one site's matrix, or hold it turned. Three things tell how to
# get from the tensor to the matrix, in this order: take one expert of a leading axis, transpose,
# take some of the rows. The first two give views, so a write through them reaches the model. The
# rows may be a slice (also a view) or a list of indices, which copies; so every write goes to the
# matrix before rows are taken, at row indices translated by `_stored_rows`.

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import PackedWeight
from .site import Site

Rows = slice | Tensor | None


@dataclass(frozen=True)
class Packing:
    """How one stored tensor holds a site's matrix.

    expert: index on a leading axis of experts, or None. transposed: stored as (in, out). rows:
    which output channels of a fused tensor belong to the site; None for all of them.
    """

    expert: int | None = None
    transposed: bool = False
    rows: Rows = None

    def oriented(self, stored: Tensor) -> Tensor:
        """The matrix (out, in) that holds the site's rows among others, as a view of `stored`.

        A vector, such as the weight of a norm, becomes one column.
        """
        matrix = stored if self.expert is None else stored[self.expert]
        if matrix.dim() == 1:
            matrix = matrix[:, None]
        return matrix.T if self.transposed else matrix


@dataclass(frozen=True)
class WeightView:
    """A `Site` resolved on a tensor: read and write the matrix as (out, in).

    Raises: PackedWeight if the tensor is quantized.

    >>> stored = torch.arange(6.0).view(3, 2)  # as Conv1D has it: (in, out)
    >>> view = WeightView(Site(0, "mlp.down"), stored, Packing(transposed=True))
    >>> view.shape
    (2, 3)
    >>> view.set_(torch.tensor([1]), torch.tensor([0]), torch.tensor([9.0]))
    >>> view.read()[1], stored[0]
    (tensor([9., 3., 5.]), tensor([0., 9.]))
    """

    site: Site
    stored: Tensor
    packing: Packing

    def __post_init__(self) -> None:
        if not self.stored.is_floating_point():
            raise PackedWeight(
                f"{self.site} is stored as {self.stored.dtype}, which is quantized; its entries"
                " cannot be changed in place. Dequantize the model first."
            )

    @property
    def _matrix(self) -> Tensor:
        return self.packing.oriented(self.stored.detach())

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        n_out, n_in = self._matrix.shape
        rows = self.packing.rows
        if isinstance(rows, slice):
            n_out = len(range(*rows.indices(n_out)))
        elif rows is not None:
            n_out = len(rows)
        return n_out, n_in

    @property
    def dtype(self) -> torch.dtype:
        return self.stored.dtype

    def read(self) -> Tensor:
        """The matrix (out, in); it may share memory with the model, so treat it as read-only."""
        return self._matrix if self.packing.rows is None else self._matrix[self.packing.rows]

    def get(self, rows: Tensor, cols: Tensor) -> Tensor:
        """The entries at (rows[i], cols[i]) as a new tensor (n,), in the stored dtype."""
        return self._matrix[self._stored_rows(rows), cols.to(self.stored.device)]

    def set_(self, rows: Tensor, cols: Tensor, values: Tensor) -> None:
        """Write `values` (n,) at (rows[i], cols[i]); they are rounded to the stored dtype."""
        at = (self._stored_rows(rows), cols.to(self.stored.device))
        self._matrix[at] = values.to(device=self.stored.device, dtype=self.stored.dtype)

    def assign_(self, matrix: Tensor) -> None:
        """Write the whole matrix (out, in); it is rounded to the stored dtype."""
        target = slice(None) if self.packing.rows is None else self.packing.rows
        self._matrix[target] = matrix.to(device=self.stored.device, dtype=self.stored.dtype)

    def positions(self, rows: Tensor, cols: Tensor) -> Tensor:
        """The index (n,) of each entry in the flattened tensor that stores it.

        With it, entries are found in something of the tensor's shape, like its gradient.
        """
        matrix = self._matrix
        offset = int(matrix.storage_offset()) - int(self.stored.storage_offset())
        flat: Tensor = self._stored_rows(rows) * matrix.stride(0) + cols.to(
            self.stored.device
        ) * matrix.stride(1)
        return flat + offset

    def _stored_rows(self, rows: Tensor) -> Tensor:
        rows = rows.to(self.stored.device)
        within = self.packing.rows
        if within is None:
            return rows
        if isinstance(within, slice):
            start, _, step = within.indices(self._matrix.shape[0])
            moved: Tensor = rows * step + start
            return moved
        chosen: Tensor = within.to(self.stored.device)[rows]
        return chosen

    def digest(self) -> str:
        """SHA-256 of the matrix, the same for every layout, and for bfloat16 read as float32."""
        return digest(self.read())


def digest(matrix: Tensor) -> str:
    """SHA-256 of a matrix (out, in): its shape, then its values as float32, row by row.

    Values of float64 stay as they are.

    >>> digest(torch.ones(2, 2)) == digest(torch.ones(2, 2, dtype=torch.bfloat16))
    True
    >>> digest(torch.ones(2, 2)) == digest(torch.ones(1, 4))
    False
    """
    wide = (
        matrix.detach()
        .to("cpu", torch.float64 if matrix.dtype == torch.float64 else torch.float32)
        .contiguous()
    )
    head = f"{tuple(wide.shape)}:{wide.dtype}:".encode()
    return hashlib.sha256(head + wide.numpy().tobytes()).hexdigest()
