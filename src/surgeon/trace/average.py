"""Traces of many facts, averaged by where a token stands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..anatomy import Anatomy
from ..errors import SurgeonError
from ..facts import Fact
from ..measure import continuations, interval
from ..subject import SubjectPrompt, locate
from .trace import Progress, Trace, TraceConfig, subject_sigma, trace

DEFAULTS = TraceConfig()
PLACES = ("first subject token", "middle subject tokens", "last subject token", "first token after", "further tokens", "last token")


@dataclass(frozen=True, eq=False)
class AverageTrace:
    """Mean indirect effects, the metric restored minus corrupted, over facts that the model knows.

    Shapes: effects[kind] (fact, layer, place), NaN where a prompt has no such place. skipped: facts that the model does not know.
    """

    effects: dict[str, Float64[Tensor, "fact layer place"]]
    clean: Float64[Tensor, " fact"]
    corrupt: Float64[Tensor, " fact"]
    skipped: int
    sigma: float
    config: TraceConfig

    def cell(self, kind: str, layer: int, place: str) -> tuple[float, tuple[float, float]] | None:
        """Mean over facts and its 95% interval; None if no prompt has this place."""
        values = self.effects[kind][:, layer, PLACES.index(place)]
        values = values[~values.isnan()]
        return None if not len(values) else (float(values.mean()), interval(values, self.config.seed))

    def to_json(self) -> dict[str, Any]:
        def table(kind: str, part: int) -> list[list[Any]]:
            cells = [[self.cell(kind, layer, place) for place in PLACES] for layer in range(self.effects[kind].shape[1])]
            return [[None if c is None else (c[0] if part == 0 else list(c[1])) for c in row] for row in cells]

        return {
            "facts": len(self.clean),
            "skipped": self.skipped,
            "places": list(PLACES),
            "p_clean": float(self.clean.mean()),
            "p_corrupt": float(self.corrupt.mean()),
            "sigma": self.sigma,
            **{kind: table(kind, 0) for kind in self.effects},
            "ci95": {kind: table(kind, 1) for kind in self.effects},
        }


def trace_facts(
    anatomy: Anatomy,
    tokenizer: PreTrainedTokenizerBase,
    facts: Sequence[Fact],
    config: TraceConfig = DEFAULTS,
    bos: str = "auto",
    progress: Progress | None = None,
) -> AverageTrace:
    """Trace every fact that the model knows: whose true answer is what it says. The embeddings of all their subjects scale the noise.

    Raises: SurgeonError if it knows none; BadInput as `trace`.
    """
    told = [f for f in facts if f.true is not None]
    known = continuations(anatomy.model, tokenizer, [(f.text, str(f.true)) for f in told], bos) if told else []
    right = [f for f, (_, says) in zip(told, known, strict=True) if says]
    if not right:
        raise SurgeonError(f"the model answers none of the {len(facts)} facts as their file does, so there is nothing to trace.")
    located = [locate(tokenizer, f.prompt, f.subject, bos) for f in right]
    sigma = config.noise * subject_sigma(anatomy, located)
    traces = []
    for done, fact in enumerate(right):
        traces.append(trace(anatomy, tokenizer, fact.prompt, fact.subject, config, fact.true, bos=bos, sigma=sigma))
        if progress:
            progress("facts", done + 1, len(right))
    effects = {kind: torch.stack([_by_place(t, kind) for t in traces]) for kind in config.kinds}
    clean = torch.tensor([t.clean for t in traces], dtype=torch.float64)
    corrupt = torch.stack([t.corrupt.double().mean() for t in traces])
    return AverageTrace(effects, clean, corrupt, len(facts) - len(right), sigma, config)


def suggest_prior(average: AverageTrace) -> list[tuple[int, float, tuple[float, float]]]:
    """Layers by the effect of their MLPs at the subject's last token, most first: layer, effect, interval. A prior, not a decision."""
    cells = [(layer, average.cell("mlp", layer, "last subject token")) for layer in range(average.effects["mlp"].shape[1])]
    return sorted(((layer, *cell) for layer, cell in cells if cell is not None), key=lambda c: -c[1])


def _by_place(one: Trace, kind: str) -> Float64[Tensor, "layer place"]:
    effect = one.mean(kind).double() - one.corrupt.double().mean()
    places = _places(one.prompt)
    return torch.stack([effect[:, p].mean(1) if p else torch.full((len(effect),), torch.nan, dtype=torch.float64) for p in places], 1)


def _places(prompt: SubjectPrompt) -> list[list[int]]:
    a, b, n = prompt.start, prompt.stop, len(prompt.ids)
    return [
        [a] if b - a > 1 else [],
        list(range(a + 1, b - 1)),
        [b - 1],
        [b] if b < n - 1 else [],
        list(range(b + 1, n - 1)),
        [n - 1] if n > b else [],
    ]
