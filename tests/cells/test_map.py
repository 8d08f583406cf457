"""The map: enrichment beside weights of equal damage, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cells_tiny import GENES, tiny

from surgeon.cells.enrich import EnrichConfig
from surgeon.cells.likelihood import MaskedNLL, by_cell
from surgeon.cells.map import CellMap, MapConfig, map_damage
from surgeon.cells.null import equal_damage
from surgeon.cells.planted import plant
from surgeon.errors import BadInput, Refused, SurgeonError
from surgeon.patch import injured

SETS = {"even genes": GENES[::2], "odd genes": GENES[1::2], "first": GENES[:8]}
CONFIG = MapConfig(null=3, enrich=EnrichConfig(permutations=200))


def planted_map(config: MapConfig = CONFIG, sets: dict[str, list[str]] | None = SETS) -> CellMap:
    t = tiny()
    model, made = plant(t.model, t.batch, t.masked)
    return map_damage(replace(t, model=model), [made.address], sets, config)


def test_the_null_costs_as_much_as_the_weight():
    t = tiny()
    damage = MaskedNLL(t.model.anatomy, t.batch, t.masked)
    for one in equal_damage(damage, 0.2, 4):
        with injured(damage.anatomy, [one.region], f"scale:{one.factor}"):
            measured = float(by_cell(damage.values() - damage.intact).mean())
        assert one.nats == pytest.approx(measured, abs=1e-5)
        assert measured == pytest.approx(0.2, rel=0.25)
    with pytest.raises(SurgeonError, match="could be made to cost"):
        equal_damage(damage, 1e15, 1)


def test_a_map_holds_every_part_beside_its_null():
    t = tiny()
    d = planted_map().to_json()
    assert d["damage"]["nats"] == pytest.approx(0.25, rel=0.05)
    assert [g["nats"] for g in d["genes"]] == sorted((g["nats"] for g in d["genes"]), reverse=True)
    assert {g["gene"] for g in d["genes"]} == set(GENES)
    assert set(d["by_type"]) == {"even", "odd"}
    assert len(d["by_cell"]) == len(t.batch.cell_names)
    for story in d["enrichment"].values():
        assert {p["name"] for p in story["pathways"]} == set(SETS)
        assert all(p["null_p"] in (0.25, 0.5, 0.75, 1.0) for p in story["pathways"])
        assert len(story["null_sets_at_fdr_5"]) == 3
    assert len(d["null"]["weights"]) == len(d["null"]["difficulty_correlations"]) == 3
    assert "not biomarkers" in d["note"]


def test_residuals_do_not_correlate_with_difficulty():
    genes = planted_map().genes
    table = torch.tensor([[g.intact_nll, g.residual_nats] for g in genes], dtype=torch.float64)
    assert abs(float(torch.corrcoef(table.T)[0, 1])) < 1e-8


def test_donors_are_replicates_and_one_is_refused():
    config = replace(CONFIG, condition="type")
    found = planted_map(replace(config, donor="donor"))
    assert found.donors is not None
    assert {k: len(v) for k, v in found.donors.means.items()} == {"even": 3, "odd": 3}
    assert found.by_condition.keys() == {"even", "odd"}
    with pytest.raises(Refused, match="at least two"):
        planted_map(replace(config, donor="one"))
    without = planted_map(config)
    assert without.donors is None
    assert without.by_condition == found.by_condition


def test_too_few_values_and_no_damage_are_refused():
    with pytest.raises(BadInput, match="scored values or more"):
        planted_map(MapConfig(least=10_000), None)
    bare = planted_map(MapConfig(components=False), None)
    assert (bare.enrichment, bare.components) == ({}, [])
