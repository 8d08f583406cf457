"""`cells map`: which genes, cells, cell types and pathways fall with given weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..cells.data import write_back
from ..cells.enrich import read_gmt
from ..cells.map import CellMap, MapConfig, map_damage
from ..cells.planted import plant
from ..cells.stage import StageConfig, open_stage
from ..errors import BadInput
from ..settings import nested, setting
from .cells_screen import worst_candidate
from .desk import Desk
from .naming import regions_of


@dataclass(frozen=True)
class Settings(StageConfig):
    """Which genes, cells, cell types and pathways fall with given weights, beside arbitrary weights
    of equal damage.
    """

    at: Any = setting(
        (),
        "weights to take out together; not given: the one that a screen would prune to",
        metavar="ENTRY",
        many=True,
    )
    plant: bool = setting(False, "map a weight of +0.25 nats, planted in a copy of the model")
    gmt: str | None = setting(
        None, "gene sets: name, description, genes, tab-separated", metavar="FILE"
    )
    map: MapConfig = nested(MapConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.plant and self.at:
            raise BadInput("‹plant› maps the planted weight and ‹at› others; give one of them.")


def run(desk: Desk, settings: Settings) -> CellMap:
    sets = None if settings.gmt is None else read_gmt(settings.gmt)
    seed, planted = settings.map.seed, None
    stage = open_stage(settings, seed)
    for column in filter(None, (settings.map.condition, settings.map.donor)):
        stage.column(column)  # refused before the long part
    if settings.plant:
        copy, planted = plant(stage.model, stage.batch, stage.masked, seed=seed)
        stage = replace(stage, model=copy)
        parts = [planted.address]
    elif settings.at:
        parts = regions_of(stage.model.anatomy, settings.at)
        settings = replace(settings, at=[str(part) for part in parts])
    else:
        parts = [worst_candidate(stage, tell=desk.tell)]
    result = map_damage(stage, parts, sets, settings.map, desk.tell)
    about = desk.provenance(settings, model=settings.folder, fingerprint=stage.fingerprint)
    result = replace(result, planted=planted, provenance=about)
    if settings.write_h5ad is not None:
        _write(result, stage.adata, settings.write_h5ad)
    return result


def _write(result: CellMap, adata: Any, path: str) -> None:
    per_gene = {
        "damage": {gene.gene: gene.nats for gene in result.genes},
        "nll": {gene.gene: gene.intact_nll for gene in result.genes},
        "residual_damage": {gene.gene: gene.residual_nats for gene in result.genes},
    }
    per_cell = {"damage": result.by_cell, "nll": result.cell_nll}
    write_back(adata, path, per_gene, per_cell, result.to_json())
