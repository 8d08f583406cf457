"""The value of an edit: what has to be added to a residual write at the subject's last token so
that the model says the target.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..anatomy import Anatomy
from ..errors import BadInput
from ..subject import SubjectPrompt, locate, target_ids
from ..tap import LayerInput, Tap, by_position, capture, resume
from .keys import PromptBatch, dense_down

Progress = Callable[[str, int, int], None]
TOKENS = 6144  # of all rows that are optimised together
ESSENCE = "{} is a"


@dataclass(frozen=True)
class ValueConfig:
    """Settings of the value's optimisation.

    Source: Meng et al. 2022, arXiv:2202.05262, eq. 4; the scales are relative to the model's.
    """

    steps: int = field(default=100, metadata={"help": "most steps"})
    lr: float = field(
        default=0.2,
        metadata={
            "help": "learning rate, as a share of the RMS entry of the residual stream there"
        },
    )
    kl: float = field(
        default=0.0625, metadata={"help": "weight of the KL that keeps what the subject is"}
    )
    weight_decay: float = field(
        default=0.01,
        metadata={"help": "weight of the squared norm, relative to the residual stream's"},
    )
    clamp: float = field(
        default=4.0, metadata={"help": "largest norm, relative to the residual stream's"}
    )
    stop: float = field(
        default=0.98,
        metadata={
            "help": (
                "end when the target has this probability after every context; 0: when it is the"
                " argmax"
            )
        },
    )

    def __post_init__(self) -> None:
        if (
            self.steps < 1
            or self.lr <= 0
            or self.clamp <= 0
            or not 0 <= self.stop < 1
            or min(self.kl, self.weight_decay) < 0
        ):
            raise BadInput(
                "the value needs at least 1 step, a learning rate and a clamp above 0, weights of"
                " at least 0, and a stop in 0..1."
            )


@dataclass(frozen=True, eq=False)
class Request:
    """A prompt after each context, and the ids of the target after each.

    The first context is none: the bare prompt.
    """

    prompts: Sequence[SubjectPrompt]
    targets: Sequence[Sequence[int]]
    essence: SubjectPrompt

    @classmethod
    def of(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        template: str,
        subject: str,
        target: str,
        prefixes: Sequence[str],
        bos: str = "auto",
    ) -> Request:
        """Raises: BadInput as `locate` and `target_ids`."""
        prompts = [locate(tokenizer, template, subject, bos, prefix) for prefix in prefixes]
        targets = [target_ids(tokenizer, prompt.text, target) for prompt in prompts]
        return cls(prompts, targets, locate(tokenizer, ESSENCE, subject, bos))

    @property
    def bare(self) -> SubjectPrompt:
        return self.prompts[0]


@dataclass(frozen=True, eq=False)
class Values:
    """Shapes: delta (n, d_model), to be added to the write; norm (n,) of the residual stream behind
    the layer; probability (n,) of the target's tokens, geometric mean, least over the contexts;
    steps (n,) taken."""

    delta: Float[Tensor, "n d_model"]
    norm: Float[Tensor, " n"]
    probability: Float[Tensor, " n"]
    steps: Int64[Tensor, " n"]


def optimise(
    anatomy: Anatomy,
    requests: Sequence[Request],
    layer: int,
    config: ValueConfig = ValueConfig(),
    where: str = "mlp",
    progress: Progress | None = None,
) -> Values:
    """The least addition to the write of `layer` with which the model says each target; all
    requests together, each by itself.

    where: "mlp", the output of `mlp.down`, or "state", the output of the whole layer. The layers
    below are run once. Float32 additions to a frozen model of any dtype. Raises: BadInput as
    `dense_down`.
    """
    module = anatomy.module(dense_down(anatomy, layer)) if where == "mlp" else anatomy.layers[layer]
    found: list[_Group] = []
    groups = _grouped(requests)
    with frozen(anatomy.model):
        for done, group in enumerate(groups):
            one = _Group(anatomy, group, layer, module, config)
            one.run(progress, f"value {done + 1}/{len(groups)}" if len(groups) > 1 else "value")
            found.append(one)
    return Values(
        *(
            torch.cat([getattr(g, name) for g in found])
            for name in ("best", "norm", "probability", "steps")
        )
    )


class _Group:
    """Requests that are optimised in one batch: a row for each context of each, and one that tells
    what the subject is.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        requests: Sequence[Request],
        layer: int,
        module: nn.Module,
        config: ValueConfig,
    ) -> None:
        self.anatomy, self.module, self.config, self.n = anatomy, module, config, len(requests)
        self.layer = anatomy.layers[layer]
        prompts, tails, self.targets = [], [], []
        owner, self.essence = [], []
        for i, request in enumerate(requests):
            for prompt, target in zip(request.prompts, request.targets, strict=True):
                prompts.append(prompt)
                tails.append(target[:-1])
                self.targets.append(torch.tensor(target))
                owner.append(i)
                self.essence.append(False)
            prompts.append(request.essence)
            tails.append(())
            self.targets.append(torch.tensor([0]))
            owner.append(i)
            self.essence.append(True)
        self.device = next(anatomy.model.parameters()).device
        self.batch = PromptBatch.of(prompts, tails)
        self.owner, self.is_essence = torch.tensor(owner), torch.tensor(self.essence)
        widest = max(map(len, self.targets))
        # where the target's tokens are predicted, padded by the last of them; `real` tells which
        # are not padding
        self.labels = torch.stack([F.pad(t, (0, widest - len(t))) for t in self.targets])
        self.real = torch.stack([torch.arange(widest) < len(t) for t in self.targets])
        first = self.batch.length - torch.tensor([len(t) for t in self.targets])
        self.at = (first[:, None] + torch.arange(widest)).clamp(max=self.batch.ids.shape[1] - 1)
        self.entry = (
            capture(anatomy.model, anatomy.layers, layer, input_ids=self.batch.ids.to(self.device))
            if layer > 0
            else None
        )
        self.best = torch.zeros(self.n, anatomy.d_model)
        self.norm = torch.zeros(self.n)
        self.probability = torch.zeros(self.n)
        self.steps = torch.zeros(self.n, dtype=torch.long)

    def run(self, progress: Progress | None, what: str) -> None:
        config = self.config
        with torch.no_grad():
            everything = torch.arange(len(self.batch))
            base, state = self._forward(everything, torch.zeros(self.n, self.anatomy.d_model))
            base = base[:, 0]
        bare = torch.tensor([int((self.owner == i).nonzero()[0]) for i in range(self.n)])
        self.norm = state[bare].norm(dim=1)
        delta = torch.zeros(self.n, self.anatomy.d_model, requires_grad=True)
        size = self.norm[:, None] / self.anatomy.d_model**0.5
        moment, square = torch.zeros_like(delta), torch.zeros_like(delta)
        active = torch.ones(self.n, dtype=torch.bool)
        for step in range(1, config.steps + 2):
            rows = active[self.owner].nonzero().flatten()
            log_p, _ = self._forward(rows, delta)
            loss, likely, said = self._loss(rows, log_p, base[rows], delta)
            with torch.no_grad():
                met = said if config.stop == 0 else likely >= config.stop
                self.best[active], self.probability[active] = delta.detach()[active], likely[active]
                self.steps[active] = step - 1
                active = active & ~met
            if progress:
                progress(what, step - 1, config.steps)
            if not active.any() or step > config.steps:
                break
            (gradient,) = torch.autograd.grad(loss, delta)
            with torch.no_grad():
                # Adam, written out so that a request that is done stays where it is
                moment.lerp_(gradient, 0.1)
                square.lerp_(gradient**2, 0.001)
                stride = (moment / (1 - 0.9**step)) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
                delta -= config.lr * size * stride * active[:, None]
                long = config.clamp * self.norm / delta.norm(dim=1).clamp_min(1e-12)
                delta *= long.clamp(max=1)[:, None]

    def _forward(self, rows: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities (rows, target, d_vocab) where targets are predicted; the residual
        stream (rows, d_model) behind the layer.
        """
        batch, at, owner = self.batch.rows(rows), self.at[rows], self.owner[rows]
        index = torch.arange(len(rows))
        states: list[Tensor] = []

        def add(y: Tensor) -> Tensor:
            states = by_position(y, len(index))
            return states.index_put(
                (index.to(y.device), batch.last.to(y.device)), delta[owner].to(y), accumulate=True
            ).view_as(y)

        def see(y: Tensor) -> None:
            states.append(y[index.to(y.device), batch.last.to(y.device)].detach().float().cpu())

        def gather(x: Tensor) -> Tensor:
            return x[index.to(x.device)[:, None], at.to(x.device)]

        with Tap() as tap:
            tap.on_output(self.module, add)
            tap.on_output(self.layer, see)
            head = self.anatomy.model.get_output_embeddings()  # type: ignore[operator]
            tap.on_input(head, gather)  # the vocabulary is large, and few positions are needed
            ids = batch.ids.to(self.device)
            if self.entry is None:
                logits = tap.run(self.anatomy.model, input_ids=ids, use_cache=False).logits
            else:
                entry = LayerInput(
                    self.entry.start, self.entry.states[rows.to(self.device)], self.entry.as_tuple
                )
                with resume(self.anatomy.layers, entry):
                    logits = tap.run(self.anatomy.model, input_ids=ids, use_cache=False).logits
        return F.log_softmax(logits.float().cpu(), -1), states[0]

    def _loss(
        self, rows: Tensor, log_p: Tensor, base: Tensor, delta: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The sum of the losses; the least probability over the contexts (n,); whether the target
        is the argmax after all of them (n,).
        """
        labels, real, owner, essence = (
            self.labels[rows],
            self.real[rows],
            self.owner[rows],
            self.is_essence[rows],
        )
        nll = -(log_p.gather(-1, labels[..., None])[..., 0] * real).sum(1) / real.sum(1)
        kl = (base.exp() * (base - log_p[:, 0])).sum(-1)
        contexts = torch.bincount(owner[~essence], minlength=self.n).clamp_min(1)
        per_row = torch.where(essence, self.config.kl * kl, nll / contexts[owner])
        penalty = self.config.weight_decay * (delta.norm(dim=1) / self.norm.clamp_min(1e-12)).pow(2)
        loss = per_row.sum() + penalty[torch.bincount(owner, minlength=self.n) > 0].sum()
        with torch.no_grad():
            likely = torch.ones(self.n).scatter_reduce(
                0, owner[~essence], (-nll[~essence]).exp(), "amin"
            )
            right = ((log_p.argmax(-1) == labels) | ~real).all(1)
            said = (
                torch.ones(self.n).scatter_reduce(
                    0, owner[~essence], right[~essence].float(), "amin"
                )
                > 0
            )
        return loss, likely, said


def _grouped(requests: Sequence[Request]) -> list[list[Request]]:
    """Requests in their order, as many together as TOKENS allow."""
    groups: list[list[Request]] = [[]]
    used = 0
    for request in requests:
        tokens = sum(
            len(p.ids) + len(t) for p, t in zip(request.prompts, request.targets, strict=True)
        ) + len(request.essence.ids)
        if groups[-1] and used + tokens > TOKENS:
            groups.append([])
            used = 0
        groups[-1].append(request)
        used += tokens
    return groups


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No gradient for any weight within the block."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.requires_grad_(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        for p in trained:
            p.requires_grad_(True)
