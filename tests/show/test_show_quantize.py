"""Quantization as pictures and text, from results made here."""

from __future__ import annotations

from dataclasses import replace

import pytest
from made_results import quantize_result

from surgeon.quantize import Row
from surgeon.show.pictures import headline_of, pictures_of
from surgeon.show.text import print_result

SWEPT = replace(
    quantize_result("patient"),
    table=[
        Row("rtn", 8, "tensor", 8.0, 0.7, 0.0, 1.0, {"patient": 0.5}),
        Row("clip", 4, "tensor", 4.0, 0.9, 0.1, 0.9, {"patient": 0.5}),
        Row("holdout", 4, "tensor", 4.1, 0.95, 0.1, 0.9, {"patient": 0.5}),
        Row("rtn", 3, "tensor", 3.0, None, None, 0.1, {"patient": 0.5}),
    ],
    weights=None,
    activations=None,
    export=None,
    gguf=None,
)


def test_a_sweep_is_a_chart_with_its_front() -> None:
    (picture,) = pictures_of(SWEPT)
    assert picture.headline.startswith("2 of 4 ways to quantize are beaten by no other")
    assert picture.chart is not None
    # the one that is not finite has no place in the chart, and stands in the table
    assert set(picture.chart.series) >= {"rounded", "clipped", "hold-out"}
    assert picture.table is not None
    assert len(picture.table.rows) == 4


def test_the_hold_out_stands_beside_its_halves() -> None:
    headline = headline_of(quantize_result("patient"))
    (claim,) = headline.claims
    assert claim.value == "+0.100 nats"
    assert claim.control == "clip-only: +0.200; restore-only: +0.400"


def test_what_was_kept_is_counted() -> None:
    written = pictures_of(quantize_result())[-1]
    assert written.about == "Matrices that were rounded: 1; kept as they were: 1."


def test_text(capsys: pytest.CaptureFixture[str]) -> None:
    print_result(quantize_result("m"))
    text = capsys.readouterr().out
    for said in (
        "m: 1 critical entry (m)",
        "NLL 0.7000 on 2 windows of m; the 8 before them are calibrated on",
        "not finite",
        "compared with clip-only +0.2000, restore-only +0.4000.",
        "The least NLL on this text is that of holdout.",
        "smoothed (norms): SmoothQuant, alpha 0.5, 2 norms folded",
        "m: sidecar, 1000 bytes",
        "llama-quantize --tensor-type 'm=q8_0'",
    ):
        assert said in " ".join(text.split()), said


def test_the_front_is_marked_in_a_sweep_only(capsys: pytest.CaptureFixture[str]) -> None:
    print_result(SWEPT)
    assert "* on the Pareto front" in capsys.readouterr().out
    print_result(quantize_result())
    assert "Pareto" not in capsys.readouterr().out


def test_a_streamed_model_has_no_table(capsys: pytest.CaptureFixture[str]) -> None:
    streamed = replace(quantize_result("m"), base=None, table=[], weights=None, activations=None)
    print_result(streamed)
    assert "NLL" not in capsys.readouterr().out
    assert streamed.rows() == []
    assert [picture.kind for picture in pictures_of(streamed)] == ["Written"]
    assert headline_of(streamed).sentence == "m, quantized"
