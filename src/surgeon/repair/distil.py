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
from ..measure.likelihood import logits_of
from ..patch import Patch
from ..tap import LayerInput, capture, resume
from .run import Part, Run, key_of
from .target import Changes, Target, broken, lowest

# at most so many windows at each look: looks take time from training, and this tells two steps
# apart
LOOKS_AT = 12
TOKENS_AT_ONCE = 1024  # more take longer on a CPU, and hold more logits
# where the cache does not hold all tokens: sorting out more costs more than running the intact
# model
LIKELIEST = 128

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class DistilConfig:
    """Settings of distillation."""

    loss: str = field(
        default="kl", metadata={"help": "kl to the intact model, or ce (cross-entropy on the text)"}
    )
    steps: int = field(default=400, metadata={"help": "training steps"})
    batch: int = field(default=2, metadata={"help": "windows per step"})
    length: int = field(
        default=128, metadata={"help": "tokens per training window, BOS included; at most --window"}
    )
    lr: float = field(
        default=0.0, metadata={"help": "learning rate of AdamW; 0 takes --relative-lr"}
    )
    relative_lr: float = field(
        default=0.08,
        metadata={
            "help": (
                "learning rate as a share of the RMS weight of the rows; for OLMo-1B's vital row"
                " about 1e-3"
            )
        },
    )
    schedule: str = field(
        default="constant", metadata={"help": "constant (but for --cooldown) or cosine (down to 0)"}
    )
    cooldown: float = field(
        default=0.2,
        metadata={
            "help": "share of the steps, at the end, over which a constant rate goes straight to 0"
        },
    )
    weight_decay: float = field(default=0.0, metadata={"help": "weight decay of AdamW"})
    l1: float = field(
        default=0.0,
        metadata={"help": "pull of every change back to 0, as a share of the optimizer's own step"},
    )
    sparse_k: int = field(
        default=0,
        metadata={"help": "change only this many entries, chosen during training; 0: all"},
    )
    every: int = field(default=50, metadata={"help": "steps between looks at the held-out slice"})
    patience: int = field(
        default=4,
        metadata={
            "help": "looks without improvement before stopping; 0: train on and keep the last step"
        },
    )
    cache_mb: int = field(
        default=1024,
        metadata={"help": "MiB for the intact model's predictions; if more, the likeliest tokens"},
    )

    def __post_init__(self) -> None:
        for name, allowed in (("loss", ("kl", "ce")), ("schedule", ("constant", "cosine"))):
            if getattr(self, name) not in allowed:
                raise BadInput(
                    f"the {name} {getattr(self, name)!r} of a repair is not known; use"
                    f" {' or '.join(allowed)}."
                )
        for name, least in (
            ("steps", 1),
            ("batch", 1),
            ("length", 2),
            ("every", 1),
            ("cache_mb", 1),
        ):
            if getattr(self, name) < least:
                raise BadInput(
                    f"{name} {getattr(self, name)} is too small for a repair; use at least {least}."
                )
        if not 0 <= self.cooldown <= 1:
            raise BadInput(
                f"cooldown {self.cooldown} is not a share of the steps of a repair; use 0 to 1."
            )
        for name in ("lr", "relative_lr", "weight_decay", "l1", "sparse_k", "patience"):
            if getattr(self, name) < 0:
                raise BadInput(f"{name} {getattr(self, name)} of a repair is below 0.")


