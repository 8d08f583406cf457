"""Train a small scGPT on one data set, on a CPU in minutes: hidden values of a cell, told from the
others.

Cells are split three ways: the first part is fitted, the second says when to stop, the third, seen
by neither, gives the figures. The gene-marginal baseline is fitted on the same cells and smoothed
as suits the second part best.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import BadInput, SurgeonError
from ..measure.bootstrap import interval
from .checkpoint import make_vocab
from .data import Expression
from .likelihood import RATIO, Marginal, best_marginal, masked_nll, masks, scored
from .model import CellConfig, ScGPT
from .tokenise import Batch, TokenConfig, tokenise

Progress = Callable[[str, int, int], None]
CHUNK = 16  # cells in one pass that is not trained on
LEAST_CELLS = 20
ROUND = 1024  # cells that are tokenised at a time
LOOK_CELLS = 1024  # most cells of each part that figures are taken on
FIT_CELLS = 8192  # most cells that the baseline is fitted on
RATIOS = (0.25, 0.5, 0.75)  # published: how much of a cell is hidden changes from batch to batch


@dataclass(frozen=True)
class TrainConfig:
    """Everything the result depends on, apart from the machine's arithmetic."""

    layers: int = field(default=3, metadata={"help": "encoder blocks"})
    d_model: int = field(default=64, metadata={"help": "channels of the residual stream"})
    heads: int = field(default=4, metadata={"help": "attention heads"})
    d_mlp: int = field(default=128, metadata={"help": "neurons of each MLP"})
    dropout: float = field(default=0.1, metadata={"help": "dropout while training"})
    steps: int = field(default=600, metadata={"help": "most steps of training"})
    batch: int = field(default=16, metadata={"help": "cells in a step"})
    genes: int = field(
        default=256, metadata={"help": "genes of each cell in a step, chosen at random"}
    )
    lr: float = field(default=3e-3, metadata={"help": "highest learning rate (AdamW)"})
    warmup: int = field(default=50, metadata={"help": "steps over which the rate rises"})
    look_every: int = field(
        default=50, metadata={"help": "steps between looks at the validation cells"}
    )
    patience: int = field(
        default=6, metadata={"help": "looks without a gain after which training stops"}
    )
    held_out: float = field(
        default=0.15, metadata={"help": "share of the cells for validation, and again for the test"}
    )
    max_genes: int = field(
        default=2000,
        metadata={"help": "genes the model knows, those detected in most training cells"},
    )
    include_zeros: bool = field(
        default=True, metadata={"help": "undetected genes are values to be told too"}
    )
    seed: int = field(default=0, metadata={"help": "seed of everything random"})

    def __post_init__(self) -> None:
        if (
            min(self.steps, self.batch, self.look_every, self.patience, self.max_genes) < 1
            or self.genes < 2
        ):
            raise BadInput(
                "training needs at least one step, cell, look and gene, and two genes of each cell"
                " in a step."
            )
        if not 0 < self.held_out < 0.5 or self.lr <= 0:
            raise BadInput(
                f"a share of {self.held_out:g} held out twice, or a rate of {self.lr:g}, cannot be"
                " trained with; use 0.15 and 3e-3."
            )


