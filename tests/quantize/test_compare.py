"""The table of methods against runs by hand, its peers, and the Pareto front."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import tiny_model

from surgeon import Anatomy, Entry, load_model, mean_nll
from surgeon.quantize import (
    METHODS,
    Block,
    Grid,
    QuantizeConfig,
    Row,
    input_mean_squares,
    missing_peers,
    pareto,
    quantized,
    quantized_sites,
    sweep,
    table,
)
from surgeon.quantize.peers import (
    GPTQ,
    PEERS,
    Peer,
    _installed,
    gptq_tensors,
    has_gptq,
    peer_tensors,
)

WINDOWS = torch.randint(3, 99, (4, 16), generator=torch.Generator().manual_seed(0))
CONFIG = QuantizeConfig(Grid(3, block=Block.parse("flat:256")))


@pytest.fixture(scope="module")
def anatomy() -> Anatomy:
    model = tiny_model("llama")
    model.get_parameter("model.layers.0.mlp.down_proj.weight")[5, 7] = 30.0
    return Anatomy.of(model)


ENTRY = Entry.parse("L0.mlp.down[5, 7]")


def test_each_row_is_what_the_model_does_so_quantized(anatomy: Anatomy):
    rows = table(
        anatomy,
        WINDOWS,
        CONFIG,
        [ENTRY],
        examine=lambda: {"weight": float(anatomy.view(ENTRY.site).read()[5, 7])},
    )
    assert [r.method for r in rows] == list(METHODS)
    for row in rows:
        with quantized(anatomy, replace(CONFIG, method=row.method), [ENTRY]) as result:
            assert row.nll == mean_nll(anatomy.model, WINDOWS)
            assert row.accuracy == {"weight": float(anatomy.view(ENTRY.site).read()[5, 7])}
        moved = divergence(
            anatomy.model,
            WINDOWS,
            lambda row=row: quantized(anatomy, replace(CONFIG, method=row.method), [ENTRY]),
        )
        assert (row.kl, row.top1_agreement, row.bits_per_weight) == (
            moved.kl,
            moved.top1_agreement,
            result.bits_per_weight,
        )
        assert row.result is not None
        assert row.to_json().keys() == {
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
    assert by["both"].accuracy["weight"] == 30.0
    assert by["both"].kl < by["rtn"].kl


def test_a_sweep_is_its_tables(anatomy: Anatomy, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("surgeon.quantize.compare.PEERS", {})
    told: list[tuple[str, int, int]] = []
    rows = sweep(
        anatomy,
        WINDOWS,
        CONFIG,
        (8, 3),
        [Block("tensor"), Block("channel")],
        [ENTRY],
        progress=lambda *a: told.append(a),
    )
    assert [(r.bits, r.block, r.method) for r in rows] == [
        (b, k, m) for b in (8, 3) for k in ("tensor", "channel") for m in METHODS
    ]
    one = table(anatomy, WINDOWS, replace(CONFIG, grid=Grid(3, block=Block("channel"))), [ENTRY])
    assert [r.to_json() for r in rows[-4:]] == [r.to_json() for r in one]
    assert told[-1] == ("sweep", 4, 4)


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


def test_a_peer_is_put_into_the_model_matrix_by_matrix(anatomy: Anatomy):
    doubled = Peer("json", (4,), True, lambda matrix, bits, group: matrix * 2)
    sites = quantized_sites(anatomy, CONFIG)
    found = peer_tensors(anatomy, doubled, 4, Block("group", 16), sites)
    assert found is not None
    tensors, stored = found
    assert stored == 4 + 32 / 16
    assert all(torch.equal(t, anatomy.model.get_parameter(name) * 2) for name, t in tensors.items())
    assert peer_tensors(anatomy, doubled, 3, Block("group", 16), sites) is None
    assert peer_tensors(anatomy, doubled, 4, Block("square", 16), sites) is None
    assert peer_tensors(anatomy, doubled, 4, Block("group", 5), sites) is None  # peers do not pad
    assert (
        peer_tensors(anatomy, replace(doubled, package="no_such"), 4, Block("channel"), sites)
        is None
    )


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("group", [None, 16])
def test_an_installed_peer_rounds_about_as_well_as_we_do(
    name: str, group: int | None, anatomy: Anatomy
):
    """Its adapter is right if its error is of the size of ours on the same grid; a wrong axis or
    shape would be far off.
    """
    peer = PEERS[name]
    if not _installed(peer.package):
        pytest.skip(f"{name} is not installed")
    block = Block("channel") if group is None else Block("group", group)
    site = anatomy.resolve("L1.mlp.down")
    found = peer_tensors(anatomy, peer, 4, block, [site])
    assert found is not None
    (theirs,) = found[0].values()
    weight = anatomy.view(site).read()
    with quantized(anatomy, QuantizeConfig(Grid(4, block=block), "rtn", roles=("mlp.down",))):
        ours = float((anatomy.view(site).read() - weight).square().mean())
    assert 0 < float((theirs - weight).square().mean()) < 1.5 * ours
    assert len(theirs[0, :16].unique()) <= 16


@pytest.mark.skipif(not has_gptq(), reason="llm-compressor is not installed")
def test_gptq_rounds_to_its_grid_on_its_text(tmp_path: Path):
    tiny_model("llama").save_pretrained(tmp_path)
    loaded = Anatomy.of(
        load_model(str(tmp_path)).model
    )  # llm-compressor asks for the folder that a model is from
    before = loaded.view("L1.mlp.down").read().clone()
    sites = quantized_sites(loaded, CONFIG)
    found = gptq_tensors(loaded, 4, Block("group", 16), sites, WINDOWS)
    assert found is not None
    weights = found[0]["model.layers.1.mlp.down_proj.weight"]
    assert len(weights[0, :16].unique()) <= 16
    assert 0 < float((weights - before).abs().max()) < 0.5 * float(before.abs().max())
    assert set(found[0]) == {loaded.addresses[s].parameter for s in sites}
    assert found[1] == 4 + 16 / 16
    assert torch.equal(loaded.view("L1.mlp.down").read(), before)
    assert gptq_tensors(loaded, 4, Block("square", 16), sites, WINDOWS) is None


def test_absent_peers_are_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("surgeon.quantize.peers.find_spec", lambda package: None)
    notes = " ".join(missing_peers())
    for name in (*PEERS, GPTQ):
        assert f"{name} is not measured" in notes
    assert all(n.endswith(".") for n in missing_peers())


def test_a_weighted_search_minds_the_inputs(anatomy: Anatomy):
    squares = input_mean_squares(anatomy, WINDOWS, quantized_sites(anatomy, CONFIG))
    plain, weighted = (
        table(anatomy, WINDOWS, replace(CONFIG, weighted=w), [ENTRY], squares, methods=["both"])[0]
        for w in (False, True)
    )
    assert plain.result is not None
    assert weighted.result is not None
    chosen = [{str(s): m.clip for s, m in r.result.matrices.items()} for r in (plain, weighted)]
    assert chosen[0] != chosen[1]
