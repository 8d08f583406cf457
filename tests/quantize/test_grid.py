"""Round to nearest against a plain loop over blocks, and what the levels promise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from surgeon.errors import BadInput, SurgeonError
from surgeon.quantize import Block, Grid, quantize_matrix

BLOCKS = (
    "tensor",
    "channel",
    "group:5",
    "group:64",
    "flat:16",
    "flat:1000",
    "square:4",
    "square:64",
)


def members(block: Block, n_out: int, n_in: int) -> list[list[tuple[int, int]]]:
    """The entries of each block, by the definition of its kind, one by one."""
    cells = [(r, c) for r in range(n_out) for c in range(n_in)]
    size = block.size or 1
    key = {
        "tensor": lambda r, c: 0,
        "channel": lambda r, c: r,
        "group": lambda r, c: (r, c // size),
        "flat": lambda r, c: (r * n_in + c) // size,
        "square": lambda r, c: (r // size, c // size),
    }[block.kind]
    found: dict[object, list[tuple[int, int]]] = {}
    for r, c in cells:
        found.setdefault(key(r, c), []).append((r, c))
    return list(found.values())


def by_hand(matrix: np.ndarray, grid: Grid) -> np.ndarray:
    """Every entry moved to the nearest of its block's levels, the levels listed one by one, in
    float64.
    """
    result = np.empty_like(matrix)
    for cells in members(grid.block, *matrix.shape):
        values = np.array([matrix[cell] for cell in cells])
        if grid.symmetric:
            top = 2 ** (grid.bits - 1) - 1
            levels = np.arange(-top, top + 1) * np.abs(values).max() / top
        else:
            levels = np.linspace(values.min(), values.max(), 2**grid.bits)
        nearest = levels[np.abs(values[:, None] - levels[None]).argmin(1)]
        for cell, value in zip(cells, nearest, strict=True):
            result[cell] = value
    return result


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block", BLOCKS)
def test_every_entry_goes_to_the_nearest_level_of_its_block(block: str, symmetric: bool):
    matrix = torch.randn(11, 13, generator=torch.Generator().manual_seed(0))
    for bits in (2, 3, 4, 8):
        grid = Grid(bits, symmetric, Block.parse(block))
        expected = by_hand(matrix.double().numpy(), grid)
        quantized = quantize_matrix(matrix, grid)
        np.testing.assert_allclose(quantized.dequantize().numpy(), expected, atol=1e-5)
        assert quantized.scale.shape == grid.block.counts((11, 13))
        assert len(members(grid.block, 11, 13)) == quantized.scale.numel()
        first, last = grid.codes
        assert int(quantized.codes.min()) >= first
        assert int(quantized.codes.max()) <= last
        assert last - first == (2**bits - 2 if symmetric else 2**bits - 1)


def test_flat_runs_and_square_tiles_are_not_the_same():
    matrix = torch.zeros(4, 4)
    matrix[0, 3] = 100.0
    matrix[3] = torch.tensor([1.0, 0.9, 0.0, 0.0])
    matrix[1, 0] = 0.4
    flat, square = (
        quantize_matrix(matrix, Grid(4, block=Block.parse(b))).dequantize()
        for b in ("flat:4", "square:2")
    )
    assert flat[1, 0] == pytest.approx(0.4)  # its run is its row
    assert square[1, 0] == pytest.approx(0.4)  # its tile is the upper left one, without the 100
    whole = quantize_matrix(matrix, Grid(4, block=Block.parse("flat:8"))).dequantize()
    assert whole[1, 0] == 0  # the run of 8 takes in the 100; the tile of 2 x 2 does not
    assert quantize_matrix(matrix, Grid(4, block=Block.parse("tensor"))).dequantize()[3, 0] == 0


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.sampled_from(BLOCKS),
    st.integers(2, 8),
    st.booleans(),
    st.floats(-1e3, 1e3),
    st.integers(0, 99),
)
def test_the_error_is_at_most_half_a_step(
    n_out: int, n_in: int, block: str, bits: int, symmetric: bool, shift: float, seed: int
):
    matrix = torch.randn(n_out, n_in, generator=torch.Generator().manual_seed(seed)) + shift
    grid = Grid(bits, symmetric, Block.parse(block))
    quantized = quantize_matrix(matrix, grid)
    step = grid.block.join(
        quantized.scale[..., None].expand_as(grid.block.split(matrix)), (n_out, n_in)
    )
    error = (quantized.dequantize() - matrix).abs()
    assert bool((error <= step / 2 + 4e-6 * (1 + matrix.abs().max())).all())
    again = quantize_matrix(quantized.dequantize(), grid).dequantize()
    assert torch.allclose(
        again, quantized.dequantize(), atol=1e-5 * (1 + float(matrix.abs().max()))
    )


@pytest.mark.parametrize("symmetric", [True, False])
def test_blocks_of_one_value_and_of_zeros_are_exact(symmetric: bool):
    matrix = torch.tensor([[0.0, 0.0], [-3.0, -3.0], [5.0, 5.0]])
    assert torch.equal(
        quantize_matrix(matrix, Grid(3, symmetric, Block("channel"))).dequantize(), matrix
    )


def test_limits_hold_for_each_block():
    matrix = torch.tensor([[1.0, 9.0], [-9.0, 2.0]])
    quantized = quantize_matrix(
        matrix,
        Grid(8, block=Block("channel")),
        torch.tensor([[-5.0], [-4.0]]),
        torch.tensor([[3.0], [9.0]]),
    )
    assert torch.allclose(
        quantized.dequantize(), torch.tensor([[1.0, 3.0], [-4.0, 2.0]]), atol=0.02
    )


def test_a_size_that_does_not_divide_is_padded_or_refused_and_never_the_whole():
    matrix = torch.randn(4, 10)
    assert quantize_matrix(matrix, Grid(4, block=Block.parse("group:4"))).scale.shape == (4, 3)
    for block in ("group:4", "flat:12", "square:3"):
        with pytest.raises(BadInput, match=f"{block} do not divide"):
            quantize_matrix(matrix, Grid(4, block=Block.parse(block), pad=False))
    assert quantize_matrix(
        matrix, Grid(4, block=Block.parse("group:5"), pad=False)
    ).scale.shape == (4, 2)


def test_what_a_weight_costs():
    assert Grid(4, block=Block.parse("group:8")).bits_per_weight((4, 16)) == 4 + 16 / 8
    assert Grid(4, False, Block("channel")).bits_per_weight((4, 16)) == 4 + 32 / 16
    assert Grid(3, block=Block("tensor")).bits_per_weight((4, 16)) == 3 + 16 / 64


@pytest.mark.parametrize(
    "text", ["group", "group:0", "tensor:4", "square:x", "rows", "flat:-3", ""]
)
def test_no_block_says_what_one_is(text: str):
    with pytest.raises(BadInput, match=r"no block"):
        Block.parse(text)


def test_what_cannot_be_rounded_is_refused():
    for bits, said in ((1, "it must be at least 2"), (9, "it must be at most 8")):
        with pytest.raises(BadInput, match=said):
            Grid(bits)
    with pytest.raises(SurgeonError, match="NaN or infinity"):
        quantize_matrix(torch.tensor([[1.0, torch.nan]]), Grid(4))


def test_blocks_read_as_they_are_written():
    for text in BLOCKS:
        assert str(Block.parse(text)) == text
