"""Clipping against brute force, and what putting back is worth with it and without."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from surgeon import Entry, Site
from surgeon.errors import BadInput
from surgeon.quantize import METHODS, Block, Grid, QuantizeConfig, quantize_matrix, treat
from surgeon.quantize.clip import PERCENTS, SHARES, Z_SCORES, clipping

SITE = Site(0, "mlp.down")
ENTRY = Entry(SITE, 2, 3)


def planted(seed: int = 0) -> torch.Tensor:
    matrix = torch.randn(16, 24, generator=torch.Generator().manual_seed(seed))
    matrix[2, 3] = 60.0
    return matrix


def config(block: str = "tensor", **settings: object) -> QuantizeConfig:
    bits = settings.pop("bits", 4)
    symmetric = settings.pop("symmetric", True)
    return QuantizeConfig(Grid(bits, symmetric, Block.parse(block)), **settings)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_putting_back_an_extremum_without_clipping_does_nothing(
    symmetric: bool, dtype: torch.dtype
):
    """The extremum of a block lies on its grid, so rounding leaves it: in bfloat16 bit for bit, in
    float32 to the last place.
    """
    matrix = planted().to(dtype)
    for block in ("tensor", "channel", "flat:64", "square:8", "group:8"):
        rounded, restored = (
            treat(matrix, config(block, method=m, symmetric=symmetric), [ENTRY]).matrix
            for m in ("rtn", "restore")
        )
        if dtype == torch.bfloat16:
            assert torch.equal(rounded.to(dtype), restored.to(dtype))
        torch.testing.assert_close(rounded, restored, rtol=3e-7, atol=0)


def test_putting_back_after_clipping_is_what_helps():
    matrix = planted()
    errors = {
        m: float((treat(matrix, config(method=m), [ENTRY]).matrix - matrix).square().mean())
        for m in METHODS
    }
    assert errors["restore"] == pytest.approx(errors["rtn"], rel=1e-5)
    assert errors["holdout"] < 0.1 * errors["rtn"]
    assert errors["clip"] > errors["rtn"]  # the one weight is gone


def test_both_is_clip_then_round_then_put_back():
    matrix = planted()
    done = treat(matrix, config(clip_value=2.0), [ENTRY])
    others = np.delete(matrix.double().numpy().reshape(-1), 2 * 24 + 3)
    low, high = others.mean() - 2 * others.std(), others.mean() + 2 * others.std()
    by_hand = quantize_matrix(matrix.clamp(low, high), done.quantized.grid).dequantize()
    by_hand[2, 3] = 60.0
    torch.testing.assert_close(done.matrix, by_hand)
    assert done.report.clipped == int(((matrix < low) | (matrix > high)).sum())
    assert (done.report.held, done.report.clip) == (1, 2.0)
    codes = done.quantized.dequantize()
    assert codes[2, 3] == pytest.approx(
        high, rel=1e-5
    )  # the codes do not know the entry; it is put back beside them


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_held_without_critical_entries(method: str):
    matrix = torch.randn(8, 8)
    done = treat(matrix, config(method=method))
    assert done.report.held == 0
    assert (done.report.clip is not None) == (method in ("clip", "holdout"))


@pytest.mark.parametrize("per", ["tensor", "block"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("clip", "values"), [("z", Z_SCORES), ("percentile", PERCENTS)])
def test_the_search_finds_the_value_of_least_error(
    clip: str, values: tuple[float, ...], weighted: bool, per: str
):
    """Brute force: every value given by hand, its error on the ordinary entries measured from
    outside.
    """
    matrix = planted(3)
    importance = torch.linspace(0.01, 3, 24) if weighted else None
    settings = config("group:8", clip=clip, clip_per=per, weighted=weighted, bits=3)
    done = treat(matrix, settings, [ENTRY], importance)

    def error(result: torch.Tensor) -> float:
        squares = (result - matrix).double().square() * (1 if importance is None else importance)
        squares[2, 3] = 0
        return float(squares.sum())

    tried = {
        v: error(treat(matrix, replace(settings, clip_value=v), [ENTRY], importance).matrix)
        for v in values
    }
    assert error(done.matrix) <= min(tried.values()) * (1 + 1e-6)
    if done.report.clip in tried:
        assert tried[done.report.clip] == pytest.approx(min(tried.values()))
    size = matrix.double().square() * (1 if importance is None else importance)
    size[2, 3] = 0
    assert done.report.error == pytest.approx(error(done.matrix) / float(size.sum()))
    assert done.report.weighted == weighted


def test_weights_change_what_is_chosen():
    matrix = torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
    matrix[:, 0] *= 6
    loud = torch.full((32,), 1e-4)
    loud[0] = 100.0
    plain, weighted = (
        treat(matrix, config(weighted=w), (), loud).report.clip for w in (False, True)
    )
    assert weighted > plain  # the wide column is the one that is heard, so it must not be cut


@pytest.mark.parametrize("symmetric", [True, False])
def test_least_error_chooses_for_each_block_by_itself(symmetric: bool):
    matrix = torch.randn(6, 40, generator=torch.Generator().manual_seed(1)) + (
        0 if symmetric else 3
    )
    settings = config("channel", clip="mse", bits=3, symmetric=symmetric)
    done = treat(matrix, settings).matrix
    for row in range(6):
        alone = matrix[row : row + 1]
        tried = [treat(alone, replace(settings, clip_value=s)).matrix for s in SHARES]
        least = min(float((t - alone).square().sum()) for t in tried)
        assert float((done[row] - alone).square().sum()) == pytest.approx(least, rel=1e-5)


def test_the_hundredth_percentile_cuts_only_what_is_held():
    matrix = planted()
    done = treat(matrix, config(clip="percentile", clip_value=100.0), [ENTRY])
    assert done.report.clipped == 1


def test_percentiles_are_those_of_numpy():
    matrix = torch.randn(50, 41, generator=torch.Generator().manual_seed(0))
    clip = clipping(matrix, config(clip="percentile", clip_value=90.0))
    low = np.percentile(matrix.numpy(), 5, method="lower")
    high = np.percentile(matrix.numpy(), 95, method="higher")
    assert (clip.low, clip.high) == (pytest.approx(low), pytest.approx(high))


def test_a_block_of_held_entries_only_has_no_limit():
    matrix = torch.randn(4, 8)
    row = [Entry(SITE, 1, c) for c in range(8)]
    for clip in ("z", "percentile", "mse"):
        for per in ("tensor", "block"):
            done = treat(matrix, config("channel", clip=clip, clip_per=per), row).matrix
            assert torch.equal(done[1], matrix[1])
            assert bool(torch.isfinite(done).all())


def test_float64_entries_come_back_whole():
    matrix = planted().double()
    matrix[2, 3] += 1e-12
    assert treat(matrix, config(), [ENTRY]).matrix[2, 3] == matrix[2, 3]


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "gptq"},
        {"clip": "sigma"},
        {"clip_value": 0.0},
        {"clip": "percentile", "clip_value": 101.0},
        {"clip": "mse", "clip_value": 2.0},
        {"clip": "none", "clip_value": 1.0},
        {"clip_per": "row"},
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, object]):
    with pytest.raises(BadInput):
        QuantizeConfig(**settings)
