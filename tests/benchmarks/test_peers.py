"""The other quantizers of benchmarks/quantize.py: put into the model as ours are, and as good as
they are by themselves.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bench import benchmark
from tiny import tiny_model

from surgeon import Anatomy, load_model
from surgeon.quantize import Block, Grid, QuantizeConfig, quantized, quantized_sites

peers = benchmark("peers")
WINDOWS = torch.randint(3, 99, (4, 16), generator=torch.Generator().manual_seed(0))
CONFIG = QuantizeConfig(Grid(3))


@pytest.fixture(scope="module")
def anatomy() -> Anatomy:
    return Anatomy.of(tiny_model("llama"))


def test_a_peer_is_put_into_the_model_matrix_by_matrix(anatomy: Anatomy):
    doubled = peers.Peer("json", (4,), True, lambda matrix, bits, group: matrix * 2)
    sites = quantized_sites(anatomy, CONFIG)
    found = peers.peer_tensors(anatomy, doubled, 4, Block("group", 16), sites)
    assert found is not None
    tensors, stored = found
    assert stored == 4 + 32 / 16
    assert all(torch.equal(t, anatomy.model.get_parameter(name) * 2) for name, t in tensors.items())
    assert peers.peer_tensors(anatomy, doubled, 3, Block("group", 16), sites) is None
    assert peers.peer_tensors(anatomy, doubled, 4, Block("square", 16), sites) is None
    assert (
        peers.peer_tensors(anatomy, doubled, 4, Block("group", 5), sites) is None
    )  # peers do not pad
    assert (
        peers.peer_tensors(anatomy, replace(doubled, package="no_such"), 4, Block("channel"), sites)
        is None
    )


@pytest.mark.parametrize("name", peers.PEERS)
@pytest.mark.parametrize("group", [None, 16])
def test_an_installed_peer_rounds_about_as_well_as_we_do(
    name: str, group: int | None, anatomy: Anatomy
):
    """Its adapter is right if its error is of the size of ours on the same grid; a wrong axis or
    shape would be far off.
    """
    peer = peers.PEERS[name]
    if not peers.installed(peer.package):
        pytest.skip(f"{name} is not installed")
    block = Block("channel") if group is None else Block("group", group)
    site = anatomy.resolve("L1.mlp.down")
    found = peers.peer_tensors(anatomy, peer, 4, block, [site])
    assert found is not None
    (theirs,) = found[0].values()
    weight = anatomy.view(site).read()
    with quantized(anatomy, QuantizeConfig(Grid(4, block=block), "rtn", roles=("mlp.down",))):
        ours = float((anatomy.view(site).read() - weight).square().mean())
    assert 0 < float((theirs - weight).square().mean()) < 1.5 * ours
    assert len(theirs[0, :16].unique()) <= 16


@pytest.mark.skipif(not peers.has_gptq(), reason="llm-compressor is not installed")
def test_gptq_rounds_to_its_grid_on_its_text(tmp_path: Path):
    tiny_model("llama").save_pretrained(tmp_path)
    loaded = Anatomy.of(
        load_model(str(tmp_path)).model
    )  # llm-compressor asks for the folder that a model is from
    before = loaded.view("L1.mlp.down").read().clone()
    sites = quantized_sites(loaded, CONFIG)
    found = peers.gptq_tensors(loaded, 4, Block("group", 16), sites, WINDOWS)
    assert found is not None
    weights = found[0]["model.layers.1.mlp.down_proj.weight"]
    assert len(weights[0, :16].unique()) <= 16
    assert 0 < float((weights - before).abs().max()) < 0.5 * float(before.abs().max())
    assert set(found[0]) == {loaded.addresses[s].parameter for s in sites}
    assert found[1] == 4 + 16 / 16
    assert torch.equal(loaded.view("L1.mlp.down").read(), before)
    assert peers.gptq_tensors(loaded, 4, Block("square", 16), sites, WINDOWS) is None


def test_absent_peers_are_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(peers, "find_spec", lambda package: None)
    notes = " ".join(peers.missing_peers())
    for name in (*peers.PEERS, peers.GPTQ):
        assert f"{name} is not measured" in notes
    assert all(n.endswith(".") for n in peers.missing_peers())


def test_all_that_can_do_it_are_asked(anatomy: Anatomy, monkeypatch: pytest.MonkeyPatch):
    sites = quantized_sites(anatomy, CONFIG)
    halved = peers.Peer("json", (4,), True, lambda matrix, bits, group: matrix / 2)
    absent = peers.Peer("no_such", (4,), True, lambda matrix, bits, group: matrix)
    monkeypatch.setattr(peers, "PEERS", {"halved": halved, "absent": absent})
    monkeypatch.setattr(peers, "has_gptq", lambda: False)
    ((name, (tensors, stored)),) = peers.all_peers(
        anatomy, 4, Block("group", 16), sites, WINDOWS
    ).items()
    assert (name, stored) == ("halved", 6)
    assert all(torch.equal(t, anatomy.model.get_parameter(n) / 2) for n, t in tensors.items())