PRESETS = {"pbmc68k": TrainConfig()}


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained model, and its figures on the test cells, in nats per masked value, cells weighing
    alike.
    """

    model: ScGPT
    vocab: dict[str, int]
    tokens: TokenConfig
    marginal: Marginal
    split: dict[str, list[str]]
    nll: float
    baseline_nll: float
    lead_ci95: tuple[float, float]
    train_nll: float
    validation_nll: float
    regression_error: tuple[float, float]
    curve: list[tuple[int, float]]
    best_step: int
    seconds: float
    source: str
    config: TrainConfig

    def to_json(self) -> dict[str, Any]:
        return {
            "nll": self.nll,
            "baseline_nll": self.baseline_nll,
            "lead_nats": self.baseline_nll - self.nll,
            "lead_ci95": list(self.lead_ci95),
            "train_nll": self.train_nll,
            "validation_nll": self.validation_nll,
            "rms_error_bins": dict(zip(("model", "baseline"), self.regression_error, strict=True)),
            "seconds": self.seconds,
            "steps": self.curve[-1][0],
            "best_step": self.best_step,
            "validation_curve": [list(point) for point in self.curve],
            "cells": {name: len(cells) for name, cells in self.split.items()},
            "genes": len(self.vocab) - 3,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "source": self.source,
            "mask_ratio": RATIO,
            "settings": asdict(self.config),
        }

    def record(self) -> dict[str, Any]:
        """What belongs beside the checkpoint: the same for the same seed, so without times."""
        return {
            "source": self.source,
            "split": self.split,
            "settings": asdict(self.config),
            "nll": self.nll,
            "baseline_nll": self.baseline_nll,
        }


def train(
    expression: Expression, config: TrainConfig = TrainConfig(), progress: Progress | None = None
) -> Trained:
    """Train from scratch on these cells; the same seed gives the same model on the same machine.
    torch's global seed is left alone.

    Raises: BadInput for fewer than 20 cells or 2 genes; SurgeonError if training diverges.
    """
    start = time.perf_counter()
    parts = _split(expression, config)
    vocab = make_vocab(_genes(parts["train"], config.max_genes))
    tokens = TokenConfig(max_length=len(vocab) - 2, include_zeros=config.include_zeros)
    parts = {name: part.of(_detected(part, vocab)) for name, part in parts.items()}
    fixed = {
        name: tokenise(_some(part, LOOK_CELLS), vocab, tokens, config.seed)
        for name, part in parts.items()
    }
    masked = {name: masks(batch, seed=config.seed) for name, batch in fixed.items()}
    fitted = tokenise(_some(parts["train"], FIT_CELLS), vocab, tokens, config.seed)
    marginal = best_marginal(
        fitted, fixed["validation"], masked["validation"], len(vocab), tokens.n_bins
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = _build(vocab, config)
        _begin_(model, fitted, marginal)
        model, curve, best = _fit(
            model,
            parts["train"],
            vocab,
            tokens,
            (fixed["validation"], masked["validation"]),
            config,
            progress,
        )
    nll = {name: _by_cell(model, batch, masked[name]) for name, batch in fixed.items()}
    base = marginal.nll(fixed["test"], masked["test"]).nanmean((0, 2)).double()
    return Trained(
        model,
        vocab,
        tokens,
        marginal,
        {name: part.cell_names for name, part in parts.items()},
        nll=float(nll["test"].mean()),
        baseline_nll=float(base.mean()),
        lead_ci95=interval(base - nll["test"], config.seed),
        train_nll=float(nll["train"].mean()),
        validation_nll=float(nll["validation"].mean()),
        regression_error=_errors(model, marginal, fixed["test"], masked["test"]),
        curve=curve,
        best_step=best,
        seconds=time.perf_counter() - start,
        source=expression.source,
        config=config,
    )


def _split(expression: Expression, config: TrainConfig) -> dict[str, Expression]:
    n = len(expression.cell_names)
    detected = torch.tensor(expression.matrix.getnnz(axis=1))
    if int((detected > 1).sum()) < max(LEAST_CELLS, n // 2):
        raise BadInput(
            f"{int((detected > 1).sum())} of {n} cells have two detected genes or more; training"
            f" needs {LEAST_CELLS} such, and half of all."
        )
    usable = (detected > 1).nonzero().flatten()
    order = usable[
        torch.randperm(len(usable), generator=torch.Generator().manual_seed(config.seed))
    ].tolist()
    held = max(2, round(config.held_out * len(order)))
    bounds = {
        "test": order[:held],
        "validation": order[held : 2 * held],
        "train": order[2 * held :],
    }
    return {name: expression.of(sorted(cells)) for name, cells in bounds.items()}


def _detected(part: Expression, vocab: dict[str, int]) -> list[int]:
    """Cells in which a gene of the vocabulary is detected."""
    known = [i for i, name in enumerate(part.gene_names) if name in vocab]
    return [i for i, n in enumerate(part.matrix[:, known].getnnz(axis=1)) if n]


def _some(part: Expression, most: int) -> Expression:
    """Every so many of the cells, so that there are `most` at the most."""
    n = len(part.cell_names)
    return part.of(list(range(0, n, -(-n // most)))) if n > most else part


def _genes(train: Expression, most: int) -> list[str]:
    """The genes detected in most training cells, in the order of the data.

    Raises: BadInput if there are fewer than two.
    """
    detected = torch.tensor(train.matrix.getnnz(axis=0))
    order = detected.argsort(descending=True, stable=True)[:most]
    kept = sorted(order[detected[order] > 0].tolist())
    if len(kept) < 2:
        raise BadInput(
            f"{len(kept)} genes are detected in the training cells; a model of expression needs at"
            " least 2."
        )
    return [train.gene_names[i] for i in kept]


def _build(vocab: dict[str, int], config: TrainConfig) -> ScGPT:
    return ScGPT(
        CellConfig(
            n_tokens=len(vocab),
            d_model=config.d_model,
            n_heads=config.heads,
            d_mlp=config.d_mlp,
            n_layers=config.layers,
            pad_id=vocab["<pad>"],
            dropout=config.dropout,
            categorical=True,
            flags=False,
            from_cell=False,
        )
    )


@torch.no_grad()
def _begin_(model: ScGPT, batch: Batch, marginal: Marginal) -> None:
    """Start the genes where the training cells put them: how often each is detected, how high, and
    with which others.

    From random embeddings the first thousand steps go into the marginals alone.
    """
    n_tokens, d = model.encoder.embedding.weight.shape
    cells = torch.zeros(len(batch.cell_names), n_tokens)
    at = scored(batch)
    cells[at.nonzero()[:, 0], batch.genes[at]] = batch.values[at]
    genes = (cells != 0).any(0)
    probs = marginal.log_probs[genes].exp()
    detected = 1 - probs[:, 0]
    height = (probs[:, 1:] @ torch.arange(1.0, probs.shape[1])) / detected
    usual = cells[:, genes]
    usual = (usual - usual.mean(0)) / (usual.std(0) + 1e-6)
    _, sizes, along = torch.svd_lowrank(usual, q=min(d // 2, *usual.shape), niter=4)
    features = torch.cat(
        [torch.logit(detected.clamp(1e-3, 1 - 1e-3))[:, None], height[:, None], along], 1
    )
    features = (features - features.mean(0)) / (features.std(0) + 1e-6)
    features[:, 2:] *= (
        sizes / sizes[0]
    ).sqrt()  # the first directions, cell types mostly, count most
    start = 0.1 * torch.randn(n_tokens, d)
    start[genes, : features.shape[1]] = features[:, :d]
    # along the axes these features would make single weights of the norms vital, by the choice of
    # the start alone: docs/cells.md
    start = start @ torch.linalg.qr(torch.randn(d, d))[0]
    start[model.shape.pad_id] = 0
    model.encoder.embedding.weight.copy_(start)
    head = model.bin_decoder.fc[-1] if model.bin_decoder is not None else None
    if isinstance(head, torch.nn.Linear):
        head.bias.copy_(probs.mean(0).log())
    last = model.decoder.fc[-1]
    if isinstance(last, torch.nn.Linear):
        last.bias.fill_(float(batch.values[at].mean()))


def _fit(
    model: ScGPT,
    cells: Expression,
    vocab: dict[str, int],
    tokens: TokenConfig,
    validation: tuple[Batch, Tensor],
    config: TrainConfig,
    progress: Progress | None,
) -> tuple[ScGPT, list[tuple[int, float]], int]:
    """The model as it was at its best look, every look as (step, validation NLL), and the step of
    the best.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.lr, betas=(0.9, 0.98), weight_decay=0.01
    )
    curve: list[tuple[int, float]] = []
    best, best_step, kept = float("inf"), 0, copy.deepcopy(model.state_dict())
    batches = _batches(
        cells, vocab, replace(tokens, max_length=min(tokens.max_length, config.genes + 1)), config
    )
    for step in range(1, config.steps + 1):
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = config.lr * min(
                1.0, step / config.warmup, max(0.02, 1.25 * (1 - step / config.steps))
            )
        loss = _loss(model, next(batches))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if progress:
            progress("training", step, config.steps)
        if step % config.look_every == 0 or step == config.steps:
            nll = float(_by_cell(model, *validation).mean())
            curve.append((step, nll))
            if nll < best:
                best, best_step, kept = nll, step, copy.deepcopy(model.state_dict())
            elif (step - best_step) // config.look_every >= config.patience:
                break
    if best_step == 0:
        raise SurgeonError(
            f"training diverged: the validation NLL is {curve[-1][1]} after {curve[-1][0]} steps;"
            " use a lower --lr."
        )
    model.load_state_dict(kept)
    return model.eval().requires_grad_(False), curve, best_step


