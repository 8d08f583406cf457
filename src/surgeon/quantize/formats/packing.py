"""Codes of 2 to 8 bits without gaps between them: eight codes make as many bytes as they have
bits.

How this works. Codes are counted from the least on, so that none is negative. Eight of them, each
shifted by its place times N bits, are added up in one 64-bit word, whose lowest N bytes are then
all that they are; the bytes of the words follow one another. Unpacking fills each N bytes up to a
word again. Both go through the matrix in chunks, since a code takes eight bytes on the way.
"""

from __future__ import annotations

import torch
from jaxtyping import Integer, UInt8
from torch import Tensor

from ..grid import Grid, Quantized

_CHUNK = 1 << 23  # codes at a time


def pack(codes: Integer[Tensor, "*shape"], grid: Grid) -> UInt8[Tensor, " bytes"]:
    """The codes, row by row, the first in the lowest bits; the last eight are filled up with
    zeros.
    """
    flat = codes.flatten()
    out = torch.empty(packed_size(len(flat), grid.bits), dtype=torch.uint8)
    shifts = torch.arange(8) * grid.bits
    for start in range(0, len(flat), _CHUNK):
        part = flat[start : start + _CHUNK].long() - grid.codes[0]
        part = torch.nn.functional.pad(part, (0, -len(part) % 8)).view(-1, 8)
        words = (part << shifts).sum(1)  # disjoint bits, so the sum is their union
        raw = words[:, None].view(torch.uint8)[:, : grid.bits]
        out[start // 8 * grid.bits :][: raw.numel()] = raw.flatten()
    return out


def unpack(
    packed: UInt8[Tensor, " bytes"], grid: Grid, shape: tuple[int, int]
) -> Integer[Tensor, "out in"]:
    """What `pack` packed. Raises: ValueError if it is not as long as codes of that shape are."""
    count = shape[0] * shape[1]
    if len(packed) != packed_size(count, grid.bits):
        raise ValueError(f"{len(packed)} bytes cannot be {count} codes of {grid.bits} bits")
    out = torch.empty(-(-count // 8) * 8, dtype=torch.int16, device=packed.device)
    shifts = torch.arange(8, device=packed.device) * grid.bits
    for start in range(0, len(out), _CHUNK):
        raw = packed[start // 8 * grid.bits :][: _CHUNK // 8 * grid.bits].view(-1, grid.bits)
        words = torch.nn.functional.pad(raw, (0, 8 - grid.bits)).view(torch.int64)
        out[start : start + _CHUNK] = (
            (words >> shifts) & (2**grid.bits - 1)
        ).flatten() + grid.codes[0]
    return out[:count].view(shape)


def packed_size(count: int, bits: int) -> int:
    """Bytes of `count` codes."""
    return -(-count // 8) * bits


def parts(pieces: list[Quantized]) -> dict[str, Tensor]:
    """Quantized matrices as the tensors of a file, one after the other: codes, scale, zero (where
    there is one), shapes (pieces, 2).
    """
    symmetric = pieces[0].grid.symmetric
    return {
        "codes": torch.cat([pack(q.codes, q.grid) for q in pieces]),
        "scale": torch.cat([q.scale.flatten() for q in pieces]),
        "shapes": torch.tensor([q.shape for q in pieces]),
    } | ({} if symmetric else {"zero": torch.cat([q.zero.flatten() for q in pieces])})


def pieces(parts: dict[str, Tensor], grid: Grid) -> list[Quantized]:
    """What `parts` put into a file. Raises: ValueError if its tensors do not fit one another."""
    matrices = []
    codes, scale, zero = (
        parts["codes"],
        parts["scale"],
        parts.get("zero", torch.zeros_like(parts["scale"])),
    )
    for n_out, n_in in parts["shapes"].tolist():
        size, blocks = packed_size(n_out * n_in, grid.bits), grid.block.counts((n_out, n_in))
        n_blocks = torch.Size(blocks).numel()
        matrices.append(
            Quantized(
                unpack(codes[:size], grid, (n_out, n_in)),
                scale[:n_blocks].view(blocks),
                zero[:n_blocks].view(blocks),
                grid,
                (n_out, n_in),
            )
        )
        codes, scale, zero = codes[size:], scale[n_blocks:], zero[n_blocks:]
    if len(codes) or len(scale) or len(zero):
        raise ValueError("there are more codes or scales than the shapes say")
    return matrices
