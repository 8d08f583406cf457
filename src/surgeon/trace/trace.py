"""Causal tracing: corrupt the subject, put one clean state back, and see what answer returns.

Source: Meng et al. 2022, arXiv:2202.05262, section 2; the severed paths are those of its figure 3.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import transformers
from jaxtyping import Float
from torch import Tensor

from ..anatomy import Anatomy
from ..errors import BadInput
from ..measure import interval, require_causal
from ..progress import Tell, silent
from ..subject import SubjectPrompt, locate, target_ids
from .config import DEFAULTS, SEVERED, TraceConfig
from .corruption import Spread, corrupted
from .restore import Restorer
from .result import (
    Corruption,
    Interval,
    RestoredSite,
    TraceIntervals,
    TraceResult,
    by_kind,
)

CI = "95% percentile bootstrap of the mean over noise samples"
NO_DAMAGE = 0.9  # of the clean probability: a corruption that leaves more has hardly corrupted


@dataclass(frozen=True, eq=False)
class Trace:
    """What the answer is worth with each site restored.

    Shapes: effects[kind] (layer, pos, sample), the metric with that site restored; corrupt
    (sample,), with nothing restored.
    kinds: "state", "mlp", "attn", and "severed" if that was asked for. clean: the metric of the
    clean run. window: layers of MLP or attention restored together. sigma: of the noise, absolute,
    and `sigma_of` what it was measured on; 0 for a replacement.
    """

    prompt: SubjectPrompt
    answer: str
    versus: str | None
    clean: float
    corrupt: Float[Tensor, " sample"]
    effects: dict[str, Float[Tensor, "layer pos sample"]]
    window: int
    sigma: float
    sigma_of: str
    config: TraceConfig
    warnings: tuple[str, ...] = field(default=())

    def mean(self, kind: str) -> Float[Tensor, "layer pos"]:
        """Mean of the metric over noise samples."""
        return self.effects[kind].mean(-1)

    def ci95(self, kind: str, layer: int, position: int) -> tuple[float, float]:
        """Interval of the mean over noise samples; of one sample, that value alone."""
        return interval(self.effects[kind][layer, position].double(), self.config.seed)

    def best(self, kind: str, n: int = 1) -> list[tuple[int, int, float]]:
        """Layer, position and mean of the sites that bring most back, most first."""
        mean = self.mean(kind)
        flat = mean.flatten()
        order = flat.argsort(descending=True, stable=True)[:n].tolist()
        return [(*divmod(at, mean.shape[1]), float(flat[at])) for at in order]

    def result(self) -> TraceResult:
        """Means over the samples and their intervals."""
        several = len(self.corrupt) > 1  # one replacement has no interval
        tokens = self.prompt.tokens
        intervals = by_kind({kind: self._intervals(kind) for kind in self.effects if several})
        p_corrupt = interval(self.corrupt.double(), self.config.seed) if several else None
        return TraceResult(
            prompt=self.prompt.text,
            tokens=list(tokens),
            bos=self.prompt.bos,
            subject_range=(self.prompt.start, self.prompt.stop),
            answer=self.answer,
            versus=self.versus,
            metric=self.config.metric,
            p_clean=self.clean,
            p_corrupt=float(self.corrupt.mean()),
            **by_kind({kind: self.mean(kind).tolist() for kind in self.effects}),
            ci=TraceIntervals(CI if several else None, p_corrupt, **intervals),
            best={
                kind: [RestoredSite(i, p, tokens[p], value) for i, p, value in self.best(kind, 3)]
                for kind in self.effects
            },
            corruption=corruption_of(self.config, self.sigma, self.sigma_of, len(self.corrupt)),
            window=self.window,
            sever=self.config.sever,
            warnings=list(self.warnings),
        )

    def _intervals(self, kind: str) -> list[list[Interval]]:
        layers, positions = self.effects[kind].shape[:2]
        return [[self.ci95(kind, i, p) for p in range(positions)] for i in range(layers)]


def trace(
    anatomy: Anatomy,
    tokenizer: transformers.PreTrainedTokenizerBase,
    prompt: str,
    subject: str,
    config: TraceConfig = DEFAULTS,
    answer: str | None = None,
    versus: str | None = None,
    bos: str = "auto",
    spread: Spread | None = None,
    progress: Tell = silent,
) -> Trace:
    """Which states carry a fact: the metric with each site of the model restored.

    prompt, subject: see `surgeon.subject.locate`. answer: its first token is followed; default,
    what the model says. versus: for the logit metric; default, what the corrupted model says.
    spread: standard deviation of embeddings, which `config.noise` multiplies; default, that of all
    tokens.
    Raises: BadInput for a subject that is not there, a replacement of another length, or a layer
    without such a module.

    >>> import surgeon
    >>> patient = surgeon.load_model("patient")
    >>> settings = TraceConfig(samples=2, kinds=("state",))
    >>> prompt = "The capital of {} is"
    >>> traced = trace(Anatomy.of(patient.model), patient.tokenizer, prompt, "France", settings)
    >>> traced.answer, traced.effects["state"].shape
    (' Paris', torch.Size([2, 6, 2]))
    """
    require_causal(anatomy.model)
    if versus is not None and config.metric != "logit":
        raise BadInput(
            f"‹versus› {versus!r} is for ‹metric› logit, which compares two answers; the metric"
            f" here is {config.metric}."
        )
    located = locate(tokenizer, prompt, subject, bos)
    longest = getattr(anatomy.config, "max_position_embeddings", None)
    if longest is not None and len(located.ids) > longest:
        raise BadInput(
            f"the prompt has {len(located.ids)} tokens, and the model reads {longest};"
            " give a shorter one."
        )
    answer_id, versus_id = (
        None if words is None else target_ids(tokenizer, located.text, words)[0]
        for words in (answer, versus)
    )
    if answer_id is not None and answer_id == versus_id:
        raise BadInput(
            f"{answer!r} and {versus!r} begin with the same token, so neither leads;"
            " give ‹versus› another first word."
        )
    if config.replace is not None:
        spread = Spread(0.0, "nothing")
    elif spread is None:
        spread = Spread.of_vocabulary(anatomy)
    sigma = config.noise * spread.value

    embedded = corrupted(anatomy, tokenizer, located, prompt, config, sigma)
    run = Restorer(anatomy, located, embedded, config, answer_id, versus_id)
    kinds = [*config.kinds, *([SEVERED] if config.sever else [])]
    n_layers = len(run.layers)
    effects = {}
    for done, kind in enumerate(kinds):
        by_layer = []
        for layer in range(n_layers):
            by_layer.append(run.restored(kind, layer))
            progress("restoring", done * n_layers + layer + 1, len(kinds) * n_layers)
        effects[kind] = torch.stack(by_layer)

    said, other = (str(tokenizer.decode([i])) for i in (run.answer, run.versus))
    warnings = list(located.warnings)
    left = float(run.corrupt.mean())
    if config.metric == "probability" and left > NO_DAMAGE * run.clean:
        warnings.append(
            f"corrupting the subject leaves {said!r} at {left:.3g} of {run.clean:.3g}, so there is"
            " little that a restored state could bring back; use more noise, or another prompt."
        )
    return Trace(
        located,
        said,
        other if config.metric == "logit" else None,
        run.clean,
        run.corrupt,
        effects,
        run.window,
        sigma,
        spread.of,
        config,
        tuple(warnings),
    )


def corruption_of(config: TraceConfig, sigma: float, sigma_of: str, samples: int) -> Corruption:
    """How the subject was corrupted, as results have it."""
    kind, noise = ("noise", config.noise) if config.replace is None else ("replace", None)
    return Corruption(kind, sigma, sigma_of, noise, config.replace, samples, config.seed)
