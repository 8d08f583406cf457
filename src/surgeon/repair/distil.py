"""Distil: train a few entries of the broken model until it predicts as the intact one does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from ..anatomy import Anatomy, Site
from ..errors import BadInput
from ..measure import mean_nll
from ..measure.likelihood import TOKENS_PER_BATCH, logits_of
from ..patch import Patch
from ..tap import LayerInput, capture, resume
from .run import Part, Run, key_of
from .target import Changes, Target, broken, lowest

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class DistilConfig:
    """Settings of distillation."""

    loss: str = field(default="kl", metadata={"help": "kl to the intact model, or ce (cross-entropy on the text)"})
    steps: int = field(default=400, metadata={"help": "training steps"})
    batch: int = field(default=2, metadata={"help": "windows per step"})
    length: int = field(default=128, metadata={"help": "tokens per training window, BOS included; at most --window"})
    lr: float = field(default=0.0, metadata={"help": "learning rate of AdamW; 0 takes --relative-lr"})
    relative_lr: float = field(
        default=0.08, metadata={"help": "learning rate as a share of the RMS weight of the rows; for OLMo-1B's vital row about 1e-3"}
    )
    schedule: str = field(default="cosine", metadata={"help": "cosine (down to 0) or constant"})
    weight_decay: float = field(default=0.0, metadata={"help": "weight decay of AdamW"})
    l1: float = field(default=0.0, metadata={"help": "pull of every change back to 0, as a share of the optimizer's own step"})
    sparse_k: int = field(default=0, metadata={"help": "change only this many entries, chosen during training; 0: all"})
    every: int = field(default=25, metadata={"help": "steps between looks at the held-out slice"})
    patience: int = field(default=6, metadata={"help": "looks without improvement before stopping; 0: train on and keep the last step"})
    cache_mb: int = field(default=512, metadata={"help": "MiB for the intact model's predictions; if more, the likeliest tokens"})

    def __post_init__(self) -> None:
        for name, allowed in (("loss", ("kl", "ce")), ("schedule", ("cosine", "constant"))):
            if getattr(self, name) not in allowed:
                raise BadInput(f"the {name} {getattr(self, name)!r} of a repair is not known; use {' or '.join(allowed)}.")
        for name, least in (("steps", 1), ("batch", 1), ("length", 2), ("every", 1), ("cache_mb", 1)):
            if getattr(self, name) < least:
                raise BadInput(f"{name} {getattr(self, name)} is too small for a repair; use at least {least}.")
        for name in ("lr", "relative_lr", "weight_decay", "l1", "sparse_k", "patience"):
            if getattr(self, name) < 0:
                raise BadInput(f"{name} {getattr(self, name)} of a repair is below 0.")


@dataclass(frozen=True)
class Distilled:
    """The repaired matrices, the steps taken, the one that was kept, and at each look [step, loss, NLL, recovered] on `choose`."""

    changes: Changes
    steps: int
    kept: int
    curve: list[list[float | None]]


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
    progress: Progress | None = None,
    checkpoint: Path | None = None,
) -> Distilled:
    """Train the targets' entries with AdamW on the token-mean KL(intact || repaired); all other weights are frozen.

    The trained values are float32 (float64 for float64 weights); each pass sees them rounded to the weight's dtype, as they are
    written in the end. The intact model's predictions, and what enters the lowest target layer, are computed once a window.
    Every `config.every` steps the loss on `choose` is taken; the best step is kept.
    rank: train W + left @ right instead of single entries. start: matrices to begin from (a graft), default the broken ones.
    checkpoint: file written at each look; if it is there, training goes on from it, and ends with the same bytes as in one go.
    Raises: BadInput for a checkpoint of another run, or a sparse change of low rank.
    """
    if rank and (config.sparse_k or config.l1):
        raise BadInput("a change of low rank cannot be sparse as well; leave out the rank, or sparse_k and l1.")
    order = _order(len(fit), config.steps * config.batch, seed)
    sites, below = [t.site for t in targets], lowest(targets)
    lesson = _Lesson(anatomy, fit, sorted(set(order)), below, config)
    exam = _Lesson(anatomy, choose, range(len(choose)), below, config)
    intact = mean_nll(anatomy.model, choose)
    scales = [_rms(anatomy, target, injury) for target in targets]
    with broken(anatomy, injury, sites) as matrices, _only(anatomy, sites):
        damage = exam.examine()[1] - intact
        starts = [(start or {}).get(site) for site in sites]
        parts = [Part(anatomy, t, matrices[t.site], s, rank, scale, seed) for t, s, scale in zip(targets, starts, scales, strict=True)]
        run = Run(parts, config, key_of(injury, targets, (fit, choose), start, [asdict(config), rank, seed]), checkpoint)
        while True:
            for part in parts:
                part.write_()
            if run.due:
                loss, nll = exam.examine()
                run.look(loss, nll, 1 - (nll - intact) / damage if damage else None)
                if progress:
                    progress(run.says(), run.step, config.steps)
            if run.over:
                break
            drawn = order[run.step * config.batch : (run.step + 1) * config.batch]
            with torch.enable_grad():
                lesson.loss(lesson.logits(drawn), drawn).backward()  # type: ignore[no-untyped-call]
            run.advance()
        changes = {p.target.site: p.change() for p in run.kept()}
    return Distilled(changes, run.step, run.best_step, run.curve)


def _order(windows: int, n: int, seed: int) -> list[int]:
    """Which window each place of each batch takes: all of them in random order, again and again."""
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([torch.randperm(windows, generator=generator) for _ in range(-(-n // windows))])[:n].tolist()


def _rms(anatomy: Anatomy, target: Target, injury: Patch) -> float:
    """RMS weight of the target's rows without the injured entries, which may be outliers; of the matrix, if nothing is left of them."""
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


