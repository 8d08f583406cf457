"""Distil: train a few entries of the broken model until it predicts as the intact one does.

How this works. Before the injury the intact model is asked for its predictions on the training
windows (lesson.py), so that it runs once over each and not at every step. Then the model is broken,
and gradients are let through to the tensors of the target matrices alone. What is trained are the
allowed entries, or the factors of a change of low rank, in float32 (run.py); each pass sees them
rounded to the weight's dtype, as they are written in the end. At every look the loss on windows
that training does not see is taken; they choose the step that is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int64
from torch import Tensor

from ..anatomy import Anatomy, Site
from ..errors import BadInput
from ..measure import ThreeStates, mean_nll
from ..patch import Patch
from ..progress import Tell, silent
from ..settings import values_of
from .config import DistilConfig
from .lesson import Lesson
from .run import Look, Part, Run, key_of
from .target import Changes, Target, broken, lowest

# at most so many windows at each look: looks take time from training, and this tells two steps
# apart
LOOKS_AT = 12


@dataclass(frozen=True)
class Distilled:
    """The repaired matrices, the steps taken, the one that was kept, and each look at `choose`."""

    changes: Changes
    steps: int
    kept: int
    curve: list[Look]


def distil(
    anatomy: Anatomy,
    injury: Patch,
    targets: Sequence[Target],
    fit: Int64[Tensor, "n length"],
    choose: Int64[Tensor, "m window"],
    config: DistilConfig = DistilConfig(),
    rank: int = 0,
    start: Changes | None = None,
    seed: int = 0,
    progress: Tell = silent,
    checkpoint: Path | None = None,
) -> Distilled:
    """Train the targets' entries with AdamW on the token-mean KL(intact || repaired); all other
    weights are frozen.

    The trained values are float32 (float64 for float64 weights). Every `config.every` steps the
    loss on the first LOOKS_AT windows of `choose` is taken; of the looks within 2% of the best, the
    last is kept. rank: train W + left @ right instead of single entries. start: matrices to begin
    from (a graft), default the broken ones. checkpoint: file written at each look; if it is there,
    training goes on from it, and ends with the same bytes as in one go.
    Raises: BadInput for a checkpoint of another run, or a sparse change of low rank.
    """
    if rank and (config.sparse_k or config.l1):
        raise BadInput(
            "a change of low rank cannot be sparse as well; leave out ‹rank›, or ‹sparse_k› and"
            " ‹l1›."
        )
    order = _order(len(fit), config.steps * config.batch, seed)
    sites, below = [t.site for t in targets], lowest(targets)
    choose = choose[:LOOKS_AT]
    lesson = Lesson(anatomy, fit, sorted(set(order)), below, config)
    exam = Lesson(anatomy, choose, range(len(choose)), below, config)
    intact = mean_nll(anatomy.model, choose)
    scales = [_rms(anatomy, target, injury) for target in targets]
    settings = [values_of(config), rank, seed]
    key = key_of(injury, targets, (fit, choose), start, settings)
    with broken(anatomy, injury, sites) as matrices, _only(anatomy, sites):
        untrained = exam.examine()
        starts = [(start or {}).get(site) for site in sites]
        parts = [
            Part(anatomy, target, matrices[target.site], begin, rank, scale, seed)
            for target, begin, scale in zip(targets, starts, scales, strict=True)
        ]
        run = Run(parts, config, key, checkpoint)
        while True:
            for part in parts:
                part.write_()
            if run.due:
                # before the first step, without a graft, the model is as it was examined
                loss, nll = exam.examine() if run.step or start else untrained
                run.look(loss, nll, ThreeStates(intact, untrained[1], nll).recovered)
                progress(run.says(), run.step, config.steps)
            if run.over:
                break
            drawn = order[run.step * config.batch : (run.step + 1) * config.batch]
            with torch.enable_grad():
                lesson.loss(lesson.logits(drawn), drawn).backward()  # type: ignore[no-untyped-call]
            run.advance()
        changes = {part.target.site: part.change() for part in run.kept()}
    return Distilled(changes, run.step, run.best_step, run.curve)


def _order(windows: int, n: int, seed: int) -> list[int]:
    """Which window each place of each batch takes: all of them in random order, again and again."""
    generator = torch.Generator().manual_seed(seed)
    epochs = -(-n // windows)
    orders = [torch.randperm(windows, generator=generator) for _ in range(epochs)]
    return torch.cat(orders)[:n].tolist()


def _rms(anatomy: Anatomy, target: Target, injury: Patch) -> float:
    """RMS weight of the target's rows without the injured entries, which may be outliers; of the
    matrix, if nothing is left of them.
    """
    matrix, spared = anatomy.view(target.site).read().double().cpu(), ~injury.touched(target.site)
    rest = matrix[target.rows][spared[target.rows]]
    return float(rest.pow(2).mean().sqrt()) if rest.any() else float(matrix.pow(2).mean().sqrt())


@contextmanager
def _only(anatomy: Anatomy, sites: Sequence[Site]) -> Iterator[None]:
    """Within the block gradients reach the tensors of `sites` and no others."""
    parameters = {p: (p.requires_grad, p.grad) for p in anatomy.model.parameters()}
    stored = [anatomy.model.get_parameter(anatomy.addresses[s].parameter) for s in sites]
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None
        for parameter in stored:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, (wanted, grad) in parameters.items():
            parameter.requires_grad_(wanted)
            parameter.grad = grad
