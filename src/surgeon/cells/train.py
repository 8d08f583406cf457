"""Train a small scGPT on one data set, on a CPU in minutes: hidden values of a cell, told from the
others.

Cells are split three ways: the first part is fitted, the second says when to stop, the third, seen
by neither, gives the figures. The gene-marginal baseline is fitted on the same cells and smoothed
as suits the second part best.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import BadInput, SurgeonError
from ..measure.bootstrap import interval
from ..progress import Tell, silent
from ..result import Result, result
from ..settings import check_values, setting
from .checkpoint import make_vocab, save_cells
from .data import Expression
from .likelihood import (
    CHUNK,
    RATIO,
    Marginal,
    Masks,
    best_marginal,
    by_cell,
    masked_nll,
    masks,
)
from .model import CellConfig, ScGPT
from .tokenise import Batch, TokenConfig, tokenise

LEAST_CELLS = 20
ROUND = 1024  # cells that are tokenised at a time
LOOK_CELLS = 1024  # most cells of each part that figures are taken on
FIT_CELLS = 8192  # most cells that the baseline is fitted on
RATIOS = (0.25, 0.5, 0.75)  # published: how much of a cell is hidden changes from batch to batch


@dataclass(frozen=True)
class TrainConfig:
    """Everything the result depends on, apart from the machine's arithmetic."""

    steps: int = setting(600, "most steps of training", low=1)
    max_genes: int = setting(
        2000, "genes the model knows, those detected in most training cells", low=1
    )
    genes: int = setting(256, "genes of each cell in a step, chosen at random", low=2)
    include_zeros: bool = setting(True, "undetected genes are values to be told too")
    layers: int = setting(3, "encoder blocks", low=1, group="Model")
    d_model: int = setting(64, "channels of the residual stream", low=1, group="Model")
    heads: int = setting(4, "attention heads", low=1, group="Model")
    d_mlp: int = setting(128, "neurons of each MLP", low=1, group="Model")
    dropout: float = setting(0.1, "dropout while training", low=0, high=0.9, group="Training")
    batch: int = setting(16, "cells in a step", low=1, group="Training")
    lr: float = setting(3e-3, "highest learning rate (AdamW)", low=1e-9, group="Training")
    warmup: int = setting(50, "steps over which the rate rises", low=1, group="Training")
    look_every: int = setting(
        50, "steps between looks at the validation cells", low=1, group="Training"
    )
    patience: int = setting(
        6, "looks without a gain after which training stops", low=1, group="Training"
    )
    held_out: float = setting(
        0.15,
        "share of the cells for validation, and again for the test",
        low=0.001,
        high=0.499,
        group="Training",
    )
    seed: int = setting(0, "seed of everything random", low=0, high=2**32 - 1)

    def __post_init__(self) -> None:
        check_values(self)