def _batches(
    cells: Expression, vocab: dict[str, int], tokens: TokenConfig, config: TrainConfig
) -> Iterator[Batch]:
    """Cells in random order, each time with other genes, and ties binned anew."""
    generator = torch.Generator().manual_seed(config.seed)
    turn = 0
    while True:
        order = torch.randperm(len(cells.cell_names), generator=generator).tolist()
        for at in range(0, len(order), ROUND):
            batch = tokenise(
                cells.of(order[at : at + ROUND]), vocab, tokens, seed=config.seed + 1 + turn
            )
            turn += 1
            for first in range(0, len(batch.cell_names), config.batch):
                piece = slice(first, first + config.batch)
                yield Batch(
                    batch.genes[piece],
                    batch.values[piece],
                    batch.padding[piece],
                    batch.gene_names,
                    batch.cell_names[piece],
                )


def _loss(model: ScGPT, batch: Batch) -> Tensor:
    """NLL of the hidden bins, and the squared error of the regression in units of the squared
    number of bins.
    """
    ratio = RATIOS[int(torch.randint(len(RATIOS), ()))]
    hidden = (torch.rand(batch.genes.shape) < ratio) & scored(batch)
    hidden[:, 1] |= ~hidden.any(1)  # at least one, also in a cell of few genes
    output = model(
        batch.genes, batch.values.masked_fill(hidden, model.shape.mask_value), batch.padding
    )
    assert output.logits is not None
    target = batch.values[hidden]
    error = (output.value_pred[hidden] - target) / model.shape.n_bins
    loss: Tensor = F.cross_entropy(output.logits[hidden], target.long()) + error.square().mean()
    return loss


