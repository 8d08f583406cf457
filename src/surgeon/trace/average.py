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
from ..errors import BadInput, SurgeonError
from ..facts import Fact
from ..measure import interval, require_causal
from ..subject import SubjectPrompt, locate, target_ids
from .config import DEFAULTS, TraceConfig
from .corruption import Spread
from .trace import Progress, Trace, trace

PLACES = (
    "first subject token",
    "middle subject tokens",
    "last subject token",
    "first token after",
    "further tokens",
    "last token",
)
LAST_SUBJECT_TOKEN = "last subject token"
CI = "95% percentile bootstrap of the mean over facts"


@dataclass(frozen=True, eq=False)
class AverageTrace:
    """Mean indirect effects, the metric restored minus corrupted, over facts that the model knows.

    Shapes: effects[kind] (fact, layer, place), NaN where a prompt has no such place; clean, corrupt
    (fact,), the metric. skipped: facts whose answer is not what the model says, or that have none.
    One token alone in its subject is the last, not the first.
    """

    effects: dict[str, Float64[Tensor, "fact layer place"]]
    clean: Float64[Tensor, " fact"]
    corrupt: Float64[Tensor, " fact"]
    skipped: int
    window: int
    sigma: float
    sigma_of: str
    config: TraceConfig
    warnings: tuple[str, ...] = ()

    def cell(self, kind: str, layer: int, place: str) -> tuple[float, tuple[float, float]] | None:
        """Mean over facts and its 95% interval; None if no prompt has this place."""
        values = self.effects[kind][:, layer, PLACES.index(place)]
        values = values[~values.isnan()]
        return (
            None if not len(values) else (float(values.mean()), interval(values, self.config.seed))
        )

    def to_json(self) -> dict[str, Any]:
        cells = {
            kind: [
                [self.cell(kind, layer, place) for place in PLACES]
                for layer in range(effects.shape[1])
            ]
            for kind, effects in self.effects.items()
        }
        first = next(iter(self.effects.values()))[:, 0]
        return {
            "facts": len(self.clean),
            "skipped": self.skipped,
            "metric": self.config.metric,
            "p_clean": float(self.clean.mean()),
            "p_corrupt": float(self.corrupt.mean()),
            "places": list(PLACES),
            "facts_with_place": (~first.isnan()).sum(0).tolist(),
            **{
                kind: [[None if c is None else c[0] for c in row] for row in rows]
                for kind, rows in cells.items()
            },
            "ci": {
                "method": CI,
                "p_clean": list(interval(self.clean, self.config.seed)),
                "p_corrupt": list(interval(self.corrupt, self.config.seed)),
                **{
                    kind: [[None if c is None else list(c[1]) for c in row] for row in rows]
                    for kind, rows in cells.items()
                },
            },
            "layers_by_mlp": (
                [{"layer": i, "effect": e, "ci95": list(ci)} for i, e, ci in suggest_prior(self)]
                if "mlp" in self.effects
                else None
            ),
            "corruption": {
                "kind": "noise",
                "sigma": self.sigma,
                "sigma_of": self.sigma_of,
                "noise": self.config.noise,
                "samples": self.config.samples,
                "seed": self.config.seed,
            },
            "window": self.window,
            "sever": self.config.sever,
            "warnings": list(self.warnings),
        }


