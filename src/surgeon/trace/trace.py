"""Causal tracing: corrupt the subject, put one clean state back, and see how much of the answer
returns.

Source: Meng et al. 2022, arXiv:2202.05262, section 2; the severed paths are those of its figure 3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..anatomy import Anatomy
from ..errors import BadInput
from ..measure import interval, require_causal
from ..subject import SubjectPrompt, locate, target_ids
from .config import DEFAULTS, TraceConfig
from .corruption import Spread, corrupted
from .restore import SEVERED, Restorer

Progress = Callable[[str, int, int], None]
CI = "95% percentile bootstrap of the mean over noise samples"
NO_DAMAGE = 0.9  # of the clean probability: a corruption that leaves more has hardly corrupted


@dataclass(frozen=True, eq=False)
class Trace:
    """Shapes: effects[kind] (layer, pos, sample), the metric with that site restored; corrupt
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
        return self.effects[kind].mean(-1)

    def ci95(self, kind: str, layer: int, position: int) -> tuple[float, float]:
        """Interval of the mean over noise samples; of one sample, that value alone."""
        return interval(self.effects[kind][layer, position].double(), self.config.seed)

    def best(self, kind: str, n: int = 1) -> list[tuple[int, int, float]]:
        """Layer, position and mean of the sites that bring most back, most first."""
        mean = self.mean(kind)
        order = mean.flatten().argsort(descending=True, stable=True)[:n].tolist()
        return [(*divmod(at, mean.shape[1]), float(mean.flatten()[at])) for at in order]

    def to_json(self) -> dict[str, Any]:
        several = len(self.corrupt) > 1  # one replacement has no interval
        layers, positions = (
            range(next(iter(self.effects.values())).shape[0]),
            range(len(self.prompt.ids)),
        )
        return {
            "prompt": self.prompt.text,
            "tokens": list(self.prompt.tokens),
            "bos": self.prompt.bos,
            "subject_range": [self.prompt.start, self.prompt.stop],
            "answer": self.answer,
            "versus": self.versus,
            "metric": self.config.metric,
            "p_clean": self.clean,
            "p_corrupt": float(self.corrupt.mean()),
            **{kind: self.mean(kind).tolist() for kind in self.effects},
            "ci": {
                "method": CI if several else None,
                "p_corrupt": (
                    list(interval(self.corrupt.double(), self.config.seed)) if several else None
                ),
                **{
                    k: (
                        [[list(self.ci95(k, i, p)) for p in positions] for i in layers]
                        if several
                        else None
                    )
                    for k in self.effects
                },
            },
            "best": {
                kind: [
                    {"layer": i, "position": p, "token": self.prompt.tokens[p], "value": v}
                    for i, p, v in self.best(kind, 3)
                ]
                for kind in self.effects
            },
            "corruption": {
                "kind": "noise" if self.config.replace is None else "replace",
                "sigma": self.sigma,
                "sigma_of": self.sigma_of,
                "noise": self.config.noise if self.config.replace is None else None,
                "words": self.config.replace,
                "samples": len(self.corrupt),
                "seed": self.config.seed,
            },
            "window": self.window,
            "sever": self.config.sever,
            "warnings": list(self.warnings),
        }


def trace(
    anatomy: Anatomy,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    subject: str,
    config: TraceConfig = DEFAULTS,
    answer: str | None = None,
    versus: str | None = None,
    bos: str = "auto",
    spread: Spread | None = None,
    progress: Progress | None = None,
) -> Trace:
    """Trace one fact. answer: its first token is followed; default what the model says. versus: for
    the logit metric, default what the corrupted model says.

    spread: standard deviation of embeddings, which `config.noise` multiplies; default that of all
    tokens.
    Raises: BadInput for a subject that is not there, a replacement of another length, or a layer
    without such a module.
    """
    require_causal(anatomy.model)
    if versus is not None and config.metric != "logit":
        raise BadInput(
            f"--versus {versus!r} is for --metric logit, which compares two answers; the metric"
            f" here is {config.metric}."
        )
    located = locate(tokenizer, prompt, subject, bos)
    longest = getattr(anatomy.config, "max_position_embeddings", None)
    if longest is not None and len(located.ids) > longest:
        raise BadInput(
            f"the prompt has {len(located.ids)} tokens, and the model reads {longest}; give a"
            " shorter one."
        )
    wanted = [
        None if words is None else target_ids(tokenizer, located.text, words)[0]
        for words in (answer, versus)
    ]
    if wanted[0] is not None and wanted[0] == wanted[1]:
        raise BadInput(
            f"{answer!r} and {versus!r} begin with the same token, so neither leads; give --versus"
            " another first word."
        )
    if config.replace is not None:
        spread = Spread(0.0, "nothing")
    elif spread is None:
        spread = Spread.of_vocabulary(anatomy)
    sigma = config.noise * spread.value
    run = Restorer(
        anatomy,
        located,
        corrupted(anatomy, tokenizer, located, prompt, config, sigma),
        config,
        *wanted,
    )
    effects = {}
    kinds = [*config.kinds, *([SEVERED] if config.sever else [])]
    for done, kind in enumerate(kinds):
        rows = []
        for layer in range(len(run.layers)):
            rows.append(run.restored(kind, layer))
            if progress:
                progress(
                    "restoring", done * len(run.layers) + layer + 1, len(kinds) * len(run.layers)
                )
        effects[kind] = torch.stack(rows)
    said, other = (str(tokenizer.decode([i])) for i in (run.answer, run.versus))
    warnings = list(located.warnings)
    if config.metric == "probability" and float(run.corrupt.mean()) > NO_DAMAGE * run.clean:
        warnings.append(
            f"corrupting the subject leaves {said!r} at {float(run.corrupt.mean()):.3g} of"
            f" {run.clean:.3g}, so there is little that a restored state could bring back; use more"
            " noise, or another prompt."
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
