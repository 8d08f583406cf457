"""What a Geneformer loses without given weights: `find.verify` with a masked likelihood."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ..anatomy import Anatomy, Region
from ..cells.candidates import candidates, prune
from ..cells.data import Expression
from ..cells.geneformer import Dictionary, rank_nll, rank_tokens
from ..cells.likelihood import MaskedNLL, Progress, masks
from ..errors import BadInput
from ..find import VerifyConfig, verify
from ..progress import silent
from ..settings import setting
from .cells import control_figures

LEAST_CELLS, LEAST_TOKENS = 8, 4


@dataclass(frozen=True)
class GeneformerConfig:
    """Settings of the measurement."""

    cells: int = setting(32, "most cells to measure on, a random choice")
    length: int = setting(2048, "most tokens of a cell")
    draws: int = setting(2, "draws of masks over the same cells")
    ratio: float = setting(0.15, "share of the genes that a draw hides")
    seed: int = setting(0, "seed of everything random")


@dataclass(frozen=True)
class GeneformerDamage:
    """Damage of `at` together, in nats per masked gene."""

    at: list[str]
    base_nll: float
    masked_genes: int
    cells: int
    joint_nats: float
    ci95: tuple[float, float]
    p_value: float
    controls: dict[str, Any]
    vital: bool


def geneformer(
    anatomy: Anatomy,
    expression: Expression,
    tokens: Dictionary,
    medians: Dictionary | None = None,
    parts: Sequence[Region] = (),
    config: GeneformerConfig = GeneformerConfig(),
    progress: Progress | None = None,
) -> GeneformerDamage:
    """What the BertForMaskedLM loses without `parts`, beside matched controls.

    Without parts: of each layer's largest |w·x| in `mlp.down` the worst, chosen on a quarter of the
    cells and judged on the others.
    Raises: BadInput for fewer than 8 cells, and as `rank_tokens`, `rank_nll` and `verify`.
    """
    n = len(expression.cell_names)
    if min(n, config.cells) < LEAST_CELLS or config.length < LEAST_TOKENS:
        raise BadInput(
            f"{min(n, config.cells)} cells of up to {config.length} tokens are too few to choose a"
            f" weight on some and judge it on others; give at least {LEAST_CELLS} cells, of"
            f" {LEAST_TOKENS} tokens."
        )
    order = torch.randperm(n, generator=torch.Generator().manual_seed(config.seed))
    chosen = sorted(order[: config.cells].tolist())
    longest = getattr(anatomy.config, "max_position_embeddings", config.length)
    length = min(config.length, longest)
    batch = rank_tokens(expression.of(chosen), tokens, medians, length)
    masked = masks(batch, config.ratio, config.draws, config.seed)
    evidence = partial(MaskedNLL, anatomy, read=rank_nll, keep=False)
    parts = list(parts)
    if not parts:
        cut = len(chosen) // 4
        nll = evidence(batch.of(slice(cut)), masked[:1, :cut])
        parts = [prune(nll, candidates(nll, anatomy.downs(), each=1), progress)[0].region]
        batch, masked = batch.of(slice(cut, len(chosen))), masked[:, cut:]
    rules = VerifyConfig(seed=config.seed)
    verification = verify(anatomy, parts, evidence(batch, masked), rules, progress or silent, 0)
    return GeneformerDamage(
        [str(part) for part in parts],
        base_nll=verification.base_nll,
        masked_genes=verification.tokens,
        cells=len(batch.cell_names),
        joint_nats=verification.joint_nats,
        ci95=verification.ci95,
        p_value=verification.p_value,
        controls=control_figures(verification.controls),
        vital=verification.vital,
    )
