"""`cells geneformer`: what a Geneformer loses without given weights, by `find.verify` with a masked
likelihood.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from ..anatomy import Region
from ..cells.candidates import candidates, prune
from ..cells.data import DATA_HELP, expression, read_cells
from ..cells.geneformer import rank_nll, rank_tokens, read_dictionary
from ..cells.likelihood import MaskedNLL, masks
from ..errors import BadInput
from ..find import Verification, VerifyConfig, verify
from ..result import result
from ..settings import nested, setting
from .lab import Lab
from .naming import regions_of

LEAST_CELLS, LEAST_TOKENS = 8, 4


@dataclass(frozen=True)
class Settings:
    """Zero weights of the Geneformer in MODEL and measure its masked likelihood on the cells in
    DATA (counts, Ensembl ids).
    """

    data: str = setting(help=DATA_HELP, metavar="DATA", is_file=True)
    tokens: str = setting(
        help="token dictionary as JSON: Ensembl id to token, <pad> and <mask> too",
        metavar="FILE",
        is_file=True,
    )
    medians: str | None = setting(
        None,
        "median of each gene as JSON; not given: genes are ranked as they are",
        metavar="FILE",
        is_file=True,
    )
    at: Any = setting(
        (),
        "weights to zero; not given: the worst of each layer's largest |w·x|",
        metavar="ENTRY",
        many=True,
    )
    cells: int = setting(32, "most cells to measure on, a random choice", low=LEAST_CELLS)
    length: int = setting(2048, "most tokens of a cell", low=LEAST_TOKENS)
    draws: int = setting(2, "draws of masks over the same cells", low=1)
    ratio: float = setting(0.15, "share of the genes that a draw hides", low=0.001, high=0.999)
    rules: VerifyConfig = nested(VerifyConfig, without=("seed",))
    seed: int = setting(0, "seed of everything random", low=0, high=2**32 - 1)


@result("cells geneformer")
class GeneformerDamage(Verification):
    """Damage of `at` together in nats per masked gene, of which there are `tokens`; the interval is
    over cells.
    """

    cells: int = field(kw_only=True)


def run(lab: Lab, settings: Settings) -> GeneformerDamage:
    """Without weights the worst is chosen on a quarter of the cells, and judged on the others.

    Raises: BadInput for fewer than 8 cells, and as `rank_tokens`, `rank_nll` and `verify`.
    """
    tokens = read_dictionary(settings.tokens)
    medians = None if settings.medians is None else read_dictionary(settings.medians)
    values, seed = expression(read_cells(settings.data)), settings.seed
    n = len(values.cell_names)
    if n < LEAST_CELLS:
        raise BadInput(
            f"{n} cells are too few to choose a weight on some and judge it on others; give at"
            f" least {LEAST_CELLS}."
        )
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    chosen = sorted(order[: settings.cells].tolist())
    longest = lab.positions or settings.length
    batch = rank_tokens(values.of(chosen), tokens, medians, min(settings.length, longest))
    masked = masks(batch, settings.ratio, settings.draws, seed)
    evidence = partial(MaskedNLL, lab.anatomy, read=rank_nll, keep=False)
    if settings.at:
        parts = regions_of(lab, settings.at)
        settings = replace(settings, at=[str(part) for part in parts])
    else:
        cut = len(chosen) // 4
        parts = [_worst(lab, evidence(batch.of(slice(cut)), masked[:1, :cut]))]
        batch, masked = batch.of(slice(cut, len(chosen))), masked[:, cut:]
    rules, judging = replace(settings.rules, seed=seed), evidence(batch, masked)
    said = verify(lab.anatomy, parts, judging, rules, lab.tell, listed=0)
    figures = {**vars(said), "provenance": lab.provenance(settings)}
    return GeneformerDamage(**figures, cells=len(batch.cell_names))


def _worst(lab: Lab, nll: MaskedNLL) -> Region:
    """Of each layer's largest |w·x| in `mlp.down` the one that costs most."""
    return prune(nll, candidates(nll, lab.anatomy.downs(), each=1), lab.tell)[0].address
