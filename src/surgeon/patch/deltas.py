"""What a patch stores of one site: single entries, a whole line, or a low-rank term."""

# How this works.
#
# Entries and lines keep the old and the new value of each entry they name, in the dtype of the
# tensor they were made on. Applying writes the new values, undoing the old ones: nothing is added
# or subtracted, so undo is exact in every dtype. A low-rank term keeps its two factors only. It
# cannot be undone from itself; the stack of the model keeps the originals for it.
#
# A delta touches the entries whose bits it changes. An entry that it names and leaves as it is, it
# does not hold, and another patch may change it. All comparisons are of bits, as integers: -0.0 is
# not 0.0 then, and a NaN equals itself.
#
# A patch goes to a tensor of another dtype as well (made in float32, applied to a bfloat16 copy):
# values are then rounded on the way in, and compared after rounding.

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from ..anatomy import Site
from ..errors import Refused, WrongBase

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def differ(a: Tensor, b: Tensor) -> Tensor:
    """Where two tensors of one dtype differ in their bits.

    >>> differ(torch.tensor([0.0, torch.nan]), torch.tensor([-0.0, torch.nan]))
    tensor([ True, False])
    """
    integer = _INTEGERS[a.element_size()]
    return a.view(integer) != b.view(integer)


def wide(dtype: torch.dtype) -> torch.dtype:
    """What to compute in: float64 for float64 weights, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class _Kept(ABC):
    """A delta that keeps the old and the new value of each entry it names.

    Shapes: old, new (n,), in the dtype of the tensor it was made on.
    """

    site: Site
    old: Tensor
    new: Tensor

    @abstractmethod
    def points(self) -> tuple[Tensor, Tensor]:
        """Row and column (n,) of each value."""

    def touched(self, shape: tuple[int, int]) -> Bool[Tensor, "out in"]:
        """The entries whose bits it changes."""
        mask = torch.zeros(shape, dtype=torch.bool)
        at, _ = self._changed(mask.device)
        mask[at] = True
        return mask

    def apply_(self, matrix: Float[Tensor, "out in"]) -> None:
        """Write the new values into `matrix`, rounded to its dtype."""
        at, changed = self._changed(matrix.device)
        matrix[at] = self.new[changed].to(matrix)

    def undo_(self, matrix: Float[Tensor, "out in"]) -> None:
        """Put the old values back. Raises: WrongBase if `matrix` does not hold the new ones."""
        at, changed = self._changed(matrix.device)
        if differ(matrix[at], self.new[changed].to(matrix)).any():
            raise WrongBase(
                f"{self.site} does not hold the values that this patch writes, so there is nothing"
                " to undo."
            )
        matrix[at] = self.old[changed].to(matrix)

    def _changed(self, device: torch.device) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Rows and columns of the entries it changes, and which of those it names they are."""
        changed = differ(self.old, self.new)
        rows, cols = self.points()
        return (rows[changed].to(device), cols[changed].to(device)), changed

    def _check_values(self) -> None:
        _need(
            self.old.dtype == self.new.dtype and self.old.is_floating_point(),
            "old and new values are not floating point of one kind",
        )


