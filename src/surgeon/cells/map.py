"""Map: which genes, cells and pathways fall with given weights, beside the same figures for
arbitrary weights of equal damage.

Two corrections stand beside each raw figure. Genes that are hard to begin with lose most, whatever
breaks, so damage is also taken less what the intact NLL foretells. And any broken weight gives some
story, so each pathway's score is held against those of arbitrary weights of the same model, scaled
until they cost as much.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float64
from torch import Tensor

from ..anatomy import Region, Site
from ..errors import BadInput, SurgeonError
from ..measure.bootstrap import interval
from ..progress import Tell, silent
from ..result import Result, derived, record, result
from ..settings import check_values, nested, setting
from ..tap import Tap
from .donors import DonorTest, donor_test
from .enrich import EnrichConfig, GeneSets, Pathway, enrich, residualise, spearman
from .likelihood import MaskedNLL, Values, by_cell, by_gene, by_group
from .model import ScGPT
from .null import EqualDamage, equal_damage
from .planted import Planted
from .stage import NOTE, Embedding, Stage, StageRecord


@dataclass(frozen=True)
class MapConfig:
    """Settings of the map."""

    null: int = setting(20, "arbitrary weights of equal damage; 0 for none", low=0)
    condition: str | None = setting(
        None, "column of obs with the condition or stage", metavar="COL"
    )
    donor: str | None = setting(None, "column of obs with the donors of a condition", metavar="COL")
    least: int = setting(5, "scored values a gene needs to be ranked", low=1)
    components: bool = setting(True, "rank attention heads and MLP blocks too")
    enrich: EnrichConfig = nested(EnrichConfig)
    seed: int = setting(0, "seed of everything random", low=0, high=2**32 - 1)

    def __post_init__(self) -> None:
        check_values(self)
        if self.donor is not None and self.condition is None:
            raise BadInput(
                "‹donor› names the replicates of a comparison; name what is compared with"
                " ‹condition›."
            )


@record
class Gene:
    """Damage and intact NLL in nats, damage less what the intact NLL foretells, scored values."""

    gene: str
    nats: float
    intact_nll: float
    residual_nats: float
    values: int


@record
class Story:
    """Pathways by one way to rank genes.

    sets_at_fdr_5: how many of them lie high in the ranking at an FDR of 5%; the null: the same for
    each arbitrary weight.
    """

    sets_at_fdr_5: int
    null_sets_at_fdr_5: list[int]
    pathways: list[Pathway]


@record
class Component:
    """`L2.head3` or `L2.mlp`, and its damage in nats per masked value with an interval over
    cells.
    """

    name: str
    layer: int
    nats: float
    ci95: tuple[float, float]


@record
class Damage:
    """In nats per masked value, with an interval over cells."""

    nats: float
    ci95: tuple[float, float]


@record
class NullWeight:
    """An arbitrary weight: what it was scaled by, and what it costs then."""

    address: Region
    factor: float
    nats: float


@record
class Null:
    """The arbitrary weights, and how the damage of each correlates with the genes' intact NLL."""

    weights: list[NullWeight]
    difficulty_correlations: list[float]

    @derived
    def n(self) -> int:
        return len(self.weights)


@result("cells map")
class CellMap(Result):
    """What falls with given weights: genes and components worst first, `by_cell` and `cell_nll` by
    the cell's name.

    planted: the weight that was, if one was; embedding: the cells on a map of the data's own.
    """

    at: list[Region]
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
    stage: StageRecord
    embedding: Embedding | None
    planted: Planted | None = None
    note: str = NOTE


def map_damage(
    stage: Stage,
    parts: Sequence[Region],
    sets: GeneSets | None = None,
    config: MapConfig = MapConfig(),
    tell: Tell = silent,
) -> CellMap:
    """What zeroing `parts` together costs each gene, cell, cell type and pathway, and by condition,
    where without donors there is no test. The model is left as it was.

    sets: gene sets to test.
    Raises: BadInput as `enrich`, for a column that is not there, or if no gene has enough values;
    Refused as `donor_test`; SurgeonError if the null cannot be made.
    """
    batch = stage.batch
    nll = MaskedNLL(stage.model.anatomy, batch, stage.masked)
    conditions = None if config.condition is None else stage.column(config.condition)
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
    if conditions is not None and config.condition is not None and config.donor is not None:
        names_of = (config.condition, config.donor)
        who = stage.column(config.donor)
        donors = donor_test(cells, conditions, who, names_of, seed=config.seed)
    null: list[EqualDamage] = []
    chance: list[dict[str, Tensor]] = []
    stories: dict[str, Story] = {}
    nats = float(cells.mean())
    if sets is not None:
        test = partial(enrich, names, sets=sets, config=config.enrich, seed=config.seed)
        found = {name: test(one) for name, one in scores.items()}
        if config.null and nats <= 0:
            raise SurgeonError(
                f"the damage is {nats:+.4g} nats, so no weight of equal damage can be looked for;"
                " leave the ‹null› out (0)."
            )
        null = equal_damage(nll, nats, config.null, config.seed, tell)
        chance = [ranked(e.values) for e in null]
        for name, pathways in found.items():
            stories[name] = _story(pathways, [test(one[name]) for one in chance])
    numbers = (t.tolist() for t in (scores["raw"], difficulty, scores["residual"]))
    genes = [Gene(*row) for row in zip(names, *numbers, counts, strict=True)]
    weights = [NullWeight(one.region, one.factor, one.nats) for one in null]
    correlations = [spearman(one["raw"], difficulty) for one in chance]
    by_name = dict(zip(batch.cell_names, cells.tolist(), strict=True))
    return CellMap(
        at=list(parts),
        damage=Damage(nats, interval(cells, config.seed)),
        intact_nll=nll.base,
        genes=sorted(genes, key=lambda gene: -gene.nats),
        difficulty_correlation=spearman(scores["raw"], difficulty),
        by_cell=by_name,
        cell_nll=dict(zip(batch.cell_names, by_cell(nll.intact).tolist(), strict=True)),
        by_type={} if stage.types is None else by_group(cells, stage.types),
        enrichment=stories,
        null=Null(weights, correlations),
        components=components(stage.model, nll, config.seed, tell) if config.components else [],
        by_condition={} if conditions is None else by_group(cells, conditions),
        donors=donors,
        stage=stage.record,
        embedding=stage.embedding(by_name),
    )


def components(model: ScGPT, nll: MaskedNLL, seed: int = 0, tell: Tell = silent) -> list[Component]:
    """Every head (what it gives to the output projection set to zero) and every MLP block (its
    write set to zero), worst first.
    """
    anatomy, n_heads = nll.anatomy, model.shape.n_heads
    width = anatomy.d_model // n_heads
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
            tell("heads and blocks", len(found), len(anatomy.layers) * (n_heads + 1))
    return sorted(found, key=lambda c: (-c.nats, c.name))


def _without(channels: slice) -> Callable[[Tensor], Tensor]:
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