class _Lesson:
    """Windows, what the intact model predicts on them, and what enters the lowest target layer, each computed once.

    Built in the intact model. Kept are the log-probabilities of all tokens or, if the cache would not hold them, those of the
    likeliest tokens and of all others together.
    """

    @torch.no_grad()
    def __init__(self, anatomy: Anatomy, windows: Int64[Tensor, "n window"], used: Sequence[int], start: int, config: DistilConfig) -> None:
        self.anatomy, self.windows, self.start = anatomy, windows, start
        room, length = config.cache_mb * 2**20, windows.shape[1]
        self.keeps_entries = start > 0 and len(used) * length * anatomy.d_model * 4 <= room
        self.entries: dict[int, LayerInput] = {}
        self.predictions: dict[int, tuple[Tensor, Tensor | None]] = {}
        if config.loss == "ce":
            return
        positions = len(used) * (length - 1)
        for index in used:
            log_p = F.log_softmax(logits_of(anatomy.model, windows[index : index + 1])[0, :-1].float(), -1)
            if positions * log_p.shape[-1] * 4 <= room:
                self.predictions[index] = (log_p, None)
                continue
            k = min(room // (positions * 8), log_p.shape[-1] - 1)
            if k < 1:
                raise BadInput(f"a cache of {config.cache_mb} MiB does not hold one prediction for each of {positions} tokens; raise it.")
            likeliest = log_p.topk(k).indices
            self.predictions[index] = (_coarse(log_p, likeliest), likeliest.int())

    def logits(self, drawn: Sequence[int]) -> Float[Tensor, "batch pos d_vocab"]:
        """Of the model as it stands; it must not differ below the lowest target layer from one call to the next."""
        model, layers, ids = self.anatomy.model, self.anatomy.layers, self.windows[list(drawn)]
        if not self.keeps_entries:
            return logits_of(model, ids)
        for index in drawn:
            if index not in self.entries:
                one = self.windows[index : index + 1].to(next(model.parameters()).device)
                with torch.no_grad():
                    self.entries[index] = capture(model, layers, self.start, input_ids=one)
        entries = [self.entries[index] for index in drawn]
        with resume(layers, LayerInput(self.start, torch.cat([e.states for e in entries]), entries[0].as_tuple)):
            return logits_of(model, ids)

    def nll(self, logits: Float[Tensor, "batch pos d_vocab"], drawn: Sequence[int]) -> Tensor:
        return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), self.windows[list(drawn), 1:].flatten().to(logits.device))

    def loss(self, logits: Float[Tensor, "batch pos d_vocab"], drawn: Sequence[int]) -> Tensor:
        """Mean over predicted tokens of KL(intact || repaired), or of the NLL; where only the likeliest tokens are kept, of the KL
        between the distributions over them and "any other", which is less than the whole."""
        if not self.predictions:
            return self.nll(logits, drawn)
        total = logits.new_zeros((), dtype=torch.float32)
        for log_q, index in zip(F.log_softmax(logits[:, :-1].float(), -1), drawn, strict=True):
            log_p, likeliest = self.predictions[index]
            log_q = log_q if likeliest is None else _coarse(log_q, likeliest.long())
            total = total + (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        return total / len(drawn)

    @torch.no_grad()
    def examine(self) -> tuple[float, float]:
        """Loss and NLL over all windows."""
        sums = torch.zeros(2, dtype=torch.float64)
        for drawn in torch.split(torch.arange(len(self.windows)), max(1, TOKENS_PER_BATCH // self.windows.shape[1])):
            some = drawn.tolist()
            logits = self.logits(some)
            sums += len(some) * torch.stack([self.loss(logits, some), self.nll(logits, some)]).double().cpu()
        loss, nll = (sums / len(self.windows)).tolist()
        return loss, nll


def _coarse(log_p: Float[Tensor, "pos d_vocab"], kept: Int64[Tensor, "pos k"]) -> Float[Tensor, "pos k1"]:
    """The distribution over the kept tokens and all others as one."""
    rest = log_p.scatter(-1, kept, float("-inf")).logsumexp(-1, keepdim=True)
    return torch.cat([log_p.gather(-1, kept), rest], -1)
