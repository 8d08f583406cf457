"""Damage against plain passes of a model whose weights were set to zero by hand."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from cells_tiny import tiny

from surgeon.cells.components import components
from surgeon.cells.damage import Damage, by_cell, by_gene, by_type, cells_of
from surgeon.cells.likelihood import masked_nll
from surgeon.cells.parts import Part, part_of, scaled
from surgeon.cells.planted import difference
from surgeon.errors import BadInput, UnknownSite


@pytest.mark.parametrize(
    "address",
    [
        "L0.mlp.down[3, 5]",
        "L1.mlp.down[2, 7]",
        "L1.norm1.scale[4]",
        "L0.norm2.shift[1]",
        "encoder.enc_norm.scale[6]",
    ],
)
def test_damage_is_that_of_a_model_without_the_weight(address: str):
    t = tiny()
    part = part_of(t.model, address)
    broken = deepcopy(t.model)
    with torch.no_grad():
        broken.get_parameter(part.parameter)[part.index] = 0
    expected = masked_nll(broken, t.batch, t.masked) - masked_nll(t.model, t.batch, t.masked)
    found = Damage(t.model, t.batch, t.masked).of([part])
    assert float(found.abs().nan_to_num().max()) > 1e-6
    torch.testing.assert_close(found, expected, equal_nan=True, atol=2e-6, rtol=0)


def test_the_model_is_left_as_it_was_also_by_an_error():
    t = tiny()
    before = {name: p.clone() for name, p in t.model.named_parameters()}
    parts = [
        part_of(t.model, "L1.mlp.down[2, 7]"),
        part_of(t.model, "L1.mlp.down[2, 7]"),
        part_of(t.model, "L0.norm1.scale[0]"),
    ]
    with pytest.raises(RuntimeError, match="inside"), scaled(t.model, parts, 7.0):
        raise RuntimeError("inside")
    assert all(torch.equal(before[name], p) for name, p in t.model.named_parameters())


def test_means_over_cells_genes_and_types_by_plain_loops():
    t = tiny()
    values = Damage(t.model, t.batch, t.masked).intact
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
    assert by_type(per_cell, t.types)["even"] == pytest.approx(sum(even) / len(even))


def test_some_cells_are_damaged_as_they_are_among_all():
    t = tiny()
    at = torch.tensor([3, 20, 35])
    part = part_of(t.model, "L1.mlp.down[2, 7]")
    alone = Damage(t.model, cells_of(t.batch, at), t.masked[:, at]).of([part])
    torch.testing.assert_close(
        alone,
        Damage(t.model, t.batch, t.masked).of([part])[:, at],
        equal_nan=True,
        atol=2e-6,
        rtol=0,
    )


def test_heads_and_blocks_against_weights_set_to_zero():
    t = tiny()
    found = {c.name: c.nats for c in components(Damage(t.model, t.batch, t.masked))}
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


@pytest.mark.parametrize(
    "address", ["L0.mlp.down[15, 23]", "L1.norm2.shift[15]", "encoder.enc_norm.scale[0]"]
)
def test_addresses_are_read_as_they_are_written(address: str):
    assert part_of(tiny().model, address).address == address


def test_addresses_that_are_not_there_are_refused():
    model = tiny().model
    wrong = {
        "L2.mlp.down[0, 0]": "has 2 layers",
        "L0.mlp.down[32, 0]": "out 32, in 24",
        "L0.norm3.scale[0]": "no LayerNorm",
        "L0.norm1.scale[32]": "32 channels",
    }
    for address, says in wrong.items():
        with pytest.raises(UnknownSite, match=says):
            part_of(model, address)
    with pytest.raises(BadInput, match="no weight"):
        part_of(model, "L0.attn.q[0, 0]")
    assert isinstance(part_of(model, " L0.norm1.scale[1] "), Part)
