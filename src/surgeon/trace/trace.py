"""Causal tracing: corrupt the subject, put one clean state back, and see what answer returns.

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

    def to_json(self) -> dict[str, Any]:
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
            "ci": self._intervals(),
            "best": {kind: self._best_json(kind) for kind in self.effects},
            "corruption": self._corruption(),
            "window": self.window,
            "sever": self.config.sever,
            "warnings": list(self.warnings),
        }

    def _intervals(self) -> dict[str, Any]:
        if len(self.corrupt) == 1:  # a replacement is one run, which has no interval
            return dict.fromkeys(("method", "p_corrupt", *self.effects))
        corrupt = interval(self.corrupt.double(), self.config.seed)
        intervals: dict[str, Any] = {"method": CI, "p_corrupt": list(corrupt)}
        for kind, effects in self.effects.items():
            layers, positions, _ = effects.shape
            intervals[kind] = [
                [list(self.ci95(kind, layer, position)) for position in range(positions)]
                for layer in range(layers)
            ]
        return intervals

    def _best_json(self, kind: str) -> list[dict[str, Any]]:
        return [
            {
                "layer": layer,
                "position": position,
                "token": self.prompt.tokens[position],
                "value": value,
            }
            for layer, position, value in self.best(kind, 3)
        ]

    def _corruption(self) -> dict[str, Any]:
        by_noise = self.config.replace is None
        return {
            "kind": "noise" if by_noise else "replace",
            "sigma": self.sigma,
            "sigma_of": self.sigma_of,
            "noise": self.config.noise if by_noise else None,
            "words": self.config.replace,
            "samples": len(self.corrupt),
            "seed": self.config.seed,
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
    effects = {}
    for done, kind in enumerate(kinds):
        by_layer = []
        for layer in range(len(run.layers)):
            by_layer.append(run.restored(kind, layer))
            if progress:
                n_layers = len(run.layers)
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