def _by_cell(model: ScGPT, batch: Batch, masked: Tensor) -> Tensor:
    """NLL (cell,) in nats per masked value."""
    model.eval()
    pieces = [slice(at, at + CHUNK) for at in range(0, len(batch.cell_names), CHUNK)]
    return torch.cat(
        [
            masked_nll(
                model,
                Batch(
                    batch.genes[p],
                    batch.values[p],
                    batch.padding[p],
                    batch.gene_names,
                    batch.cell_names[p],
                ),
                masked[:, p],
            )
            .nanmean((0, 2))
            .double()
            for p in pieces
        ]
    )


@torch.no_grad()
def _errors(model: ScGPT, marginal: Marginal, batch: Batch, masked: Tensor) -> tuple[float, float]:
    """Root mean squared error, in bins, of the regression head and of the gene's mean bin."""
    seen = batch.values.masked_fill(masked[0], model.shape.mask_value)
    said = torch.cat(
        [
            model(*(x[at : at + CHUNK] for x in (batch.genes, seen, batch.padding))).value_pred
            for at in range(0, len(seen), CHUNK)
        ]
    )
    usual = (marginal.log_probs.exp() @ torch.arange(float(model.shape.n_bins)))[batch.genes]
    at = masked[0]
    model_error, baseline_error = (
        float((x - batch.values)[at].square().mean().sqrt()) for x in (said, usual)
    )
    return model_error, baseline_error