@dataclass(frozen=True)
class Distilled:
    """The repaired matrices, the steps taken, the one that was kept, and at each look [step, loss,
    NLL, recovered] on `choose`.
    """

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
    """Train the targets' entries with AdamW on the token-mean KL(intact || repaired); all other
    weights are frozen.

    The trained values are float32 (float64 for float64 weights); each pass sees them rounded to the
    weight's dtype, as they are written in the end. The intact model's predictions, and what enters
    the lowest target layer, are computed once a window. Every `config.every` steps the loss on the
    first LOOKS_AT windows of `choose` is taken; of the looks within 2% of the best, the last is
    kept. rank: train W + left @ right instead of single entries. start: matrices to begin from (a
    graft), default the broken ones. checkpoint: file written at each look; if it is there, training
    goes on from it, and ends with the same bytes as in one go.
    Raises: BadInput for a checkpoint of another run, or a sparse change of low rank.
    """
    if rank and (config.sparse_k or config.l1):
        raise BadInput(
            "a change of low rank cannot be sparse as well; leave out the rank, or sparse_k and l1."
        )
    order = _order(len(fit), config.steps * config.batch, seed)
    sites, below = [t.site for t in targets], lowest(targets)
    choose = choose[:LOOKS_AT]
    lesson = _Lesson(anatomy, fit, sorted(set(order)), below, config)
    exam = _Lesson(anatomy, choose, range(len(choose)), below, config)
    intact = mean_nll(anatomy.model, choose)
    scales = [_rms(anatomy, target, injury) for target in targets]
    with broken(anatomy, injury, sites) as matrices, _only(anatomy, sites):
        untrained = exam.examine()
        damage = untrained[1] - intact
        starts = [(start or {}).get(site) for site in sites]
        parts = [
            Part(anatomy, t, matrices[t.site], s, rank, scale, seed)
            for t, s, scale in zip(targets, starts, scales, strict=True)
        ]
        run = Run(
            parts,
            config,
            key_of(injury, targets, (fit, choose), start, [asdict(config), rank, seed]),
            checkpoint,
        )
        while True:
            for part in parts:
                part.write_()
            if run.due:
                loss, nll = exam.examine() if run.step or start else untrained
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
    return torch.cat(
        [torch.randperm(windows, generator=generator) for _ in range(-(-n // windows))]
    )[:n].tolist()


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


@dataclass(frozen=True)
class _Prediction:
    """What the intact model predicts on one window.

    Shapes: p (pos, d_vocab), or (pos, k + 1) of the k tokens `kept` and all others.
    """

    p: Tensor
    kept: Tensor | None
    entropy: Tensor

    def divergence(self, logits: Float[Tensor, "pos d_vocab"]) -> Tensor:
        """Mean KL to the softmax of `logits`, as cross-entropy less entropy: in less than half the
        time of the plain formula.
        """
        return (
            F.cross_entropy(
                logits if self.kept is None else _coarse(logits, self.kept.long()), self.p
            )
            - self.entropy
        )


class _Lesson:
    """Windows, what the intact model predicts on them, and what enters the lowest target layer,
    each computed once.

    Built in the intact model. Kept are the probabilities of all tokens or, if the cache would not
    hold them, those of the likeliest tokens and of all others together.
    """

    @torch.no_grad()
    def __init__(
        self,
        anatomy: Anatomy,
        windows: Int64[Tensor, "n window"],
        used: Sequence[int],
        start: int,
        config: DistilConfig,
    ) -> None:
        self.anatomy, self.windows, self.start = anatomy, windows, start
        room, length = config.cache_mb * 2**20, windows.shape[1]
        self.keeps_entries = start > 0 and len(used) * length * anatomy.d_model * 4 <= room
        self.entries: dict[int, LayerInput] = {}
        self.predictions: dict[int, _Prediction] = {}
        if config.loss == "ce":
            return
        positions = len(used) * (length - 1)
        for some in torch.split(torch.tensor(used), max(1, TOKENS_AT_ONCE // length)):
            for index, logits in zip(
                some.tolist(), logits_of(anatomy.model, windows[some]), strict=True
            ):
                log_p, kept = F.log_softmax(logits[:-1].float(), -1), None
                if positions * log_p.shape[-1] * 4 > room:
                    k = min(room // (positions * 8), log_p.shape[-1] - 1, LIKELIEST)
                    if k < 1:
                        raise BadInput(
                            f"a cache of {config.cache_mb} MiB does not hold one prediction for"
                            f" each of {positions} tokens; raise it."
                        )
                    kept = log_p.topk(k).indices
                    log_p = _coarse(log_p, kept)
                p = log_p.exp()
                self.predictions[index] = _Prediction(
                    p, None if kept is None else kept.int(), F.cross_entropy(log_p, p)
                )

    def logits(self, drawn: Sequence[int]) -> Float[Tensor, "batch pos d_vocab"]:
        """Of the model as it stands; it must not differ below the lowest target layer from one call
        to the next.
        """
        model, layers, ids = self.anatomy.model, self.anatomy.layers, self.windows[list(drawn)]
        if not self.keeps_entries:
            return logits_of(model, ids)
        for index in drawn:
            if index not in self.entries:
                one = self.windows[index : index + 1].to(next(model.parameters()).device)
                with torch.no_grad():
                    self.entries[index] = capture(model, layers, self.start, input_ids=one)
        entries = [self.entries[index] for index in drawn]
        with resume(
            layers,
            LayerInput(self.start, torch.cat([e.states for e in entries]), entries[0].as_tuple),
        ):
            return logits_of(model, ids)

    def nll(self, logits: Float[Tensor, "batch pos d_vocab"], drawn: Sequence[int]) -> Tensor:
        # window by window, here and in `loss`: all at once, the logits would be copied without
        # their last position
        ids = self.windows[list(drawn), 1:].to(logits.device)
        return torch.stack(
            [F.cross_entropy(one[:-1].float(), to) for one, to in zip(logits, ids, strict=True)]
        ).mean()

    def loss(self, logits: Float[Tensor, "batch pos d_vocab"], drawn: Sequence[int]) -> Tensor:
        """Mean over predicted tokens of KL(intact || repaired), or of the NLL; where only the
        likeliest tokens are kept, of the KL between the distributions over them and "any other",
        which is less than the whole."""
        if not self.predictions:
            return self.nll(logits, drawn)
        return torch.stack(
            [
                self.predictions[index].divergence(one[:-1].float())
                for index, one in zip(drawn, logits, strict=True)
            ]
        ).mean()

    @torch.no_grad()
    def examine(self) -> tuple[float, float]:
        """Loss and NLL over all windows."""
        sums = torch.zeros(2, dtype=torch.float64)
        for drawn in torch.split(
            torch.arange(len(self.windows)), max(1, TOKENS_AT_ONCE // self.windows.shape[1])
        ):
            some = drawn.tolist()
            logits = self.logits(some)
            sums += (
                len(some)
                * torch.stack([self.loss(logits, some), self.nll(logits, some)]).double().cpu()
            )
        loss, nll = (sums / len(self.windows)).tolist()
        return loss, nll


def _coarse(
    logits: Float[Tensor, "pos d_vocab"], kept: Int64[Tensor, "pos k"]
) -> Float[Tensor, "pos k1"]:
    """Logits (or log-probabilities) of the kept tokens and of all others as one."""
    rest = logits.scatter(-1, kept, float("-inf")).logsumexp(-1, keepdim=True)
    return torch.cat([logits.gather(-1, kept), rest], -1)
