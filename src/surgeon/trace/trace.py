"""Causal tracing: corrupt the subject, put one clean state back, and see how much of the answer returns.

Source: Meng et al. 2022, arXiv:2202.05262, section 2. Sites of a layer and all noise samples go through the model as one batch, and each
batch begins at the restored layer: what lies below was computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..anatomy import Anatomy, Site
from ..errors import BadInput
from ..measure import interval, require_causal
from ..subject import SLOT, SubjectPrompt, locate, target_ids
from ..tap import LayerInput, Tap, capture, resume

Progress = Callable[[str, int, int], None]
KINDS = ("state", "mlp", "attn")
METRICS = ("probability", "logit")
TOKENS = 8192  # in one pass


@dataclass(frozen=True)
class TraceConfig:
    """Settings of a trace."""

    noise: float = field(default=3.0, metadata={"help": "noise on the subject's embeddings, in standard deviations of these embeddings"})
    replace: str | None = field(default=None, metadata={"help": "put these words in the subject's place instead of noise"})
    samples: int = field(default=10, metadata={"help": "draws of the noise"})
    window: int = field(default=10, metadata={"help": "layers whose MLP or attention is restored together, centred at a layer"})
    kinds: tuple[str, ...] = field(default=KINDS, metadata={"help": "what is restored: state, mlp, attn"})
    sever: str | None = field(default=None, metadata={"help": "mlp or attn: keep these corrupted above a restored state, at its token"})
    metric: str = field(default="probability", metadata={"help": "probability of the answer, or logit: its lead over another answer"})
    seed: int = field(default=0, metadata={"help": "seed of the noise"})

    def __post_init__(self) -> None:
        if self.samples < 1 or self.window < 1 or self.noise <= 0:
            raise BadInput("a trace needs at least 1 sample, a window of at least 1 layer, and noise above 0.")
        unknown = [k for k in self.kinds if k not in KINDS]
        if unknown or not self.kinds:
            raise BadInput(f"{', '.join(unknown) or 'nothing'} cannot be restored; use {', '.join(KINDS)}.")
        if self.sever not in (None, "mlp", "attn") or self.metric not in METRICS:
            raise BadInput(f"--sever can be mlp or attn, and --metric {' or '.join(METRICS)}.")


@dataclass(frozen=True, eq=False)
class Trace:
    """Shapes: effects[kind] (layer, pos, sample), the metric with that site restored; clean, a number; corrupt (sample,).

    sigma: of the noise, absolute; 0 for a replacement.
    """

    prompt: SubjectPrompt
    answer: str
    versus: str | None
    clean: float
    corrupt: Float[Tensor, " sample"]
    effects: dict[str, Float[Tensor, "layer pos sample"]]
    sigma: float
    config: TraceConfig

    def mean(self, kind: str) -> Float[Tensor, "layer pos"]:
        return self.effects[kind].mean(-1)

    def best(self, kind: str) -> tuple[int, int, float]:
        """Layer, position and mean of the site that brings most back."""
        mean = self.mean(kind)
        at = int(mean.argmax())
        layer, position = divmod(at, mean.shape[1])
        return layer, position, float(mean[layer, position])

    def to_json(self) -> dict[str, Any]:
        several = len(self.corrupt) > 1
        ci = {}
        if several:
            for kind, values in self.effects.items():
                ci[kind] = [[list(interval(cell.double(), self.config.seed)) for cell in row] for row in values]
        return {
            "prompt": self.prompt.text,
            "tokens": list(self.prompt.tokens),
            "subject_range": [self.prompt.start, self.prompt.stop],
            "answer": self.answer,
            "versus": self.versus,
            "metric": self.config.metric,
            "p_clean": self.clean,
            "p_corrupt": float(self.corrupt.mean()),
            "p_corrupt_ci95": list(interval(self.corrupt.double(), self.config.seed)) if several else None,
            **{kind: self.mean(kind).tolist() for kind in self.effects},
            "ci95": ci,
            "noise": {"kind": "replace" if self.config.replace else "gaussian", "sigma": self.sigma, "samples": len(self.corrupt)},
            "window": self.config.window,
            "sever": self.config.sever,
            "warnings": list(self.prompt.warnings),
        }


def trace(
    anatomy: Anatomy,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    subject: str,
    config: TraceConfig = TraceConfig(),
    answer: str | None = None,
    versus: str | None = None,
    bos: str = "auto",
    sigma: float | None = None,
    progress: Progress | None = None,
) -> Trace:
    """Trace one fact. answer: default what the model says. versus: for the logit metric, default what the corrupted model says.

    sigma: standard deviation of the noise; default config.noise times that of the subject's own embeddings.
    Raises: BadInput for a subject that is not there, a replacement of another length, or an architecture without such a module.
    """
    require_causal(anatomy.model)
    located = locate(tokenizer, prompt, subject, bos)
    _require_within(anatomy, located)
    return _Tracer(anatomy, tokenizer, located, config, answer, versus, bos, sigma).run(progress)


def subject_sigma(anatomy: Anatomy, located: Sequence[SubjectPrompt]) -> float:
    """Standard deviation of the entries of the embeddings of these subjects' tokens."""
    embed = anatomy.model.get_input_embeddings()  # type: ignore[operator]
    ids = torch.tensor([i for p in located for i in p.ids[p.start : p.stop]], device=embed.weight.device)
    with torch.no_grad():
        return float(embed(ids).float().std())