@result("cells train")
class CellTraining(Result):
    """How training went; figures are on the test cells, in nats per masked value, cells weighing
    alike.

    lead_nats: by how much the gene-marginal baseline is worse. validation_curve: each look, as step
    and NLL. expression: counts or log-counts. output: the folder of the checkpoint.
    """

    nll: float
    baseline_nll: float
    lead_nats: float
    lead_ci95: tuple[float, float]
    train_nll: float
    validation_nll: float
    seconds: float
    steps: int
    best_step: int
    validation_curve: list[tuple[int, float]]
    cells: dict[str, int]
    genes: int
    parameters: int
    source: str
    expression: str
    mask_ratio: float
    output: str = ""


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained model, with which cells went where, and its figures."""

    model: ScGPT
    vocab: dict[str, int]
    tokens: TokenConfig
    marginal: Marginal
    split: dict[str, list[str]]
    config: TrainConfig
    figures: CellTraining

    def save(self, folder: str | Path) -> None:
        """Write it in the published layout, with what belongs beside it: the same for the same
        seed, so without times.
        """
        training = {
            "split": self.split,
            "source": self.figures.source,
            "settings": asdict(self.config),
            "nll": self.figures.nll,
            "baseline_nll": self.figures.baseline_nll,
        }
        save_cells(folder, self.model, self.vocab, self.tokens, self.marginal, training)


def train(
    expression: Expression, config: TrainConfig = TrainConfig(), tell: Tell = silent
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

    def fixed(name: str, most: int) -> Batch:
        return tokenise(_some(parts[name], most), vocab, tokens, config.seed)

    looks = {name: fixed(name, LOOK_CELLS) for name in parts}
    masked = {name: masks(batch, seed=config.seed) for name, batch in looks.items()}
    validation = (looks["validation"], masked["validation"])
    fitted = fixed("train", FIT_CELLS)
    marginal = best_marginal(fitted, *validation, len(vocab), tokens.n_bins)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        sizes = (config.d_model, config.heads, config.d_mlp, config.layers)
        pad, dropout = vocab["<pad>"], config.dropout
        shape = CellConfig(len(vocab), *sizes, pad_id=pad, dropout=dropout, categorical=True)
        model = ScGPT(shape)
        _begin_(model, fitted, marginal)
        batches = _batches(parts["train"], vocab, tokens, config)
        curve, best_step = _fit_(model, batches, validation, config, tell)
    nll = {name: _by_cell(model, batch, masked[name]) for name, batch in looks.items()}
    lead = by_cell(marginal.nll(looks["test"], masked["test"])) - nll["test"]
    split = {name: part.cell_names for name, part in parts.items()}
    figures = CellTraining(
        nll=float(nll["test"].mean()),
        baseline_nll=float((nll["test"] + lead).mean()),
        lead_nats=float(lead.mean()),
        lead_ci95=interval(lead, config.seed),
        train_nll=float(nll["train"].mean()),
        validation_nll=float(nll["validation"].mean()),
        seconds=time.perf_counter() - start,
        steps=curve[-1][0],
        best_step=best_step,
        validation_curve=curve,
        cells={name: len(names) for name, names in split.items()},
        genes=len(vocab) - 3,
        parameters=sum(p.numel() for p in model.parameters()),
        source=expression.source,
        expression=expression.kind,
        mask_ratio=RATIO,
    )
    return Trained(model, vocab, tokens, marginal, split, config, figures)


def _split(expression: Expression, config: TrainConfig) -> dict[str, Expression]:
    n = len(expression.cell_names)
    usable = (torch.tensor(expression.matrix.getnnz(axis=1)) > 1).nonzero().flatten()
    if len(usable) < max(LEAST_CELLS, n // 2):
        raise BadInput(
            f"{len(usable)} of {n} cells have two detected genes or more; training needs"
            f" {LEAST_CELLS} such, and half of all."
        )
    generator = torch.Generator().manual_seed(config.seed)
    order = usable[torch.randperm(len(usable), generator=generator)].tolist()
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


@torch.no_grad()
def _begin_(model: ScGPT, batch: Batch, marginal: Marginal) -> None:
    """Start the genes where the training cells put them: how often each is detected, how high, and
    with which others.

    From random embeddings the first thousand steps go into the marginals alone.
    """
    embedding = model.get_input_embeddings().weight
    n_tokens, d = embedding.shape
    cells = torch.zeros(len(batch.cell_names), n_tokens)
    at = batch.scored
    cells[at.nonzero()[:, 0], batch.genes[at]] = batch.values[at]
    genes = (cells != 0).any(0)
    probs = marginal.log_probs[genes].exp()
    detected = 1 - probs[:, 0]
    height = marginal.mean_bin[genes] / detected
    usual = cells[:, genes]
    usual = (usual - usual.mean(0)) / (usual.std(0) + 1e-6)
    _, sizes, along = torch.svd_lowrank(usual, q=min(d // 2, *usual.shape), niter=4)
    often = torch.logit(detected.clamp(1e-3, 1 - 1e-3))
    features = torch.cat([often[:, None], height[:, None], along], 1)
    features = (features - features.mean(0)) / (features.std(0) + 1e-6)
    # the first directions, cell types mostly, count most
    features[:, 2:] *= (sizes / sizes[0]).sqrt()
    start = 0.1 * torch.randn(n_tokens, d)
    start[genes, : features.shape[1]] = features[:, :d]
    # along the axes these features would make single weights of the norms vital, by the choice of
    # the start alone: docs/cells.md
    start = start @ torch.linalg.qr(torch.randn(d, d))[0]
    start[model.shape.pad_id] = 0
    embedding.copy_(start)
    assert model.bin_decoder is not None
    # biases of the last layer of each head
    list(model.bin_decoder.parameters())[-1].copy_(probs.mean(0).log())
    list(model.decoder.parameters())[-1].fill_(float(batch.values[at].mean()))


def _fit_(
    model: ScGPT,
    batches: Iterator[Batch],
    validation: tuple[Batch, Masks],
    config: TrainConfig,
    tell: Tell,
) -> tuple[list[tuple[int, float]], int]:
    """Train the model, and leave it as it was at its best look; every look as (step, validation
    NLL), and the step of the best.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.lr, betas=(0.9, 0.98), weight_decay=0.01
    )
    curve: list[tuple[int, float]] = []
    best, best_step, kept = float("inf"), 0, copy.deepcopy(model.state_dict())
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
        tell("training", step, config.steps)
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
            " use a lower ‹lr›."
        )
    model.load_state_dict(kept)
    model.eval().requires_grad_(False)
    return curve, best_step


def _batches(
    cells: Expression, vocab: dict[str, int], tokens: TokenConfig, config: TrainConfig
) -> Iterator[Batch]:
    """Cells in random order, each time with other genes, and ties binned anew."""
    tokens = replace(tokens, max_length=min(tokens.max_length, config.genes + 1))
    generator = torch.Generator().manual_seed(config.seed)
    seed = config.seed
    while True:
        order = torch.randperm(len(cells.cell_names), generator=generator).tolist()
        for at in range(0, len(order), ROUND):
            seed += 1
            batch = tokenise(cells.of(order[at : at + ROUND]), vocab, tokens, seed)
            for piece in batch.pieces(config.batch):
                yield batch.of(piece)


def _loss(model: ScGPT, batch: Batch) -> Tensor:
    """NLL of the hidden bins, and the squared error of the regression in units of the squared
    number of bins.
    """
    ratio = RATIOS[int(torch.randint(len(RATIOS), ()))]
    hidden = (torch.rand(batch.genes.shape) < ratio) & batch.scored
    hidden[:, 1] |= ~hidden.any(1)  # at least one, also in a cell of few genes
    values = batch.values.masked_fill(hidden, model.shape.mask_value)
    output = model(batch.genes, values, batch.padding)
    assert output.logits is not None
    target = batch.values[hidden]
    error = (output.value_pred[hidden] - target) / model.shape.n_bins
    loss: Tensor = F.cross_entropy(output.logits[hidden], target.long()) + error.square().mean()
    return loss


def _by_cell(model: ScGPT, batch: Batch, masked: Masks) -> Tensor:
    """NLL (cell,) in nats per masked value."""
    model.eval()
    pieces = batch.pieces(CHUNK)
    return torch.cat([by_cell(masked_nll(model, batch.of(p), masked[:, p])) for p in pieces])
