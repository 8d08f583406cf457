"""Map: which genes, cells and pathways fall with given weights, beside the same figures for
arbitrary weights of equal damage.

Two corrections stand beside each raw figure. Genes that are hard to begin with lose most, whatever
breaks, so damage is also taken less what the intact NLL foretells. And any broken weight gives some
story, so each pathway's score is held against those of arbitrary weights of the same model, scaled
until they cost as much.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from jaxtyping import Bool, Float64
from torch import Tensor

from ..errors import BadInput, SurgeonError
from ..measure.bootstrap import interval
from .components import Component, components
from .damage import Damage, Progress, by_cell, by_gene, by_type
from .donors import DonorTest, donor_test
from .enrich import EnrichConfig, GeneSets, Pathway, enrich, residualise, spearman
from .model import ScGPT
from .null import EqualDamage, equal_damage
from .parts import Part
from .screen import NOTE
from .tokenise import Batch

LEVEL = 0.05


@dataclass(frozen=True)
class MapConfig:
    """Settings of the map."""

    null: int = field(
        default=20, metadata={"help": "arbitrary weights of equal damage, 0 for none"}
    )
    least: int = field(default=5, metadata={"help": "scored values a gene needs to be ranked"})
    components: bool = field(
        default=True, metadata={"help": "rank attention heads and MLP blocks too"}
    )
    enrich: EnrichConfig = field(
        default=EnrichConfig(), metadata={"help": "settings of the enrichment"}
    )
    seed: int = field(default=0, metadata={"help": "seed of everything random"})

    def __post_init__(self) -> None:
        if self.null < 0 or self.least < 1:
            raise BadInput(
                "a map needs a null of 0 or more weights, and at least one scored value per gene."
            )


@dataclass(frozen=True)
class Groups:
    """The columns of `obs` that a comparison by condition needs: the values of each cell.

    Without donors no test is made.
    """

    condition: str
    conditions: Sequence[str]
    donor: str | None = None
    donors: Sequence[str] | None = None


@dataclass(frozen=True)
class Enriched:
    """A gene set ranked by raw or by residual damage: the pathway, and how often a weight of equal
    damage has at least its NES.
    """

    pathway: Pathway
    null_p: float | None

    def to_json(self) -> dict[str, Any]:
        return {**self.pathway.to_json(), "null_p": self.null_p}


@dataclass(frozen=True)
class Story:
    """One way to rank genes.

    null_sets: for each arbitrary weight, how many sets lie high in its ranking at an FDR of 5%.
    """

    pathways: list[Enriched]
    null_sets: list[int]

    @property
    def sets(self) -> int:
        return sum(_high(e.pathway) for e in self.pathways)

    def to_json(self) -> dict[str, Any]:
        return {
            "sets_at_fdr_5": self.sets,
            "null_sets_at_fdr_5": self.null_sets,
            "pathways": [e.to_json() for e in self.pathways],
        }


@dataclass(frozen=True)
class Map:
    """The result.

    genes: name, damage and intact NLL in nats, damage less what the intact NLL foretells, scored
    values; worst first.
    """

    addresses: list[str]
    nats: float
    ci95: tuple[float, float]
    intact_nll: float
    genes: list[tuple[str, float, float, float, int]]
    difficulty_correlation: float
    null_correlations: list[float]
    cells: dict[str, float]
    cell_nll: dict[str, float]
    by_type: dict[str, float]
    stories: dict[str, Story]
    null: list[EqualDamage]
    components: list[Component]
    by_condition: dict[str, float]
    donors: DonorTest | None
    config: MapConfig

    def to_json(self) -> dict[str, Any]:
        columns = ("gene", "nats", "intact_nll", "residual_nats", "values")
        return {
            "at": self.addresses,
            "damage": {"nats": self.nats, "ci95": list(self.ci95)},
            "intact_nll": self.intact_nll,
            "genes": [dict(zip(columns, gene, strict=True)) for gene in self.genes],
            "difficulty_correlation": self.difficulty_correlation,
            "by_cell": self.cells,
            "by_type": self.by_type,
            "enrichment": {name: story.to_json() for name, story in self.stories.items()},
            "null": {
                "n": len(self.null),
                "weights": [
                    {"address": e.part.address, "factor": e.factor, "nats": e.nats}
                    for e in self.null
                ],
                "difficulty_correlations": self.null_correlations,
            },
            "components": [c.to_json() for c in self.components],
            "by_condition": self.by_condition,
            "donors": None if self.donors is None else self.donors.to_json(),
            "settings": asdict(self.config),
            "note": NOTE,
        }


def map_damage(
    model: ScGPT,
    batch: Batch,
    masked: Bool[Tensor, "draw cell pos"],
    parts: Sequence[Part],
    sets: GeneSets | None = None,
    types: Sequence[str] | None = None,
    groups: Groups | None = None,
    config: MapConfig = MapConfig(),
    progress: Progress | None = None,
) -> Map:
    """What zeroing `parts` together costs each gene, cell, cell type and pathway. The model is left
    as it was.

    sets: gene sets to test; types: the cell type of each cell; groups: a condition, and donors as
    replicates.
    Raises: BadInput as `enrich`, or if no gene has enough values; Refused as `donor_test`;
    SurgeonError if the null cannot be made.
    """
    damage = Damage(model, batch, masked)
    values = damage.of(parts)
    cells = by_cell(values)
    names, per_gene, counts = by_gene(values, batch, config.least)
    if len(names) < 3:
        raise BadInput(
            f"{len(names)} genes have {config.least} scored values or more; give more cells or"
            " draws, or lower --least."
        )
    difficulty = by_gene(damage.intact, batch, config.least)[1]
    residual, correlation = residualise(per_gene, difficulty)
    # refused before the long part, where it is to be refused
    donors = _donors(cells, groups, config.seed)
    nats = float(cells.nanmean())
    null: list[EqualDamage] = []
    stories: dict[str, Story] = {}
    if sets is not None:
        raw = {"raw": per_gene, "residual": residual}
        found = {name: enrich(names, scores, sets, config.enrich) for name, scores in raw.items()}
        if config.null and nats <= 0:
            raise SurgeonError(
                f"the damage is {nats:+.4g} nats, so no weight of equal damage can be looked for;"
                " leave the null out (--null 0)."
            )
        null = equal_damage(damage, nats, config.null, config.seed, progress) if config.null else []
        stories = _stories(found, null, names, difficulty, damage.batch, sets, config)
    null_genes = [by_gene(e.values, batch, config.least)[1] for e in null]
    order = per_gene.argsort(descending=True, stable=True).tolist()
    table = [
        (names[i], float(per_gene[i]), float(difficulty[i]), float(residual[i]), counts[i])
        for i in order
    ]
    known = {n: float(v) for n, v in zip(batch.cell_names, cells.tolist(), strict=True) if v == v}
    intact = {
        n: float(v)
        for n, v in zip(batch.cell_names, by_cell(damage.intact).tolist(), strict=True)
        if v == v
    }
    return Map(
        addresses=[p.address for p in parts],
        nats=nats,
        ci95=interval(cells[~cells.isnan()], config.seed),
        intact_nll=damage.base,
        genes=table,
        difficulty_correlation=correlation,
        null_correlations=[spearman(g, difficulty) for g in null_genes],
        cells=known,
        cell_nll=intact,
        by_type=by_type(cells, types) if types is not None else {},
        stories=stories,
        null=null,
        components=components(damage, config.seed, progress) if config.components else [],
        by_condition=by_type(cells, groups.conditions) if groups is not None else {},
        donors=donors,
        config=config,
    )


def _donors(cells: Float64[Tensor, " cell"], groups: Groups | None, seed: int) -> DonorTest | None:
    if groups is None or groups.donors is None or groups.donor is None:
        return None
    return donor_test(
        cells, groups.conditions, groups.donors, (groups.condition, groups.donor), seed=seed
    )


def _stories(
    found: Mapping[str, list[Pathway]],
    null: Sequence[EqualDamage],
    names: Sequence[str],
    difficulty: Float64[Tensor, " gene"],
    batch: Batch,
    sets: GeneSets,
    config: MapConfig,
) -> dict[str, Story]:
    chance: dict[str, list[dict[str, Pathway]]] = {name: [] for name in found}
    for one in null:
        scores = by_gene(one.values, batch, config.least)[1]
        for name, ranked in (("raw", scores), ("residual", residualise(scores, difficulty)[0])):
            chance[name].append({p.name: p for p in enrich(names, ranked, sets, config.enrich)})
    stories = {}
    for name, pathways in found.items():
        others = chance[name]
        stories[name] = Story(
            [Enriched(p, _null_p(p.nes, [o[p.name].nes for o in others])) for p in pathways],
            [sum(_high(p) for p in o.values()) for o in others],
        )
    return stories


def _high(pathway: Pathway) -> bool:
    """Whether a set lies among the damaged genes at an FDR of 5%; one that lies at the other end is
    spared.
    """
    return pathway.nes > 0 and pathway.fdr <= LEVEL


def _null_p(nes: float, chance: Sequence[float]) -> float | None:
    return (1 + sum(v >= nes for v in chance)) / (1 + len(chance)) if chance else None
