"""A site's matrix as (out, in), whatever layout the tensor has that stores it."""

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

    expert: index on a leading expert axis, or None. transposed: stored as (in, out). rows: which
    output channels of a fused tensor belong to the site; None for all of them.
    """

    expert: int | None = None
    transposed: bool = False
    rows: Rows = None

    def oriented(self, stored: Tensor) -> Tensor:
        """The matrix that holds the site's rows, as a view (out_all, in) of `stored`; vectors
        become one column.
        """
        matrix = stored if self.expert is None else stored[self.expert]
        if matrix.dim() == 1:
            matrix = matrix[:, None]
        return matrix.T if self.transposed else matrix


@dataclass(frozen=True)
class WeightView:
    """A `Site` resolved on a tensor: read and write the matrix as (out, in)."""

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
        """The entries at (rows[i], cols[i]) as a new tensor (n,)."""
        return self._matrix[self._stored_rows(rows), cols.to(self.stored.device)]

    def set_(self, rows: Tensor, cols: Tensor, values: Tensor) -> None:
        """Write `values` (n,) at (rows[i], cols[i]); they are rounded to the stored dtype."""
        at = (self._stored_rows(rows), cols.to(self.stored.device))
        self._matrix[at] = values.to(device=self.stored.device, dtype=self.stored.dtype)

    def assign_(self, matrix: Tensor) -> None:
        """Write the whole matrix (out, in)."""
        target = slice(None) if self.packing.rows is None else self.packing.rows
        self._matrix[target] = matrix.to(device=self.stored.device, dtype=self.stored.dtype)

    def positions(self, rows: Tensor, cols: Tensor) -> Tensor:
        """Where the entries (n,) lie in the flattened tensor that stores them; for its gradient,
        say.
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
        """SHA-256 of the matrix as (out, in) in float32 (float64 stays): the same for every layout
        and for bf16 read as fp32.
        """
        return digest(self.read())


def digest(matrix: Tensor) -> str:
    """SHA-256 of a matrix (out, in): its shape, then its values as float32 (float64 stays), row by
    row.
    """
    wide = (
        matrix.detach()
        .to("cpu", torch.float64 if matrix.dtype == torch.float64 else torch.float32)
        .contiguous()
    )
    head = f"{tuple(wide.shape)}:{wide.dtype}:".encode()
    return hashlib.sha256(head + wide.numpy().tobytes()).hexdigest()
