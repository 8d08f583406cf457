"""Damage per gene to pathways: gene sets from a GMT file or a dict, prerank and over-representation
by gseapy, offline.

The background is the scored genes only: a gene that no mask covered could not have been damaged,
and a set that merely holds what is expressed would look enriched against the whole genome.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from ..errors import BadInput, MissingExtra, SurgeonError

GeneSets = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class EnrichConfig:
    """Settings of the enrichment."""

    min_size: int = field(
        default=5, metadata={"help": "least scored genes in a set for it to be tested"}
    )
    max_size: int = field(
        default=500, metadata={"help": "most scored genes in a set for it to be tested"}
    )
    permutations: int = field(default=1000, metadata={"help": "gene permutations of prerank"})
    top: float = field(
        default=0.1,
        metadata={
            "help": (
                "share of the scored genes, the most damaged, that over-representation asks about"
            )
        },
    )
    seed: int = field(default=0, metadata={"help": "seed of the permutations"})

    def __post_init__(self) -> None:
        if (
            self.min_size < 1
            or self.max_size < self.min_size
            or self.permutations < 1
            or not 0 < self.top < 1
        ):
            raise BadInput(
                "an enrichment needs 1 <= min_size <= max_size, at least one permutation, and a top"
                " share between 0 and 1."
            )


@dataclass(frozen=True)
class Pathway:
    """One gene set: how many of its genes were scored, prerank (es, nes, p, fdr),
    over-representation (over_*) and the leading genes.
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

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


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
        name, *rest = line.rstrip("\n").split("\t")
        genes = list(dict.fromkeys(g.strip() for g in rest[1:] if g.strip()))
        if not name or not genes:
            raise BadInput(
                f"{path}, line {number}: a gene set is a name, a description and at least one gene,"
                " separated by tabs."
            )
        if name in sets:
            raise BadInput(
                f"{path}, line {number}: the gene set {name} is there twice; name each once."
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
    cut = {
        name: [g for g in dict.fromkeys(members) if g in scored] for name, members in sets.items()
    }
    kept = {
        name: members
        for name, members in cut.items()
        if config.min_size <= len(members) <= config.max_size
    }
    if not kept:
        largest = max(map(len, cut.values()), default=0)
        raise BadInput(
            f"no gene set holds {config.min_size} to {config.max_size} of the {len(scored)} scored"
            f" genes (the largest overlap is {largest}); check that both use the same names,"
            " symbols or Ensembl ids, or lower --min-size."
        )
    return kept


def residualise(
    values: Float64[Tensor, " gene"], difficulty: Float64[Tensor, " gene"]
) -> tuple[Float64[Tensor, " gene"], float]:
    """What is left of `values` after a least-squares parabola in `difficulty`, and the Spearman
    correlation of the two before.

    A parabola, since the damage of a gene grows with its intact NLL and levels off where the model
    knew little to begin with.
    """
    x = (difficulty - difficulty.mean()) / difficulty.std().clamp_min(1e-12)
    design = torch.stack([torch.ones_like(x), x, x * x], 1)
    fitted = design @ torch.linalg.lstsq(design, values[:, None], driver="gelsd").solution
    return values - fitted[:, 0], spearman(values, difficulty)


def spearman(a: Float64[Tensor, " n"], b: Float64[Tensor, " n"]) -> float:
    """Rank correlation, ties sharing their mean rank; 0 where one of the two does not vary."""
    ranks = [_ranks(t) for t in (a, b)]
    centred = [r - r.mean() for r in ranks]
    size = float(centred[0].norm() * centred[1].norm())
    return float(centred[0] @ centred[1]) / size if size > 0 else 0.0


def _ranks(values: Tensor) -> Tensor:
    _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    ranks: Tensor = (last - (counts.double() - 1) / 2)[inverse]
    return ranks


def enrich(
    genes: Sequence[str],
    scores: Float64[Tensor, " gene"],
    sets: GeneSets,
    config: EnrichConfig = EnrichConfig(),
) -> list[Pathway]:
    """Each gene set beside the ranking of `genes` by `scores`, most damaged first; best sets first.

    prerank runs on the scores less their mean, so that both ends of the ranking weigh alike; its p
    and FDR are by permutation of genes and never below one over their number. Over-representation
    is hypergeometric, of the top share of the genes, on the scored genes; FDR by Benjamini and
    Hochberg over the sets tested.
    Raises: BadInput as `testable`; MissingExtra without `weight-surgeon[cells]`.
    """
    gseapy, pandas = _packages()
    kept = testable(genes, sets, config)
    centred = (scores - scores.mean()).numpy()
    if not np.isfinite(centred).all() or not centred.any():
        raise SurgeonError(
            "the scores of the genes are all the same or not finite, so no ranking and no"
            " enrichment can be made of them."
        )
    # a stable order, so that ties do not depend on the sort of another package
    order = np.lexsort((np.array(genes), -centred))
    # strictly falling, for gseapy orders ties at random
    falling = centred[order] - np.arange(len(order)) * 1e-9 * np.abs(centred).max()
    ranking = pandas.Series(falling, index=[genes[i] for i in order])
    ranked = gseapy.prerank(
        rnk=ranking,
        gene_sets=kept,
        permutation_num=config.permutations,
        min_size=config.min_size,
        max_size=config.max_size,
        seed=config.seed,
        threads=1,
        outdir=None,
        no_plot=True,
        verbose=False,
    ).res2d.set_index("Term")
    top = [genes[i] for i in order[: max(1, round(config.top * len(genes)))]]
    # a set that shares no gene with the top is one of the tests, and gseapy, which drops it, would
    # call it an error if it were the only one
    over_p = dict.fromkeys(kept, 1.0)
    if sharing := {
        name: members for name, members in kept.items() if not set(members).isdisjoint(top)
    }:
        over = gseapy.enrich(
            gene_list=top,
            gene_sets=sharing,
            background=list(genes),
            outdir=None,
            no_plot=True,
            verbose=False,
        ).res2d
        over_p |= {
            str(term): float(p) for term, p in zip(over["Term"], over["P-value"], strict=True)
        }
    over_fdr = dict(zip(kept, benjamini_hochberg([over_p[n] for n in kept]), strict=True))
    found = []
    for name, members in kept.items():
        row = ranked.loc[name]
        p, fdr = (
            max(float(row[column]), 1 / config.permutations)
            for column in ("NOM p-val", "FDR q-val")
        )
        found.append(
            Pathway(
                name,
                len(members),
                float(row["ES"]),
                float(row["NES"]),
                p,
                fdr,
                len(set(members) & set(top)),
                over_p[name],
                over_fdr[name],
                [g for g in str(row["Lead_genes"]).split(";") if g],
            )
        )
    return sorted(found, key=lambda pathway: (-pathway.nes, pathway.name))


def benjamini_hochberg(p_values: Sequence[float]) -> list[float]:
    """False discovery rate of each test, in their order. Source: Benjamini & Hochberg 1995."""
    adjusted = [1.0] * len(p_values)
    best = 1.0
    for rank, i in reversed(
        list(enumerate(sorted(range(len(p_values)), key=p_values.__getitem__), 1))
    ):
        best = min(best, p_values[i] * len(p_values) / rank)
        adjusted[i] = best
    return adjusted


def _packages() -> tuple[Any, Any]:
    try:
        import gseapy
        import pandas
    except ImportError as error:
        raise MissingExtra("enrichment", "cells") from error
    return gseapy, pandas
