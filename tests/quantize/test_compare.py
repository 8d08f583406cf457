"""The table of methods against runs by hand, and the Pareto front."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import tiny_model

from surgeon import Anatomy, Entry, mean_nll
from surgeon.measure import Reference
from surgeon.quantize import (
    METHODS,
    Block,
    Grid,
    QuantizeConfig,
    Row,
    input_mean_squares,
    pareto,
    quantized,
    quantized_sites,
    sweep,
    table,
)
from surgeon.result import as_json

WINDOWS = torch.randint(3, 99, (4, 16), generator=torch.Generator().manual_seed(0))
CONFIG = QuantizeConfig(Grid(3, block=Block.parse("flat:256")))


@pytest.fixture(scope="module")
def reference(anatomy: Anatomy) -> Reference:
    return Reference(anatomy.model, WINDOWS)


@pytest.fixture(scope="module")
def anatomy() -> Anatomy:
    model = tiny_model("llama")
    model.get_parameter("model.layers.0.mlp.down_proj.weight")[5, 7] = 30.0
    return Anatomy.of(model)


ENTRY = Entry.parse("L0.mlp.down[5, 7]")


def test_each_row_is_what_the_model_does_so_quantized(anatomy: Anatomy, reference: Reference):
    judged = table(
        anatomy,
        reference,
        CONFIG,
        [ENTRY],
        examine=lambda: {"weight": float(anatomy.view(ENTRY.site).read()[5, 7])},
    )
    rows = [one.row for one in judged]
    assert [r.method for r in rows] == list(METHODS)
    for row, weights in ((one.row, one.weights) for one in judged):
        with quantized(anatomy, replace(CONFIG, method=row.method), [ENTRY]) as result:
            assert row.nll == mean_nll(anatomy.model, WINDOWS)
            assert row.accuracy == {"weight": float(anatomy.view(ENTRY.site).read()[5, 7])}
        moved = reference.compare(
            lambda row=row: quantized(anatomy, replace(CONFIG, method=row.method), [ENTRY])
        )
        assert (row.kl, row.top1_agreement, row.bits_per_weight) == (
            moved.kl,
            moved.top1_agreement,
            result.bits_per_weight,
        )
        assert weights == result
        assert as_json(row).keys() == {
            "method",
            "bits",
            "block",
            "bits_per_weight",
            "nll",
            "kl",
            "top1_agreement",
            "accuracy",
        }
    by = {r.method: r for r in rows}
    assert by["restore"].accuracy == pytest.approx(
        by["rtn"].accuracy, rel=1e-6
    )  # no clipping, so nothing to put back
    assert by["clip"].accuracy["weight"] < 3
    assert by["holdout"].accuracy["weight"] == 30.0
    assert by["holdout"].kl < by["rtn"].kl


def test_a_sweep_is_its_tables(anatomy: Anatomy, reference: Reference):
    told: list[tuple[str, int, int]] = []
    rows = sweep(
        anatomy,
        reference,
        CONFIG,
        [Grid(n, block=Block(kind)) for n in (8, 3) for kind in ("tensor", "channel")],
        [ENTRY],
        progress=lambda *a: told.append(a),
    )
    assert [(r.bits, r.block, r.method) for r in rows] == [
        (b, k, m) for b in (8, 3) for k in ("tensor", "channel") for m in METHODS
    ]
    one = table(anatomy, reference, replace(CONFIG, grid=Grid(3, block=Block("channel"))), [ENTRY])
    assert rows[-4:] == [judged.row for judged in one]
    assert told[-1] == ("methods", 16, 16)


def row(bits: float, nll: float | None) -> Row:
    return Row("rtn", 4, "tensor", bits, nll, 0.0, 1.0, {})


def test_the_front_holds_what_nothing_beats():
    rows = [
        row(8.0, 1.0),
        row(4.0, 1.5),
        row(4.0, 1.4),
        row(4.5, 1.45),
        row(3.0, 9.0),
        row(5.0, 1.0),
        row(2.0, None),
    ]
    assert [(r.bits_per_weight, r.nll) for r in pareto(rows)] == [(3, 9.0), (4, 1.4), (5, 1.0)]


def test_a_weighted_search_minds_the_inputs(anatomy: Anatomy, reference: Reference):
    squares = input_mean_squares(anatomy, WINDOWS, quantized_sites(anatomy, CONFIG))
    plain, weighted = (
        table(
            anatomy, reference, replace(CONFIG, weighted=w), [ENTRY], squares, methods=["holdout"]
        )[0]
        for w in (False, True)
    )
    chosen = [{s: m.clip for s, m in r.weights.matrices.items()} for r in (plain, weighted)]
    assert chosen[0] != chosen[1]
