"""Round to nearest on a uniform grid: how a matrix is cut into blocks, and the codes, scales and
offsets of each block.

    grid = Grid(bits=4, block=Block.parse("group:128"))
    quantize_matrix(weight, grid).dequantize()

How this works. `Block.split` turns a matrix into one axis more, whose last is the entries of a
block; where blocks reach over the edge it pads with NaN, which no statistic counts. The least and
the greatest entry of a block give its scale and offset, every entry the nearest code, and
`Block.join` puts the codes back to (out, in). All is done in float32, whatever the matrix is
stored in, and `dequantize` is the way back in memory and for the packed files of Surgeon's own: so
such a folder means the same bits as a model quantized in memory.

Levels. Symmetric: codes -(2^(N-1) - 1) to 2^(N-1) - 1, which are 2^N - 1 levels, zero among them.
Asymmetric: codes 0 to 2^N - 1, which are 2^N - 1 steps of (max - min) / (2^N - 1). Yu et al. 2024
(arXiv:2411.07191) print 2^(N-1) - 1 steps there, which would waste half of the codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Tensor

from ..errors import BadInput, SurgeonError
from ..settings import check_values, setting

KINDS = ("tensor", "channel", "group", "flat", "square")
BLOCKS = (
    "what shares a scale: tensor, channel, group:N (neighbours in a row), flat:N (runs of the"
    " flattened matrix), square:N (N x N tiles)"
)
LEAST_BITS, MOST_BITS = 2, 8
SCALE_BITS = 16  # what one scale, and one offset, costs in storage
Limit = float | Tensor | None


@dataclass(frozen=True)
class Block:
    """Which entries share one scale.

    tensor: all. channel: one output channel (row). group: `size` neighbours along the input of one
    row. flat: runs of `size` entries of the flattened (out, in) matrix. square: true
    two-dimensional tiles of `size` x `size`.
    """

    kind: str
    size: int | None = None

    def __post_init__(self) -> None:
        sized = self.kind in ("group", "flat", "square")
        if (
            self.kind not in KINDS
            or (self.size is not None) != sized
            or (self.size is not None and self.size < 1)
        ):
            raise BadInput(
                f"{self} is no block; use tensor, channel, group:N, flat:N (runs of N entries) or"
                " square:N (N x N tiles)."
            )

    def __str__(self) -> str:
        return self.kind if self.size is None else f"{self.kind}:{self.size}"

    @classmethod
    def parse(cls, text: str) -> Block:
        """Read `tensor`, `channel`, `group:128`, `flat:262144` or `square:512`.

        Raises: BadInput.
        """
        kind, colon, size = text.strip().partition(":")
        if colon and not (size.isascii() and size.isdigit()):
            raise BadInput(
                f"{text!r} is no block: {size!r} is not a whole number of entries; write it like"
                " group:128."
            )
        return cls(kind, int(size) if colon else None)

    def counts(self, shape: tuple[int, int]) -> tuple[int, ...]:
        """How many blocks lie along each axis of a matrix (out, in): the shape of its scales."""
        n_out, n_in = shape
        if self.size is None:
            return (1, 1) if self.kind == "tensor" else (n_out, 1)
        if self.kind == "group":
            return n_out, -(-n_in // self.size)  # rounded up
        if self.kind == "flat":
            return (-(-n_out * n_in // self.size),)
        return -(-n_out // self.size), -(-n_in // self.size)

    def divides(self, shape: tuple[int, int]) -> bool:
        if self.size is None:
            return True
        sizes = {"group": shape[1:], "flat": (prod(shape),), "square": shape}[self.kind]
        return all(n % self.size == 0 for n in sizes)

    def split(self, matrix: Float[Tensor, "out in"]) -> Tensor:
        """The entries block by block, (*counts, entries of a block); NaN where a block reaches over
        the edge of the matrix.
        """
        n_out, n_in = matrix.shape
        rows, cols = self._over(n_out, n_in)
        if self.size is None:
            return matrix.reshape(*self.counts((n_out, n_in)), -1)
        if self.kind == "flat":
            return F.pad(matrix.reshape(-1), (0, cols), value=torch.nan).view(-1, self.size)
        padded = F.pad(matrix, (0, cols, 0, rows), value=torch.nan)
        if self.kind == "group":
            return padded.view(n_out, -1, self.size)
        tiles = padded.view(padded.shape[0] // self.size, self.size, -1, self.size)
        return tiles.transpose(1, 2).reshape(*self.counts((n_out, n_in)), -1)

    def join(self, blocks: Tensor, shape: tuple[int, int]) -> Tensor:
        """The matrix (out, in) = `shape` that `split` cut into `blocks`."""
        n_out, n_in = shape
        rows, cols = self._over(n_out, n_in)
        if self.size is None:
            return blocks.reshape(shape)
        if self.kind == "flat":
            return blocks.reshape(-1)[: n_out * n_in].view(shape)
        if self.kind == "group":
            return blocks.reshape(n_out, n_in + cols)[:, :n_in]
        tiles = blocks.view(*self.counts(shape), self.size, self.size).transpose(1, 2)
        return tiles.reshape(n_out + rows, n_in + cols)[:n_out, :n_in]

    def _over(self, n_out: int, n_in: int) -> tuple[int, int]:
        """By how many rows and columns the last blocks reach over the edge; for flat runs, by how
        many entries.
        """
        if self.size is None:
            return 0, 0
        if self.kind == "flat":
            return 0, -(n_out * n_in) % self.size
        return (-n_out % self.size if self.kind == "square" else 0), -n_in % self.size


@dataclass(frozen=True)
class Grid:
    """Settings of round-to-nearest."""

    bits: int = setting(4, "bits of a weight", low=LEAST_BITS, high=MOST_BITS)
    symmetric: bool = setting(
        True,
        "codes on both sides of zero without an offset, or from the least to the greatest entry of"
        " a block with one",
        group="Grid",
        off="asymmetric",
    )
    block: Block = setting(Block("group", 128), BLOCKS, parse=Block.parse)
    pad: bool = setting(
        True,
        "let the last blocks reach over the edge of a matrix; else a block size that does not"
        " divide it is refused",
        group="Grid",
    )

    def __post_init__(self) -> None:
        check_values(self)

    @property
    def codes(self) -> tuple[int, int]:
        """The smallest and the largest code."""
        top = 2 ** (self.bits - 1) - 1
        return (-top, top) if self.symmetric else (0, 2**self.bits - 1)

    def check(self, shape: tuple[int, int]) -> None:
        """Raises: BadInput if the blocks do not divide the matrix and `pad` is off."""
        if not self.pad and not self.block.divides(shape):
            raise BadInput(
                f"blocks of {self.block} do not divide a matrix of shape (out {shape[0]}, in"
                f" {shape[1]}); choose a size that does, or pad."
            )

    def bits_per_weight(self, shape: tuple[int, int]) -> float:
        """What an entry of such a matrix costs with its share of scales and offsets, at SCALE_BITS
        each.
        """
        stored = prod(self.block.counts(shape)) * SCALE_BITS * (1 if self.symmetric else 2)
        return self.bits + stored / prod(shape)


@dataclass(frozen=True, eq=False)
class Quantized:
    """A matrix on its grid. Shapes: codes (out, in); scale and zero as `grid.block.counts(shape)`.

    An entry is (code - zero) * scale. zero is 0 if symmetric; else it is not rounded, so that the
    least and the greatest entry of a block lie on its grid. codes are int8 where they fit, else
    int32.
    """

    codes: Integer[Tensor, "out in"]
    scale: Float[Tensor, "*blocks"]
    zero: Float[Tensor, "*blocks"]
    grid: Grid
    shape: tuple[int, int]

    def dequantize(self) -> Float[Tensor, "out in"]:
        """The matrix, float32."""
        block = self.grid.block
        steps = block.split(self.codes.float())
        values = (steps - self.zero[..., None]) * self.scale[..., None]
        return block.join(values, self.shape).contiguous()


@torch.no_grad()
def quantize_matrix(
    matrix: Float[Tensor, "out in"], grid: Grid, low: Limit = None, high: Limit = None
) -> Quantized:
    """Round every entry to the nearest level of its block, in float32.

    low, high: entries outside are set to these before the scales are taken: a number, or one for
    each block, shaped like the scales. A size that does not divide is padded, so that the last
    blocks hold fewer entries, or refused without `grid.pad`.
    Raises: BadInput for the size; SurgeonError for entries that are NaN or infinite.
    """
    shape = (matrix.shape[0], matrix.shape[1])
    grid.check(shape)
    wide = matrix.detach().float()
    if not bool(torch.isfinite(wide).all()):
        raise SurgeonError(
            "the matrix holds NaN or infinity, which no grid can hold; download or write the"
            " checkpoint again."
        )
    blocks = limited(grid.block.split(wide), low, high)
    # NaN is padding here: it may be neither the least nor the greatest
    least = blocks.nan_to_num(nan=torch.inf).amin(-1)
    most = blocks.nan_to_num(nan=-torch.inf).amax(-1)
    first, last = grid.codes
    if grid.symmetric:
        scale = torch.maximum(most, -least) / last
        scale = torch.where(scale > 0, scale, 1.0)  # a block of zeros
        zero = torch.zeros_like(scale)
    else:
        scale = (most - least) / last
        # a block of one value: that value is its first step
        flat = torch.where(least == 0, 1.0, least.abs())
        scale = torch.where(scale > 0, scale, flat)
        zero = -least / scale
    steps = (blocks / scale[..., None] + zero[..., None]).round_()
    codes = steps.clamp_(first, last).nan_to_num_(nan=0.0)
    # codes 0 to 255 do not fit int8
    kind = torch.int8 if grid.symmetric or grid.bits < 8 else torch.int32
    return Quantized(grid.block.join(codes, shape).to(kind).contiguous(), scale, zero, grid, shape)


def limited(blocks: Tensor, low: Limit, high: Limit) -> Tensor:
    """The blocks with their entries moved into [low, high]; None is no limit."""
    for limit, bound in ((low, torch.maximum), (high, torch.minimum)):
        if limit is not None:
            each = limit[..., None] if isinstance(limit, Tensor) else torch.tensor(limit)
            blocks = bound(blocks, each.to(blocks))
    return blocks
