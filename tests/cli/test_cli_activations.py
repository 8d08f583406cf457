"""`surgeon quantize --activations`: the table beside that of the weights, and what it cannot be
joined with.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from surgeon import Anatomy, Entry, load_corpus, load_model, mean_nll, read_text
from surgeon.quantize import (
    ActivationConfig,
    Block,
    Grid,
    QuantizeConfig,
    quantized,
    quantized_activations,
)

ENTRY = "L0.mlp.down[5, 7]"  # planted in the tests' checkpoint
CALL = (
    "--bits",
    "8",
    "--block",
    "channel",
    "--method",
    "rtn",
    "--critical",
    ENTRY,
    "--window",
    "16",
    "--windows",
    "4",
    "--activations",
)


def test_the_table_is_judged_end_to_end(folder: Path, text: Path, surgeon):
    result = surgeon("quantize", folder, *CALL, "INT4", "--hold", "2", "--text", text, "--json")
    assert (result.status, result.err) == (0, "")
    table = json.loads(result.out)["activations"]
    assert [(r["per"], r["method"], r["smooth"]) for r in table["rows"]] == [
        (per, method, smooth)
        for per in ("tensor", "token")
        for method, smooth in (
            ("naive", None),
            ("holdout", None),
            ("control", None),
            ("naive", "norms"),
            ("holdout", "norms"),
        )
    ]
    assert (table["config"]["bits"], table["config"]["hold"]) == (4, 2)
    assert (table["fitted_on"], table["judged_on"]) == (2, 2)
    assert table["nll"]["intact"] == pytest.approx(json.loads(result.out)["base"]["nll"], abs=1e-6)
    loaded = load_model(str(folder))
    anatomy = Anatomy.of(loaded.model)
    judged = load_corpus(loaded.tokenizer, read_text(text), "t", 16, 4).windows[2:]
    critical = [Entry.parse(ENTRY)]
    weights = QuantizeConfig(Grid(8, block=Block("channel")), "rtn")
    with (
        quantized(anatomy, weights),
        quantized_activations(anatomy, ActivationConfig(4, "tensor", "holdout", hold=2), critical),
    ):
        row = next(r for r in table["rows"] if (r["method"], r["per"]) == ("holdout", "tensor"))
        assert row["nll"] == pytest.approx(mean_nll(loaded.model, judged), abs=1e-6)


def test_in_words(folder: Path, text: Path, surgeon):
    result = surgeon("quantize", folder, *CALL, "INT8", "--text", text)
    assert result.status == 0
    for word in (
        "activations of 8 bits",
        "on 2 windows",
        "naive",
        "holdout",
        "control",
        "smoothed (norms)",
        "6 norms folded",
    ):
        assert word in result.out, word


@pytest.mark.parametrize("other", [("--sweep",), ("--stream", "-o", "out")])
def test_one_table_at_a_time(folder: Path, text: Path, surgeon, other: tuple[str, ...]):
    result = surgeon("quantize", folder, *CALL, "INT8", "--text", text, *other)
    assert result.status == 2
    assert "--activations" in result.err