def trace_facts(
    anatomy: Anatomy,
    tokenizer: PreTrainedTokenizerBase,
    facts: Sequence[Fact],
    config: TraceConfig = DEFAULTS,
    bos: str = "auto",
    progress: Progress | None = None,
) -> AverageTrace:
    """Trace every fact that the model knows: the first token of its true answer is what the model
    says.

    The embeddings of all the subjects that are traced scale the noise.
    Raises: SurgeonError if it knows none; BadInput as `trace`, and for a replacement, which fits
    one subject.
    """
    require_causal(anatomy.model)
    if config.replace is not None:
        raise BadInput(
            f"{config.replace!r} can take the place of one subject only; corrupt many facts with"
            " noise."
        )
    told = [f for f in facts if f.true is not None and f.true.strip()]
    known = [
        (fact, prompt)
        for fact in told
        if (prompt := _known(anatomy, tokenizer, fact, bos)) is not None
    ]
    if not known:
        without = len(facts) - len(told)
        raise SurgeonError(
            f"of {len(facts)} facts the model answers none as their file does"
            + (f", and {without} have no true answer there" if without else "")
            + "; give facts that it knows, with their answer as `true`."
        )
    spread = Spread.of_subjects(anatomy, [prompt for _, prompt in known])
    traces = []
    for done, (fact, _) in enumerate(known, 1):
        traces.append(
            trace(
                anatomy,
                tokenizer,
                fact.prompt,
                fact.subject,
                config,
                fact.true,
                bos=bos,
                spread=spread,
            )
        )
        if progress:
            progress("facts", done, len(known))
    one = traces[0]
    return AverageTrace(
        {kind: torch.stack([_by_place(t, kind) for t in traces]) for kind in one.effects},
        torch.tensor([t.clean for t in traces], dtype=torch.float64),
        torch.stack([t.corrupt.double().mean() for t in traces]),
        len(facts) - len(known),
        one.window,
        one.sigma,
        one.sigma_of,
        config,
        tuple(f"{t.prompt.text!r}: {warning}" for t in traces for warning in t.warnings),
    )


def suggest_prior(found: AverageTrace | Trace) -> list[tuple[int, float, tuple[float, float]]]:
    """Layers by the effect of their MLPs at the subject's last token, most first: layer, effect,
    95% interval.

    The interval is over facts, or for one trace over noise samples. A prior, not a decision: the
    best layer to edit is found by trial.
    Raises: BadInput if MLPs were not traced.
    """
    if "mlp" not in found.effects:
        raise BadInput(
            "this trace restored no MLP, so it says nothing about layers to edit; trace with the"
            " kind mlp."
        )
    if isinstance(found, Trace):
        effects = (found.effects["mlp"][:, found.prompt.last] - found.corrupt).double()
        ranked = [
            (i, float(e.mean()), interval(e, found.config.seed)) for i, e in enumerate(effects)
        ]
    else:
        cells = [
            (i, found.cell("mlp", i, LAST_SUBJECT_TOKEN))
            for i in range(found.effects["mlp"].shape[1])
        ]
        ranked = [(i, *cell) for i, cell in cells if cell is not None]
    return sorted(ranked, key=lambda row: -row[1])


@torch.no_grad()
def _known(
    anatomy: Anatomy, tokenizer: PreTrainedTokenizerBase, fact: Fact, bos: str
) -> SubjectPrompt | None:
    """The prompt, if the model answers it with the first token of the fact's answer."""
    prompt = locate(tokenizer, fact.prompt, fact.subject, bos)
    ids = torch.tensor([prompt.ids], device=next(anatomy.model.parameters()).device)
    says = int(anatomy.model(input_ids=ids, use_cache=False).logits[0, -1].argmax())
    return prompt if says == target_ids(tokenizer, prompt.text, str(fact.true))[0] else None


def _by_place(one: Trace, kind: str) -> Float64[Tensor, "layer place"]:
    """Mean indirect effect of each place, over noise samples and over the tokens that stand
    there.
    """
    effect = one.mean(kind).double() - one.corrupt.double().mean()
    nothing = torch.full((len(effect),), torch.nan, dtype=torch.float64)
    return torch.stack([effect[:, p].mean(1) if p else nothing for p in _places(one.prompt)], 1)


def _places(prompt: SubjectPrompt) -> list[list[int]]:
    """The positions of each of PLACES; the last token of the prompt is no `further` one, nor the
    first after the subject.
    """
    a, b, n = prompt.start, prompt.stop, len(prompt.ids)
    return [
        [a] if b - a > 1 else [],
        list(range(a + 1, b - 1)),
        [b - 1],
        [b] if b < n - 1 else [],
        list(range(b + 1, n - 1)),
        [n - 1] if n > b else [],
    ]
