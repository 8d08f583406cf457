"""The value of an edit: what has to be added to a residual write at the subject's last token so
that the model says the target.

How this works. A request is asked after several contexts, the first of which is none; one more
prompt, "{} is a", tells what the subject is, and should go on as before. All of them, of as many
requests as fit, are the rows of one batch. What lies below the layer is run once, and every step
goes on from there: it adds each request's delta to what the layer writes at the subject's last
token, and reads the log-probabilities at the positions that predict the target. Each request
minimises, by Adam,

    mean over contexts of -log P(target) + kl KL(before || after) + weight_decay |delta|^2 / |h|^2

where the KL is that of "{} is a" and h the residual stream behind the layer; after each step delta
is cut to `clamp` |h|. A request whose target is likely enough after every context takes no further
step, so no request depends on those beside it.
Source: Meng et al. 2022, arXiv:2202.05262, eq. 4.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
import transformers
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from ..anatomy import Anatomy
from ..progress import Tell, silent
from ..settings import setting
from ..subject import SubjectPrompt, locate, target_ids
from ..tap import LayerInput, Tap, by_position, capture, resume
from .adam import Adam
from .keys import PromptBatch, dense_down

TOKENS = 6144  # of all rows that are optimised together
ESSENCE = "{} is a"
# where a value is left to the method: facts that share a matrix pay for each other's norm, so
# theirs stop earlier (measured in docs/editing.md)
ALONE, TOGETHER = {"lr": 0.2, "stop": 0.98}, {"lr": 0.1, "stop": 0.9}


@dataclass(frozen=True)
class ValueConfig:
    """Settings of the value's optimisation; the scales are relative to the model's."""

    steps: int = setting(100, "most steps", low=1, group="Value")
    lr: float | None = setting(
        None,
        "learning rate, as a share of the RMS entry of the residual stream there; not given: 0.2,"
        " or 0.1 where facts are written together",
        above=0,
        group="Value",
    )
    kl: float = setting(
        0.0625, "weight of the KL that keeps what the subject is", low=0, group="Value"
    )
    weight_decay: float = setting(
        0.01,
        "weight of the squared norm, relative to the residual stream's",
        low=0,
        group="Value",
    )
    clamp: float = setting(
        4.0, "largest norm, relative to the residual stream's", above=0, group="Value"
    )
    stop: float | None = setting(
        None,
        "end when the target has this probability after every context, at 0 when it is the argmax;"
        " not given: 0.98, or 0.9 where facts are written together",
        low=0,
        below=1,
        group="Value",
    )

    def settled(self, together: bool = False) -> ValueConfig:
        """The same with what was left to the method; together: several facts at once."""
        usual = TOGETHER if together else ALONE
        lr = usual["lr"] if self.lr is None else self.lr
        return replace(self, lr=lr, stop=usual["stop"] if self.stop is None else self.stop)


@dataclass(frozen=True, eq=False)
class Request:
    """A prompt after each context, and the ids of the target after each.

    The first context is none: the bare prompt. essence: the prompt that tells what the subject is.
    """

    prompts: Sequence[SubjectPrompt]
    targets: Sequence[Sequence[int]]
    essence: SubjectPrompt

    @classmethod
    def of(
        cls,
        tokenizer: transformers.PreTrainedTokenizerBase,
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
    progress: Tell = silent,
) -> Values:
    """The least addition to the write of `layer` with which the model says each target; all
    requests together, each by itself.

    where: "mlp", the output of `mlp.down`, or "state", the output of the whole layer. Float32
    additions to a frozen model of any dtype. Raises: BadInput as `dense_down`.
    """
    module = anatomy.module(dense_down(anatomy, layer)) if where == "mlp" else anatomy.layers[layer]
    groups = _grouped(requests)
    of_groups = []
    with frozen(anatomy.model):
        for number, group in enumerate(groups, 1):
            name = f"value {number}/{len(groups)}" if len(groups) > 1 else "value"
            optimisation = _Optimisation(anatomy, group, layer, module, config.settled())
            of_groups.append(optimisation.run(progress, name))
    return Values(
        *(
            torch.cat([getattr(one, name) for one in of_groups])
            for name in ("delta", "norm", "probability", "steps")
        )
    )


@dataclass(frozen=True, eq=False)
class _Rows:
    """The prompts of some requests as rows of one batch, the targets behind them.

    Shapes: owner (row,), the request that a row belongs to; essence (row,), whether it tells what
    the subject is; labels (row, token), the target's ids, padded; real (row, token), which of them
    are no padding; at (row, token), the positions that predict them.
    """

    batch: PromptBatch
    owner: Int64[Tensor, " row"]
    essence: Bool[Tensor, " row"]
    labels: Int64[Tensor, "row token"]
    real: Bool[Tensor, "row token"]
    at: Int64[Tensor, "row token"]

    @classmethod
    def of(cls, requests: Sequence[Request]) -> _Rows:
        prompts: list[SubjectPrompt] = []
        targets: list[Sequence[int]] = []
        owner: list[int] = []
        essence: list[bool] = []
        for number, request in enumerate(requests):
            prompts += [*request.prompts, request.essence]
            targets += [*request.targets, [0]]  # what follows the essence is compared as a whole
            owner += [number] * (len(request.prompts) + 1)
            essence += [False] * len(request.prompts) + [True]
        # the target's last token predicts nothing that is asked for
        batch = PromptBatch.of(prompts, [target[:-1] for target in targets])
        lengths = torch.tensor([len(target) for target in targets])
        token = torch.arange(int(lengths.max()))
        labels = torch.tensor([[*t, *[0] * (len(token) - len(t))] for t in targets])
        first = batch.length - lengths
        at = (first[:, None] + token).clamp(max=batch.ids.shape[1] - 1)
        real = token < lengths[:, None]
        return cls(batch, torch.tensor(owner), torch.tensor(essence), labels, real, at)

    def __len__(self) -> int:
        return len(self.owner)

    def chosen(self, rows: Int64[Tensor, " some"]) -> _Rows:
        return _Rows(
            self.batch.rows(rows),
            self.owner[rows],
            self.essence[rows],
            self.labels[rows],
            self.real[rows],
            self.at[rows],
        )


@dataclass(frozen=True, eq=False)
class _Asked:
    """The requests in one state. loss: the sum of theirs. Shapes: likely (n,), the target's least
    probability over the contexts; says (n,), whether it is the argmax after all of them.
    """

    loss: Float[Tensor, ""]
    likely: Float[Tensor, " n"]
    says: Bool[Tensor, " n"]


class _Optimisation:
    """Requests that are optimised in one batch."""

    def __init__(
        self,
        anatomy: Anatomy,
        requests: Sequence[Request],
        layer: int,
        module: nn.Module,
        config: ValueConfig,
    ) -> None:
        assert config.lr is not None  # a settled configuration has both
        assert config.stop is not None
        self.lr, self.stop = config.lr, config.stop
        self.anatomy, self.module, self.config, self.n = anatomy, module, config, len(requests)
        self.layer = anatomy.layers[layer]
        self.rows = _Rows.of(requests)
        self.device = next(anatomy.model.parameters()).device
        self.entry: LayerInput | None = None
        if layer > 0:
            ids = self.rows.batch.ids.to(self.device)
            self.entry = capture(anatomy.model, anatomy.layers, layer, input_ids=ids)
        with torch.no_grad():
            every, nothing = torch.arange(len(self.rows)), torch.zeros(self.n, anatomy.d_model)
            log_p, states = self._forward(every, nothing)
        self.before = log_p[:, 0]  # (row, d_vocab): what follows each row in the model as it is
        bare = [int((self.rows.owner == number).nonzero()[0]) for number in range(self.n)]
        self.norm = states[bare].norm(dim=1)

    def run(self, progress: Tell, name: str) -> Values:
        config = self.config
        delta = torch.zeros(self.n, self.anatomy.d_model, requires_grad=True)
        final = torch.zeros(self.n, self.anatomy.d_model)  # as each request was when it was done
        probability, steps = torch.zeros(self.n), torch.zeros(self.n, dtype=torch.long)
        active = torch.ones(self.n, dtype=torch.bool)
        adam = Adam(delta, eps=1e-8)
        for step in range(config.steps + 1):  # the last look moves no more
            asked = self._ask(active, delta)
            final[active], probability[active] = delta.detach()[active], asked.likely[active]
            steps[active] = step
            done = asked.says if self.stop == 0 else asked.likely >= self.stop
            active = active & ~done
            progress(name, step, config.steps)
            if not active.any() or step == config.steps:
                break
            (gradient,) = torch.autograd.grad(asked.loss, delta)
            self._move_(delta, adam.stride(gradient), active)
        return Values(final, self.norm, probability, steps)

    @torch.no_grad()
    def _move_(self, delta: Tensor, stride: Tensor, active: Tensor) -> None:
        """One step of the active requests, and back into the ball of radius `clamp` |h|."""
        size = self.norm[:, None] / self.anatomy.d_model**0.5
        delta -= self.lr * size * stride * active[:, None]
        within = self.config.clamp * self.norm / delta.norm(dim=1).clamp_min(1e-12)
        delta *= within.clamp(max=1)[:, None]

    def _ask(self, active: Bool[Tensor, " n"], delta: Float[Tensor, "n d_model"]) -> _Asked:
        """The losses and probabilities of the active requests with their additions."""
        index = active[self.rows.owner].nonzero().flatten()
        rows = self.rows.chosen(index)
        log_p, _ = self._forward(index, delta)
        nll = -(log_p.gather(-1, rows.labels[..., None])[..., 0] * rows.real).sum(1)
        nll = nll / rows.real.sum(1)
        before = self.before[index]
        kl = (before.exp() * (before - log_p[:, 0])).sum(-1)

        asked = ~rows.essence
        contexts = torch.bincount(rows.owner[asked], minlength=self.n).clamp_min(1)
        per_row = torch.where(rows.essence, self.config.kl * kl, nll / contexts[rows.owner])
        penalty = self.config.weight_decay * (delta.norm(dim=1) / self.norm.clamp_min(1e-12)).pow(2)
        loss = per_row.sum() + penalty[active].sum()

        with torch.no_grad():
            right = ((log_p.argmax(-1) == rows.labels) | ~rows.real).all(1)
            likely = self._least(rows.owner[asked], (-nll[asked]).exp())
            says = self._least(rows.owner[asked], right[asked].float()) > 0
        return _Asked(loss, likely, says)

    def _least(self, owner: Tensor, values: Tensor) -> Float[Tensor, " n"]:
        """The least value of each request's rows; 1 where it has none."""
        return torch.ones(self.n).scatter_reduce(0, owner, values, "amin")

    def _forward(
        self, index: Int64[Tensor, " some"], delta: Float[Tensor, "n d_model"]
    ) -> tuple[Float[Tensor, "some token d_vocab"], Float[Tensor, "some d_model"]]:
        """With the additions: log-probabilities where the targets are predicted, and the residual
        stream behind the layer at the subject's last token.
        """
        rows = self.rows.chosen(index)
        row, last = torch.arange(len(rows)), rows.batch.last
        states: list[Tensor] = []

        def add(y: Tensor) -> Tensor:
            where = (row.to(y.device), last.to(y.device))
            flat = by_position(y, len(rows))  # some models (OPT) flatten batch and position
            return flat.index_put(where, delta[rows.owner].to(y), accumulate=True).view_as(y)

        def see(y: Tensor) -> None:
            states.append(y[row.to(y.device), last.to(y.device)].detach().float().cpu())

        def few(x: Tensor) -> Tensor:
            return x[row.to(x.device)[:, None], rows.at.to(x.device)]

        with Tap() as tap, self._resumed(index):
            tap.on_output(self.module, add)
            tap.on_output(self.layer, see)
            head = self.anatomy.model.get_output_embeddings()  # type: ignore[operator]
            tap.on_input(head, few)  # the vocabulary is large, and few positions are needed
            ids = rows.batch.ids.to(self.device)
            logits = tap.run(self.anatomy.model, input_ids=ids, use_cache=False).logits
        return F.log_softmax(logits.float().cpu(), -1), states[0]

    @contextmanager
    def _resumed(self, index: Tensor) -> Iterator[None]:
        """Within the block these rows begin at the layer, where anything lies below it."""
        if self.entry is None:
            yield
            return
        states = self.entry.states[index.to(self.device)]
        entry = LayerInput(self.entry.start, states, self.entry.as_tuple)
        with resume(self.anatomy.layers, entry):
            yield


def _grouped(requests: Sequence[Request]) -> list[list[Request]]:
    """Requests in their order, as many together as TOKENS allow."""
    groups: list[list[Request]] = [[]]
    used = 0
    for request in requests:
        pairs = zip(request.prompts, request.targets, strict=True)
        tokens = sum(len(p.ids) + len(t) for p, t in pairs) + len(request.essence.ids)
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
