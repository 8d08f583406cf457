"""Damage per gene to pathways: gene sets from a GMT file or a dict, prerank and over-representation
by gseapy, offline.

The background is the scored genes only: a gene that no mask covered could not have been damaged,
and a set that merely holds what is expressed would look enriched against the whole genome.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from ..errors import BadInput, SurgeonError
from ..result import record
from ..settings import check_values, setting
from .extra import needs

GeneSets = Mapping[str, Sequence[str]]
LEVEL = 0.05


@dataclass(frozen=True)
class EnrichConfig:
    """Settings of the enrichment."""

    min_size: int = setting(5, "least scored genes in a gene set", low=1, group="Gene sets")
    max_size: int = setting(500, "most scored genes in a gene set", low=1, group="Gene sets")
    permutations: int = setting(
        1000, "gene permutations of prerank", low=1, high=1_000_000, group="Gene sets"
    )
    top: float = setting(
        0.1,
        "share of the genes, the worst, for over-representation",
        low=0.001,
        high=0.999,
        group="Gene sets",
    )

    def __post_init__(self) -> None:
        check_values(self)
        if self.min_size > self.max_size:
            raise BadInput(f"‹min_size› {self.min_size} is above ‹max_size› {self.max_size}.")


@record
class Pathway:
    """One gene set: how many of its genes were scored, prerank (es, nes, p, fdr),
    over-representation (over_*) and the leading genes.

    null_p: how often a weight of equal damage gives the set at least this nes; None without a null.
    """

    name: str
    genes: int
    es: float
    nes: float
    p: float
    fdr: float
    over_overlap: int
    over_p: float
    over_fdr: float
    leading: list[str]
    null_p: float | None = None

    @property
    def high(self) -> bool:
        """Whether the set lies among the damaged genes at an FDR of 5%; one that lies at the other
        end is spared.
        """
        return self.nes > 0 and self.fdr <= LEVEL


def read_gmt(path: str | Path) -> dict[str, list[str]]:
    """The gene sets of a GMT file: name, description, genes, separated by tabs.

    Raises: BadInput.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(
            f"the gene sets {path} cannot be read ({error}); give a GMT file: name, description,"
            " genes, tab-separated."
        ) from error
    sets: dict[str, list[str]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        name, *rest = line.split("\t")
        genes = list(dict.fromkeys(g.strip() for g in rest[1:] if g.strip()))
        if not name or not genes or name in sets:
            raise BadInput(
                f"{path}, line {number}: a gene set is a name that is not there twice, a"
                " description and at least one gene, separated by tabs."
            )
        sets[name] = genes
    if not sets:
        raise BadInput(f"{path} holds no gene set.")
    return sets


def testable(genes: Sequence[str], sets: GeneSets, config: EnrichConfig) -> dict[str, list[str]]:
    """The sets cut down to the scored genes, without those that are then too small or too large.

    Raises: BadInput if none is left, with the largest overlap, which tells symbols from Ensembl
    ids.
    """
    scored = set(genes)
    cut = {name: [g for g in dict.fromkeys(of) if g in scored] for name, of in sets.items()}
    fit = range(config.min_size, config.max_size + 1)
    kept = {name: members for name, members in cut.items() if len(members) in fit}
    if not kept:
        largest = max(map(len, cut.values()), default=0)
        raise BadInput(
            f"no gene set holds {config.min_size} to {config.max_size} of the {len(scored)} scored"
            f" genes (the largest overlap is {largest}); check that both use the same names,"
            " symbols or Ensembl ids, or lower ‹min_size›."
        )
    return kept


def residualise(
    values: Float64[Tensor, " gene"], difficulty: Float64[Tensor, " gene"]
) -> Float64[Tensor, " gene"]:
    """What is left of `values` after a least-squares parabola in `difficulty`.

    A parabola, since the damage of a gene grows with its intact NLL and levels off where the model
    knew little to begin with.
    """
    x = (difficulty - difficulty.mean()) / difficulty.std().clamp_min(1e-12)
    design = torch.stack([torch.ones_like(x), x, x * x], 1)
    fitted: Tensor = design @ torch.linalg.lstsq(design, values[:, None], driver="gelsd").solution
    return values - fitted[:, 0]


def spearman(a: Float64[Tensor, " n"], b: Float64[Tensor, " n"]) -> float:
    """Rank correlation, ties sharing their mean rank; 0 where one of the two does not vary."""
    [stats] = needs("a rank correlation", "scipy.stats")
    varies = bool(a.std() > 0) and bool(b.std() > 0)
    return float(stats.spearmanr(a.numpy(), b.numpy()).statistic) if varies else 0.0


def enrich(
    genes: Sequence[str],
    scores: Float64[Tensor, " gene"],
    sets: GeneSets,
    config: EnrichConfig = EnrichConfig(),
    seed: int = 0,
) -> list[Pathway]:
    """Each gene set beside the ranking of `genes` by `scores`, most damaged first; best sets first.

    prerank runs on the scores less their mean, so that both ends of the ranking weigh alike; its p
    and FDR are by permutation of genes and never below one over their number. Over-representation
    is hypergeometric, of the top share of the genes, on the scored genes; FDR by Benjamini and
    Hochberg over the sets tested.
    Raises: BadInput as `testable`; MissingExtra without `weight-surgeon[cells]`.
    """
    gseapy, pandas, stats = needs("enrichment", "gseapy", "pandas", "scipy.stats")
    kept = testable(genes, sets, config)
    centred = (scores - scores.mean()).numpy()
    if not np.isfinite(centred).all() or not centred.any():
        raise SurgeonError(
            "the scores of the genes are all the same or not finite, so no ranking and no"
            " enrichment can be made of them."
        )
    # a stable order, so that ties do not depend on the sort of another package
    order = np.lexsort((np.array(genes), -centred))
    ranked_genes = [genes[i] for i in order]
    # strictly falling, for gseapy orders ties at random
    falling = centred[order] - np.arange(len(order)) * 1e-9 * np.abs(centred).max()
    ranked = gseapy.prerank(
        rnk=pandas.Series(falling, index=ranked_genes),
        gene_sets=kept,
        permutation_num=config.permutations,
        min_size=config.min_size,
        max_size=config.max_size,
        seed=seed,
        threads=1,
        outdir=None,
        no_plot=True,
        verbose=False,
    ).res2d.set_index("Term")
    top = {*ranked_genes[: max(1, round(config.top * len(genes)))]}
    overlap = {name: len(top & {*members}) for name, members in kept.items()}
    over_p = [
        float(stats.hypergeom.sf(overlap[name] - 1, len(genes), len(members), len(top)))
        for name, members in kept.items()
    ]
    over_fdr = stats.false_discovery_control(over_p).tolist()
    least = 1 / config.permutations
    found = [
        Pathway(
            name,
            len(kept[name]),
            es=float(ranked.at[name, "ES"]),
            nes=float(ranked.at[name, "NES"]),
            p=max(float(ranked.at[name, "NOM p-val"]), least),
            fdr=max(float(ranked.at[name, "FDR q-val"]), least),
            over_overlap=overlap[name],
            over_p=p,
            over_fdr=fdr,
            leading=[g for g in str(ranked.at[name, "Lead_genes"]).split(";") if g],
        )
        for name, p, fdr in zip(kept, over_p, over_fdr, strict=True)
    ]
    return sorted(found, key=lambda pathway: (-pathway.nes, pathway.name))
