"""Traces of many facts, averaged by where a token stands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import transformers
from jaxtyping import Float64
from torch import Tensor

from ..anatomy import Anatomy
from ..errors import BadInput, SurgeonError
from ..facts import Fact
from ..measure import interval, require_causal
from ..progress import Tell, silent
from ..subject import SubjectPrompt, locate, target_ids
from .config import DEFAULTS, TraceConfig
from .corruption import Spread
from .result import AverageIntervals, Interval, LayerEffect, TraceAverage, by_kind
from .trace import Trace, corruption_of, trace

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

    def cell(self, kind: str, layer: int, place: str) -> tuple[float, Interval] | None:
        """Mean over facts and its 95% interval; None if no prompt has this place."""
        values = self.effects[kind][:, layer, PLACES.index(place)]
        values = values[~values.isnan()]
        if not len(values):
            return None
        return float(values.mean()), interval(values, self.config.seed)

    def result(self) -> TraceAverage:
        """Means over facts and their intervals."""
        first = next(iter(self.effects.values()))[:, 0]
        cells = {
            kind: [[self.cell(kind, i, place) for place in PLACES] for i in range(effects.shape[1])]
            for kind, effects in self.effects.items()
        }
        means = {
            kind: [[None if c is None else c[0] for c in row] for row in rows]
            for kind, rows in cells.items()
        }
        intervals = {
            kind: [[None if c is None else c[1] for c in row] for row in rows]
            for kind, rows in cells.items()
        }
        by_mlp = None
        if "mlp" in self.effects:
            by_mlp = [LayerEffect(*ranked) for ranked in suggest_prior(self)]
        seed, samples = self.config.seed, self.config.samples
        return TraceAverage(
            facts=len(self.clean),
            skipped=self.skipped,
            metric=self.config.metric,
            p_clean=float(self.clean.mean()),
            p_corrupt=float(self.corrupt.mean()),
            places=list(PLACES),
            facts_with_place=(~first.isnan()).sum(0).tolist(),
            **by_kind(means),
            ci=AverageIntervals(
                CI,
                interval(self.clean, seed),
                interval(self.corrupt, seed),
                **by_kind(intervals),
            ),
            layers_by_mlp=by_mlp,
            corruption=corruption_of(self.config, self.sigma, self.sigma_of, samples),
            window=self.window,
            sever=self.config.sever,
            warnings=list(self.warnings),
        )


def trace_facts(
    anatomy: Anatomy,
    tokenizer: transformers.PreTrainedTokenizerBase,
    facts: Sequence[Fact],
    config: TraceConfig = DEFAULTS,
    bos: str = "auto",
    progress: Tell = silent,
) -> AverageTrace:
    """Trace every fact that the model knows, and average by place.

    A fact is known if the first token of its true answer is what the model says. The embeddings of
    all the subjects that are traced scale the noise.
    Raises: SurgeonError if it knows none; BadInput as `trace`, and for a replacement, which fits
    one subject.
    """
    require_causal(anatomy.model)
    if config.replace is not None:
        raise BadInput(
            f"{config.replace!r} can take the place of one subject only; corrupt many facts with"
            " noise."
        )
    answered = [fact for fact in facts if fact.true is not None and fact.true.strip()]
    prompts = [_known(anatomy, tokenizer, fact, bos) for fact in answered]
    known = [(f, prompt) for f, prompt in zip(answered, prompts, strict=True) if prompt is not None]
    if not known:
        without = len(facts) - len(answered)
        lacking = f", and {without} have no true answer there" if without else ""
        raise SurgeonError(
            f"of {len(facts)} facts the model answers none as their file does{lacking}; give facts"
            " that it knows, with their answer as `true`."
        )
    spread = Spread.of_subjects(anatomy, [prompt for _, prompt in known])
    traces = []
    for done, (fact, _) in enumerate(known, 1):
        prompt, subject = fact.prompt, fact.subject
        traces.append(
            trace(anatomy, tokenizer, prompt, subject, config, fact.true, bos=bos, spread=spread)
        )
        progress("facts", done, len(known))
    first = traces[0]
    return AverageTrace(
        {kind: torch.stack([_by_place(t, kind) for t in traces]) for kind in first.effects},
        torch.tensor([t.clean for t in traces], dtype=torch.float64),
        torch.stack([t.corrupt.double().mean() for t in traces]),
        len(facts) - len(known),
        first.window,
        first.sigma,
        first.sigma_of,
        config,
        tuple(f"{t.prompt.text!r}: {warning}" for t in traces for warning in t.warnings),
    )


def suggest_prior(traced: AverageTrace | Trace) -> list[tuple[int, float, Interval]]:
    """Layer, effect and 95% interval of each MLP at the subject's last token, most first.

    The interval is over facts, or for one trace over noise samples. A prior, not a decision: the
    best layer to edit is found by trial.
    Raises: BadInput if MLPs were not traced.
    """
    if "mlp" not in traced.effects:
        raise BadInput(
            "this trace restored no MLP, so it says nothing about layers to edit; trace with the"
            " kind mlp."
        )
    ranked: list[tuple[int, float, Interval]] = []
    for layer in range(_n_layers(traced)):
        if isinstance(traced, Trace):
            restored = traced.effects["mlp"][layer, traced.prompt.last]
            effects = (restored - traced.corrupt).double()
            mean, ci = float(effects.mean()), interval(effects, traced.config.seed)
            ranked.append((layer, mean, ci))
        else:
            cell = traced.cell("mlp", layer, LAST_SUBJECT_TOKEN)
            if cell is not None:
                ranked.append((layer, *cell))
    return sorted(ranked, key=lambda row: -row[1])


def _n_layers(traced: AverageTrace | Trace) -> int:
    axis = 0 if isinstance(traced, Trace) else 1
    return traced.effects["mlp"].shape[axis]


@torch.no_grad()
def _known(
    anatomy: Anatomy, tokenizer: transformers.PreTrainedTokenizerBase, fact: Fact, bos: str
) -> SubjectPrompt | None:
    """The prompt, if the model answers it with the first token of the fact's answer."""
    prompt = locate(tokenizer, fact.prompt, fact.subject, bos)
    ids = torch.tensor([prompt.ids], device=next(anatomy.model.parameters()).device)
    says = int(anatomy.model(input_ids=ids, use_cache=False).logits[0, -1].argmax())
    answer = target_ids(tokenizer, prompt.text, str(fact.true))[0]
    return prompt if says == answer else None


def _by_place(one: Trace, kind: str) -> Float64[Tensor, "layer place"]:
    """Mean indirect effect of each place, over noise samples and the tokens that stand there."""
    effect = one.mean(kind).double() - one.corrupt.double().mean()
    nothing = torch.full((len(effect),), torch.nan, dtype=torch.float64)
    columns = [effect[:, place].mean(1) if place else nothing for place in _places(one.prompt)]
    return torch.stack(columns, 1)


def _places(prompt: SubjectPrompt) -> list[list[int]]:
    """The positions of each of PLACES.

    The last token of the prompt is neither `further` nor the first after the subject.
    """
    start, stop, n = prompt.start, prompt.stop, len(prompt.ids)
    return [
        [start] if stop - start > 1 else [],
        list(range(start + 1, stop - 1)),
        [stop - 1],
        [stop] if stop < n - 1 else [],
        list(range(stop + 1, n - 1)),
        [n - 1] if n > stop else [],
    ]
