"""Map: which genes, cells and pathways fall with given weights, beside the same figures for
arbitrary weights of equal damage.

Two corrections stand beside each raw figure. Genes that are hard to begin with lose most, whatever
breaks, so damage is also taken less what the intact NLL foretells. And any broken weight gives some
story, so each pathway's score is held against those of arbitrary weights of the same model, scaled
until they cost as much.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

from ..anatomy import Region, Site
from ..errors import BadInput, SurgeonError
from ..measure.bootstrap import interval
from ..result import Result, result
from ..settings import setting
from ..tap import Tap
from .donors import DonorTest, donor_test
from .enrich import EnrichConfig, GeneSets, Pathway, enrich, residualise, spearman
from .likelihood import MaskedNLL, Masks, Progress, Values, by_cell, by_gene, by_group
from .model import ScGPT
from .null import EqualDamage, equal_damage
from .tokenise import Batch

Column = tuple[str, Sequence[str]]  # a column of `obs`: its name, and the value of each cell
NOTE = (
    "Hypotheses about the model, not biomarkers: what a model loses without a weight says how the"
    " model computes, not what cells do."
)


@dataclass(frozen=True)
class MapConfig:
    """Settings of the map."""

    null: int = setting(20, "arbitrary weights of equal damage; 0 for none")
    least: int = setting(5, "scored values a gene needs to be ranked")
    components: bool = setting(True, "rank attention heads and MLP blocks too")
    enrich: EnrichConfig = field(default_factory=EnrichConfig)
    seed: int = setting(0, "seed of everything random")

    def __post_init__(self) -> None:
        if self.null < 0 or self.least < 1:
            raise BadInput(
                "a map needs a null of 0 or more weights, and at least one scored value per gene."
            )


@dataclass(frozen=True)
class Gene:
    """Damage and intact NLL in nats, damage less what the intact NLL foretells, scored values."""

    gene: str
    nats: float
    intact_nll: float
    residual_nats: float
    values: int


@dataclass(frozen=True)
class Story:
    """Pathways by one way to rank genes.

    sets_at_fdr_5: how many of them lie high in the ranking at an FDR of 5%; the null: the same for
    each arbitrary weight.
    """

    sets_at_fdr_5: int
    null_sets_at_fdr_5: list[int]
    pathways: list[Pathway]


@dataclass(frozen=True)
class Component:
    """`L2.head3` or `L2.mlp`, and its damage in nats per masked value with an interval over
    cells.
    """

    name: str
    layer: int
    nats: float
    ci95: tuple[float, float]


@dataclass(frozen=True)
class Damage:
    """In nats per masked value, with an interval over cells."""

    nats: float
    ci95: tuple[float, float]


@dataclass(frozen=True)
class Null:
    """The arbitrary weights: what each was scaled by and costs, and how its damage of genes
    correlates with their intact NLL.
    """

    n: int
    weights: list[dict[str, Any]]
    difficulty_correlations: list[float]


@result("cells map")
class Map(Result):
    """The result; genes and components worst first, `by_cell` and `cell_nll` by the cell's name.

    planted: the weight that was, if one was; embedding: the cells on a map of the data's own.
    """

    at: list[str]
    damage: Damage
    intact_nll: float
    genes: list[Gene]
    difficulty_correlation: float
    by_cell: dict[str, float]
    cell_nll: dict[str, float]
    by_type: dict[str, float]
    enrichment: dict[str, Story]
    null: Null
    components: list[Component]
    by_condition: dict[str, float]
    donors: DonorTest | None
    planted: dict[str, Any] | None = None
    embedding: dict[str, Any] | None = None
    note: str = NOTE


def map_damage(
    model: ScGPT,
    batch: Batch,
    masked: Masks,
    parts: Sequence[Region],
    sets: GeneSets | None = None,
    types: Sequence[str] | None = None,
    condition: Column | None = None,
    donor: Column | None = None,
    config: MapConfig = MapConfig(),
    progress: Progress | None = None,
) -> Map:
    """What zeroing `parts` together costs each gene, cell, cell type and pathway. The model is left
    as it was.

    sets: gene sets to test; types: the cell type of each cell; condition: what to compare; donor:
    the replicates of that comparison, without which there is no test.
    Raises: BadInput as `enrich`, or if no gene has enough values; Refused as `donor_test`;
    SurgeonError if the null cannot be made.
    """
    nll = MaskedNLL(model.anatomy, batch, masked)
    values = nll.damage(parts)
    cells = by_cell(values)
    names, _, counts = by_gene(values, batch, config.least)
    if len(names) < 3:
        raise BadInput(
            f"{len(names)} genes have {config.least} scored values or more; give more cells or"
            " draws, or lower ‹least›."
        )
    difficulty = by_gene(nll.intact, batch, config.least)[1]

    def ranked(values: Values) -> dict[str, Float64[Tensor, " gene"]]:
        """Two ways to rank genes: by damage, and by damage less what is foretold."""
        damage = by_gene(values, batch, config.least)[1]
        return {"raw": damage, "residual": residualise(damage, difficulty)}

    scores = ranked(values)
    # refused before the long part, where it is to be refused
    donors = None
    if condition is not None and donor is not None:
        column_names = (condition[0], donor[0])
        donors = donor_test(cells, condition[1], donor[1], column_names, seed=config.seed)
    null: list[EqualDamage] = []
    chance: list[dict[str, Tensor]] = []
    stories: dict[str, Story] = {}
    nats = float(cells.mean())
    if sets is not None:
        found = {name: enrich(names, s, sets, config.enrich) for name, s in scores.items()}
        if config.null and nats <= 0:
            raise SurgeonError(
                f"the damage is {nats:+.4g} nats, so no weight of equal damage can be looked for;"
                " leave the ‹null› out (0)."
            )
        null = equal_damage(nll, nats, config.null, config.seed, progress)
        chance = [ranked(e.values) for e in null]
        for name, pathways in found.items():
            others = [enrich(names, one[name], sets, config.enrich) for one in chance]
            stories[name] = _story(pathways, others)
    numbers = (t.tolist() for t in (scores["raw"], difficulty, scores["residual"]))
    genes = [Gene(*row) for row in zip(names, *numbers, counts, strict=True)]
    weights = [{"address": str(e.region), "factor": e.factor, "nats": e.nats} for e in null]
    correlations = [spearman(one["raw"], difficulty) for one in chance]
    return Map(
        at=[str(part) for part in parts],
        damage=Damage(nats, interval(cells, config.seed)),
        intact_nll=nll.base,
        genes=sorted(genes, key=lambda gene: -gene.nats),
        difficulty_correlation=spearman(scores["raw"], difficulty),
        by_cell=dict(zip(batch.cell_names, cells.tolist(), strict=True)),
        cell_nll=dict(zip(batch.cell_names, by_cell(nll.intact).tolist(), strict=True)),
        by_type=by_group(cells, types) if types is not None else {},
        enrichment=stories,
        null=Null(len(null), weights, correlations),
        components=components(model, nll, config.seed, progress) if config.components else [],
        by_condition=by_group(cells, condition[1]) if condition is not None else {},
        donors=donors,
    )


def components(
    model: ScGPT, nll: MaskedNLL, seed: int = 0, progress: Progress | None = None
) -> list[Component]:
    """Every head (what it gives to the output projection set to zero) and every MLP block (its
    write set to zero), worst first.
    """
    anatomy, n_heads = nll.anatomy, model.shape.n_heads
    width = model.shape.d_model // n_heads
    found = []
    for layer in range(len(anatomy.layers)):
        for head in range(n_heads + 1):
            with Tap() as tap:
                if head < n_heads:
                    name, out = f"L{layer}.head{head}", anatomy.module(Site(layer, "attn.out"))
                    tap.on_input(out, _without(slice(head * width, (head + 1) * width)))
                else:
                    name = f"L{layer}.mlp"
                    tap.on_output(anatomy.module(Site(layer, "mlp.down")), torch.zeros_like)
                cells = by_cell(nll.values(layer) - nll.intact)
            found.append(Component(name, layer, float(cells.mean()), interval(cells, seed)))
            if progress:
                progress("heads and blocks", len(found), len(anatomy.layers) * (n_heads + 1))
    return sorted(found, key=lambda c: (-c.nats, c.name))


def _without(channels: slice) -> Any:
    def watch(states: Tensor) -> Tensor:
        states = states.clone()
        states[..., channels] = 0
        return states

    return watch


def _story(pathways: Sequence[Pathway], chance: Sequence[Sequence[Pathway]]) -> Story:
    """The pathways beside those of arbitrary weights."""
    beside = []
    for pathway in pathways:
        others = [p.nes for one in chance for p in one if p.name == pathway.name]
        at_least = sum(nes >= pathway.nes for nes in others)
        p = (1 + at_least) / (1 + len(others)) if others else None
        beside.append(replace(pathway, null_p=p))
    return Story(sum(p.high for p in beside), [sum(p.high for p in one) for one in chance], beside)