class _Tracer:
    """One prompt: its clean run, its corrupted runs, and the runs with something put back."""

    def __init__(
        self, anatomy: Anatomy, tokenizer: PreTrainedTokenizerBase, prompt: SubjectPrompt, config: TraceConfig, answer: str | None,
        versus: str | None, bos: str, sigma: float | None,
    ) -> None:  # fmt: skip
        self.anatomy, self.tokenizer, self.prompt, self.config = anatomy, tokenizer, prompt, config
        self.layers = anatomy.layers
        self.modules = {k: [_module(anatomy, i, k) for i in range(len(self.layers))] for k in ("mlp", "attn") if self._needs(k)}
        self.device = next(anatomy.model.parameters()).device
        self.embed: nn.Module = anatomy.model.get_input_embeddings()  # type: ignore[operator]
        self.ids = torch.tensor([list(prompt.ids)], device=self.device)
        self.answer = None if answer is None else target_ids(tokenizer, prompt.text, answer)[0]
        self.versus = None if versus is None else target_ids(tokenizer, prompt.text, versus)[0]
        self.sigma = 0.0 if config.replace else (config.noise * subject_sigma(anatomy, [prompt]) if sigma is None else sigma)
        several = len(self.layers) > 1  # a resumed pass hands states on as the layers of this model do
        self.as_tuple = capture(anatomy.model, self.layers, 1, input_ids=self.ids).as_tuple if several else False
        self.clean: dict[str, list[Tensor]] = {}
        self.corrupt: dict[str, list[Tensor]] = {}

    def _needs(self, kind: str) -> bool:
        return kind in self.config.kinds or self.config.sever == kind

    @torch.no_grad()
    def run(self, progress: Progress | None) -> Trace:
        config, n = self.config, self.ids.shape[1]
        logits, self.clean = self._recorded(self.embed(self.ids))
        if self.answer is None:
            self.answer = int(logits[0].argmax())
        logits_corrupt, self.corrupt = self._recorded(self._corrupted())
        if config.metric == "logit" and self.versus is None:
            others = logits_corrupt.mean(0)
            others[self.answer] = -torch.inf
            self.versus = int(others.argmax())
        corrupt = self._metric(logits_corrupt)
        samples = len(corrupt)
        effects = {}
        for kind in config.kinds:
            rows = []
            for layer in range(len(self.layers)):
                rows.append(self._restored(kind, layer, n, samples))
                if progress:
                    progress(f"restoring {kind}", layer + 1, len(self.layers))
            effects[kind] = torch.stack(rows)
        said = [None if i is None else str(self.tokenizer.decode([i])) for i in (self.answer, self.versus)]
        return Trace(self.prompt, str(said[0]), said[1], float(self._metric(logits)), corrupt, effects, self.sigma, config)

    def _corrupted(self) -> Tensor:
        """Embeddings (sample, pos, d_model) of the corrupted prompt."""
        config, prompt = self.config, self.prompt
        span = slice(prompt.start, prompt.stop)
        clean = self.embed(self.ids)
        if config.replace is not None:
            begin = prompt.text.index(prompt.subject)
            template = prompt.text[:begin] + SLOT + prompt.text[begin + len(prompt.subject) :]
            other = locate(self.tokenizer, template, config.replace, "yes" if prompt.bos else "no")
            if (len(other.ids), other.start, other.stop) != (len(prompt.ids), prompt.start, prompt.stop):
                raise BadInput(
                    f"{config.replace!r} has {other.stop - other.start} tokens there and the subject {prompt.subject!r} has "
                    f"{prompt.stop - prompt.start}; replace it with words of as many tokens."
                )
            replaced: Tensor = self.embed(torch.tensor([other.ids], device=self.device))
            return replaced
        generator = torch.Generator().manual_seed(config.seed)
        noise = self.sigma * torch.randn(config.samples, prompt.stop - prompt.start, clean.shape[2], generator=generator)
        embedded = clean.repeat(config.samples, 1, 1)
        embedded[:, span] += noise.to(embedded)
        noisy: Tensor = embedded
        return noisy

    def _recorded(self, embedded: Tensor) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """Last logits (batch, d_vocab), and what every layer, MLP and attention put out (batch, pos, d_model)."""
        found: dict[str, list[Tensor]] = {kind: [] for kind in ("state", *self.modules)}
        found["embed"] = [embedded]
        with Tap() as tap:
            tap.on_output(self.embed, lambda _: embedded)
            for i, layer in enumerate(self.layers):
                for kind, modules in self.modules.items():
                    tap.on_output(modules[i], partial(_append, found[kind]))
                tap.on_output(layer, partial(_append, found["state"]))
            return self._last_logits(tap, len(embedded)), found

    def _last_logits(self, tap: Tap, batch: int) -> Tensor:
        head = self.anatomy.model.get_output_embeddings()  # type: ignore[operator]
        tap.on_input(head, lambda x: x[:, -1:])  # only the last position is asked
        output = tap.run(self.anatomy.model, input_ids=self.ids.expand(batch, -1), use_cache=False)
        logits: Tensor = output.logits[:, -1].float().cpu()
        return logits

    def _metric(self, logits: Tensor) -> Float[Tensor, " batch"]:
        assert self.answer is not None
        if self.config.metric == "probability":
            return logits.softmax(-1)[:, self.answer]
        assert self.versus is not None
        return logits[:, self.answer] - logits[:, self.versus]

    def _restored(self, kind: str, layer: int, n: int, samples: int) -> Float[Tensor, "pos sample"]:
        """The metric with the site of each position restored in turn."""
        per_pass = max(1, TOKENS // (n * samples))
        parts = [self._pass(kind, layer, p, samples) for p in torch.arange(n).tensor_split(max(1, -(-n // per_pass)))]
        return torch.cat(parts)

    def _pass(self, kind: str, layer: int, positions: Tensor, samples: int) -> Tensor:
        rows = torch.arange(len(positions) * samples, device=self.device)
        at = positions.repeat_interleave(samples).to(self.device)  # row by row: position, then sample
        sample = rows % samples

        def put(y: Tensor, source: Tensor, of_sample: bool) -> Tensor:
            y = y.clone()
            y[rows, at] = source[sample, at] if of_sample else source[0, at]
            return y

        last = len(self.layers) - 1
        # a window of even width reaches one layer further down than up, as in the published code
        first, until = max(0, layer - self.config.window // 2), min(last, layer + (self.config.window - 1) // 2)
        begin = min(layer + 1, last) if kind == "state" else first
        with Tap() as tap:
            if kind != "state":
                for i in range(first, until + 1):
                    tap.on_output(self.modules[kind][i], partial(put, source=self.clean[kind][i], of_sample=False))
            elif layer == last:
                tap.on_output(self.layers[last], partial(put, source=self.clean["state"][last], of_sample=False))
            if kind == "state" and self.config.sever is not None:
                for i in range(layer + 1, last + 1):
                    source = self.corrupt[self.config.sever][i]
                    tap.on_output(self.modules[self.config.sever][i], partial(put, source=source, of_sample=True))
            entering = (self.corrupt["embed"][0] if begin == 0 else self.corrupt["state"][begin - 1])[sample]
            if kind == "state" and layer < last:
                entering = put(entering, self.clean["state"][layer], False)
            if begin == 0:
                tap.on_output(self.embed, lambda _: entering)
                logits = self._last_logits(tap, len(rows))
            else:
                with resume(self.layers, LayerInput(begin, entering, self.as_tuple)):
                    logits = self._last_logits(tap, len(rows))
        return self._metric(logits).view(len(positions), samples)


def _append(found: list[Tensor], y: Tensor) -> None:
    found.append(y.detach())


def _require_within(anatomy: Anatomy, prompt: SubjectPrompt) -> None:
    longest = getattr(anatomy.config, "max_position_embeddings", None)
    if longest is not None and len(prompt.ids) > longest:
        raise BadInput(f"the prompt has {len(prompt.ids)} tokens, and the model reads {longest}; give a shorter one.")


def _module(anatomy: Anatomy, layer: int, kind: str) -> nn.Module:
    """What writes into the residual stream: the projection itself, or for experts the block that sums them up."""
    role = {"mlp": "mlp.down", "attn": "attn.out"}[kind]
    sites = [s for s in anatomy.addresses if s.layer == layer and s.role == role]
    if not sites:
        raise BadInput(f"layer {layer} of this model has no {role}, so its {kind} output cannot be restored; leave out {kind}.")
    dense = [s for s in sites if s.expert is None]
    if dense:
        return anatomy.module(dense[0])
    return _block(anatomy, layer, sites[0])


def _block(anatomy: Anatomy, layer: int, site: Site) -> nn.Module:
    prefix = f"{anatomy.layers_path}.{layer}."
    name = anatomy.addresses[site].module.removeprefix(prefix).partition(".")[0]
    return anatomy.model.get_submodule(prefix + name)
