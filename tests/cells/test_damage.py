"""Damage against plain passes of a model whose weights were set to zero by hand."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from cells_tiny import tiny

from surgeon.anatomy import Region
from surgeon.cells.likelihood import MaskedNLL, by_cell, by_gene, by_group, masked_nll
from surgeon.cells.map import components
from surgeon.cells.planted import difference
from surgeon.errors import BadInput
from surgeon.find import VerifyConfig, verify


def judged() -> MaskedNLL:
    t = tiny()
    return MaskedNLL(t.model.anatomy, t.batch, t.masked)


@pytest.mark.parametrize(
    ("address", "parameter", "index"),
    [
        ("L0.mlp.down[3, 5]", "transformer_encoder.layers.0.linear2.weight", (3, 5)),
        ("L1.mlp.down[2, 7]", "transformer_encoder.layers.1.linear2.weight", (2, 7)),
        ("L1.norm.norm1[4, 0]", "transformer_encoder.layers.1.norm1.weight", 4),
        ("L0.norm.norm2.bias[1, 0]", "transformer_encoder.layers.0.norm2.bias", 1),
        ("norm.encoder.enc_norm[6, 0]", "encoder.enc_norm.weight", 6),
    ],
)
def test_damage_is_that_of_a_model_without_the_weight(address: str, parameter: str, index: object):
    t = tiny()
    broken = deepcopy(t.model)
    with torch.no_grad():
        broken.get_parameter(parameter)[index] = 0
    expected = masked_nll(broken, t.batch, t.masked) - masked_nll(t.model, t.batch, t.masked)
    found = judged().damage([Region.parse(address)])
    assert float(found.abs().nan_to_num().max()) > 1e-6
    torch.testing.assert_close(found, expected, equal_nan=True, atol=2e-6, rtol=0)


def test_verify_measures_cells_as_it_measures_text():
    t = tiny()
    before = {name: p.clone() for name, p in t.model.named_parameters()}
    at = ("L1.mlp.down[2, 7]", "L0.norm.norm1[5, 0]", "norm.encoder.enc_norm[6, 0]")
    parts = [Region.parse(address) for address in at]
    result = verify(t.model.anatomy, parts, judged(), VerifyConfig())
    broken = deepcopy(t.model)
    with torch.no_grad():
        broken.layers[1].linear2.weight[2, 7] = 0
    intact = by_cell(masked_nll(t.model, t.batch, t.masked))
    alone = by_cell(masked_nll(broken, t.batch, t.masked)) - intact
    assert result.base_nll == pytest.approx(float(intact.mean()), abs=1e-6)
    assert result.single_nats[0] == pytest.approx(float(alone.mean()), abs=1e-6)
    with torch.no_grad():
        broken.layers[0].norm1.weight[5] = 0
    but_one = by_cell(masked_nll(broken, t.batch, t.masked)) - intact
    assert result.leave_one_out_nats[2] == pytest.approx(float(but_one.mean()), abs=1e-6)
    assert result.tokens == int(t.masked.sum())
    assert result.restored_nats is None
    assert len(result.controls.nats) == 20
    assert all(torch.equal(before[name], p) for name, p in t.model.named_parameters())


def test_means_over_cells_genes_and_types_by_plain_loops():
    t = tiny()
    values = judged().intact
    genes: dict[str, list[float]] = {}
    cells: dict[int, list[float]] = {}
    for draw, cell, pos in t.masked.nonzero().tolist():
        v = float(values[draw, cell, pos])
        genes.setdefault(t.batch.gene_names[int(t.batch.genes[cell, pos])], []).append(v)
        cells.setdefault(cell, []).append(v)
    names, means, counts = by_gene(values, t.batch, 20)
    assert set(names) == {name for name, v in genes.items() if len(v) >= 20}
    for name, mean, count in zip(names, means.tolist(), counts, strict=True):
        assert mean == pytest.approx(sum(genes[name]) / len(genes[name]), abs=1e-6)
        assert count == len(genes[name])
    per_cell = by_cell(values)
    assert per_cell.tolist() == pytest.approx(
        [sum(cells[i]) / len(cells[i]) for i in range(len(cells))], abs=1e-6
    )
    even = [v for v, name in zip(per_cell.tolist(), t.types, strict=True) if name == "even"]
    assert by_group(per_cell, t.types)["even"] == pytest.approx(sum(even) / len(even))


def test_some_cells_are_damaged_as_they_are_among_all():
    t = tiny()
    at = torch.tensor([3, 20, 35])
    part = Region.parse("L1.mlp.down[2, 7]")
    alone = MaskedNLL(t.model.anatomy, t.batch.of(at), t.masked[:, at]).damage([part])
    among = judged().damage([part])[:, at]
    torch.testing.assert_close(alone, among, equal_nan=True, atol=2e-6, rtol=0)


def test_heads_and_blocks_against_weights_set_to_zero():
    t = tiny()
    found = {c.name: c.nats for c in components(t.model, judged())}
    assert set(found) == {
        f"L{layer}.{part}" for layer in range(2) for part in ("head0", "head1", "mlp")
    }
    for name, change in {
        "L1.head1": lambda layer: layer.self_attn.out_proj.weight[:, 16:].zero_(),
        "L0.mlp": lambda layer: (layer.linear2.weight.zero_(), layer.linear2.bias.zero_()),
    }.items():
        broken = deepcopy(t.model)
        with torch.no_grad():
            change(broken.layers[int(name[1])])
        expected = by_cell(
            masked_nll(broken, t.batch, t.masked) - masked_nll(t.model, t.batch, t.masked)
        ).mean()
        assert found[name] == pytest.approx(float(expected), abs=1e-5)
        assert abs(found[name]) > 1e-3
    assert difference(t.model, deepcopy(t.model), t.batch) == 0


def test_addresses_that_are_not_there_are_refused():
    anatomy = tiny().model.anatomy
    wrong = {
        "L2.mlp.down[0, 0]": "has 2 layers",
        "L0.mlp.down[32, 0]": "out 32, in 24",
        "L0.norm.norm3[0, 0]": "nearest sites are L0.norm.norm",
        "L0.norm.norm1[32, 0]": "out 32, in 1",
    }
    for address, says in wrong.items():
        with pytest.raises(BadInput, match=says):
            anatomy.region(address)
    assert str(anatomy.region("L1.norm.norm2.bias[15, 0]")) == "L1.norm.norm2.bias[15, 0]"