@dataclass(frozen=True, eq=False)
class EntriesDelta(_Kept):
    """Single entries, each named once, row by row. Shapes: all (n,)."""

    kind: ClassVar[str] = "entries"

    site: Site
    rows: Int64[Tensor, " n"]
    cols: Int64[Tensor, " n"]
    old: Tensor
    new: Tensor

    def points(self) -> tuple[Tensor, Tensor]:
        return self.rows, self.cols

    def settings(self) -> dict[str, Any]:
        return {}

    def tensors(self) -> dict[str, Tensor]:
        # half the bytes of int64, and enough for any matrix
        return {"rows": self.rows.int(), "cols": self.cols.int(), "old": self.old, "new": self.new}

    @classmethod
    def read(
        cls, site: Site, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> EntriesDelta:
        """The delta that `settings` and `tensors` came from."""
        rows, cols = tensors["rows"].long(), tensors["cols"].long()
        return cls(site, rows, cols, tensors["old"], tensors["new"])

    def check(self, shape: tuple[int, int]) -> None:
        """Raises: ValueError if this cannot be a delta of a matrix (out, in) = `shape`."""
        lengths = {self.cols.shape, self.old.shape, self.new.shape}
        _need(
            self.rows.dim() == 1 and lengths == {self.rows.shape},
            "its parts differ in length",
        )
        self._check_values()
        for index, size in zip((self.rows, self.cols), shape, strict=True):
            inside = (index >= 0) & (index < size)
            _need(bool(inside.all()), f"an index lies outside the shape {shape}")
        flat = self.rows * shape[1] + self.cols
        _need(bool((flat[1:] > flat[:-1]).all()), "its entries are not in order")


@dataclass(frozen=True, eq=False)
class LineDelta(_Kept):
    """A whole row, of `in` entries, or a whole column, of `out` entries.

    axis: "row" or "column". index: which. Shapes: old, new (m,).
    """

    kind: ClassVar[str] = "line"

    site: Site
    axis: str
    index: int
    old: Tensor
    new: Tensor

    def points(self) -> tuple[Tensor, Tensor]:
        along = torch.arange(len(self.old))
        across = torch.full_like(along, self.index)
        return (across, along) if self.axis == "row" else (along, across)

    def settings(self) -> dict[str, Any]:
        return {"axis": self.axis, "index": self.index}

    def tensors(self) -> dict[str, Tensor]:
        return {"old": self.old, "new": self.new}

    @classmethod
    def read(
        cls, site: Site, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> LineDelta:
        """The delta that `settings` and `tensors` came from."""
        return cls(site, settings["axis"], settings["index"], tensors["old"], tensors["new"])

    def check(self, shape: tuple[int, int]) -> None:
        """Raises: ValueError if this cannot be a delta of a matrix (out, in) = `shape`."""
        _need(
            self.axis in ("row", "column") and type(self.index) is int,
            "a line is neither a row nor a column",
        )
        lines, length = shape if self.axis == "row" else shape[::-1]
        _need(
            0 <= self.index < lines,
            f"the {self.axis} {self.index} lies outside the shape {shape}",
        )
        _need(
            self.old.shape == self.new.shape == (length,),
            f"a {self.axis} has not the length that the shape {shape} says",
        )
        self._check_values()


@dataclass(frozen=True, eq=False)
class LowRankDelta:
    """W + left @ right, computed in float32 or wider and rounded to the weight's dtype.

    It touches the rows where left is not zero, in the columns where right is not zero.
    Shapes: left (out, r), right (r, in).
    """

    kind: ClassVar[str] = "low_rank"

    site: Site
    left: Float[Tensor, "out r"]
    right: Float[Tensor, "r in"]

    def touched(self, shape: tuple[int, int]) -> Bool[Tensor, "out in"]:
        """The entries whose bits it may change."""
        rows, cols = (self.left != 0).any(1), (self.right != 0).any(0)
        return rows[:, None] & cols[None, :]

    def apply_(self, matrix: Float[Tensor, "out in"]) -> None:
        """Add the product of the factors to `matrix`."""
        dtype = wide(matrix.dtype)
        # on the CPU, whatever the model's device: GPUs may round products to TF32, and results
        # should not depend on the device
        term = (self.left.to(dtype) @ self.right.to(dtype)).to(matrix.device)
        mask = self.touched((matrix.shape[0], matrix.shape[1])).to(matrix.device)
        total = (matrix.to(dtype) + term).to(matrix.dtype)
        # only where it touches: adding a zero would turn -0.0 into 0.0
        matrix.copy_(torch.where(mask, total, matrix))

    def undo_(self, matrix: Float[Tensor, "out in"]) -> None:
        """Raises: Refused, always; see the head of this module."""
        raise Refused(
            f"the patch adds a low-rank term to {self.site} and does not keep the original weights,"
            " so it can be undone only on the model in memory that it was applied to, or in a"
            " folder that `surgeon apply` wrote; go back to the base model instead."
        )

    def settings(self) -> dict[str, Any]:
        return {}

    def tensors(self) -> dict[str, Tensor]:
        return {"left": self.left, "right": self.right}

    @classmethod
    def read(
        cls, site: Site, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> LowRankDelta:
        """The delta that `settings` and `tensors` came from."""
        return cls(site, tensors["left"], tensors["right"])

    def check(self, shape: tuple[int, int]) -> None:
        """Raises: ValueError if this cannot be a delta of a matrix (out, in) = `shape`."""
        left, right = self.left.shape, self.right.shape
        _need(
            len(left) == len(right) == 2 and left[1] == right[0],
            "the factors do not fit each other",
        )
        _need(
            (left[0], right[1]) == shape,
            f"the factors do not make a matrix of shape {shape}",
        )
        _need(
            {self.left.dtype, self.right.dtype} <= {torch.float32, torch.float64},
            "the factors are not float32 or float64",
        )


Delta = EntriesDelta | LineDelta | LowRankDelta
KINDS: dict[str, type[EntriesDelta] | type[LineDelta] | type[LowRankDelta]] = {
    cls.kind: cls for cls in (EntriesDelta, LineDelta, LowRankDelta)
}


def kept_delta(
    site: Site, shape: tuple[int, int], rows: Tensor, cols: Tensor, old: Tensor, new: Tensor
) -> EntriesDelta | LineDelta:
    """The delta of these entries: a line if they are all of one row or column, else entries.

    Each entry is named once, in any order. Shapes: rows, cols, old, new (n,).

    >>> ones = torch.ones(3)
    >>> rows, cols = torch.full((3,), 1), torch.arange(3)
    >>> kept_delta(Site(0, "mlp.down"), (2, 3), rows, cols, ones, 0 * ones).settings()
    {'axis': 'row', 'index': 1}
    """
    order = (rows * shape[1] + cols).argsort()
    rows, cols, old, new = (t[order].contiguous() for t in (rows, cols, old, new))
    for axis, index, length in (("row", rows, shape[1]), ("column", cols, shape[0])):
        if len(index) == length > 1 and bool((index == index[0]).all()):
            return LineDelta(site, axis, int(index[0]), old, new)
    return EntriesDelta(site, rows, cols, old, new)


def _need(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)
