"""One edit of a model: facts in, a patch and its forecast out; the model stays as it was."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from ..anatomy import Anatomy
from ..errors import BadInput, Refused
from ..facts import Fact
from ..patch import Patch, compose
from ..tap import Tap
from .alphaedit import null_basis, null_space_change, projection_loss
from .emmet import exact_change
from .finetune import FineTuneConfig, fine_tune
from .keys import PromptBatch, dense_down, keys_at
from .memit import spread_change
from .preflight import Factors, KeyForecast, LayerForecast, forecast, key_forecast, worst
from .prepare import Preparation
from .rome import chosen_keys, least_change, legacy_change
from .value import Request, ValueConfig, Values, optimise

METHODS = ("rome", "rome-mean", "rome-bare", "rome-legacy", "emmet", "memit", "alphaedit", "ft")
SEVERAL_LAYERS = ("memit", "alphaedit")
TOGETHER = ("emmet", "memit", "alphaedit")
# facts that share a matrix pay for each other's norm, so their values stop earlier (measured in
# docs/editing.md)
TOGETHER_VALUE = ValueConfig(lr=0.1, stop=0.9)


@dataclass(frozen=True)
class EditConfig:
    """Settings of an edit."""

    method: str = field(default="rome", metadata={"help": "the editor"})
    layers: tuple[int, ...] = field(
        default=(),
        metadata={
            "help": "layers to change; not given: a sixth of the depth (memit: those up to it)"
        },
    )
    weight: float = field(
        default=400.0, metadata={"help": "memit: how many usual keys the covariance stands for"}
    )
    energy: float = field(
        default=0.1,
        metadata={"help": "alphaedit: share of the keys' energy in the directions that may change"},
    )
    value: ValueConfig | None = field(
        default=None, metadata={"help": "of the value; not given: as the method needs it"}
    )
    rounds: int = field(
        default=2,
        metadata={
            "help": (
                "rome: times the value is optimised, each with the edit in place, until the bare"
                " prompt has --value-stop"
            )
        },
    )
    fine_tune: FineTuneConfig = field(default_factory=FineTuneConfig)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise BadInput(f"--method {self.method} is not known; use {', '.join(METHODS)}.")
        if self.rounds < 1:
            raise BadInput("an edit needs at least 1 round.")
        if self.weight <= 0 or not 0 < self.energy < 1:
            raise BadInput(
                "the weight of the usual keys must lie above 0, and the share of energy between 0"
                " and 1."
            )
        if len(self.layers) > 1 and self.method not in SEVERAL_LAYERS:
            raise BadInput(
                f"{self.method} changes one layer, and {len(self.layers)} were named; use --method"
                " memit for several."
            )


@dataclass(frozen=True, eq=False)
class Edit:
    """What an editor made of some facts.

    layers: the forecast of each matrix. facts: of each fact and layer. probability: of each target
    at the end of the optimisation, least over contexts (nothing was optimised for "ft").
    projection_loss: of AlphaEdit, for each fact, largest over layers.
    """

    patch: Patch
    requests: list[Request]
    layers: list[LayerForecast]
    facts: list[dict[str, Any]]
    method: str
    seconds: float

    @property
    def verdict(self) -> str:
        return worst(self.layers).verdict

    def to_json(self) -> dict[str, Any]:
        most = worst(self.layers)
        return {
            "verdict": most.verdict,
            "update_norm_ratio": max(f.update_norm_ratio for f in self.layers),
            "predicted_damage": most.predicted_damage,
            "relative_damage": most.relative_damage,
            "position_zero": any(r.bare.position_zero for r in self.requests),
            "subject_tokens": (
                list(self.requests[0].bare.subject_tokens)
                if len(self.requests) == 1
                else [list(r.bare.subject_tokens) for r in self.requests]
            ),
            "layers": [f.to_json() for f in self.layers],
            "facts": self.facts,
        }


def layers_by_depth(n: int, method: str) -> tuple[int, ...]:
    """Of n layers, the one at a sixth of the depth, where published edits of GPT-J and Llama sit;
    for MEMIT and AlphaEdit a sixth of all layers around it, two at least. Never the last: nothing
    reads there what the subject's token holds."""
    n = max(1, n - 1)
    middle = min(n - 1, round((n + 1) / 6))
    if method not in SEVERAL_LAYERS:
        return (middle,)
    many = min(n, max(2, middle))
    first = max(0, min(n - many, middle + (many - 1) // 2 - many + 1))
    return tuple(range(first, first + many))


def default_value(method: str) -> ValueConfig:
    return TOGETHER_VALUE if method in TOGETHER else ValueConfig()


def edit(
    preparation: Preparation, facts: Sequence[Fact], config: EditConfig = EditConfig()
) -> Edit:
    """Make the patch with which the model says each fact's target. Nothing is written: apply the
    patch to have the edit.

    ROME with several facts edits one after the other, each on the model with those before it; the
    other methods take them together.
    Raises: BadInput for a fact without target, a layer that cannot be edited; UnusableKey; Refused
    if two facts contradict each other.
    """
    began = time.perf_counter()
    anatomy = preparation.anatomy
    requests = [_request(preparation, fact) for fact in facts]
    _require_consistent(facts)
    value = config.value or default_value(config.method)
    layers = sorted(config.layers) or list(layers_by_depth(len(anatomy.layers), config.method))
    for layer in layers:
        dense_down(anatomy, layer)
    if layers[-1] == len(anatomy.layers) - 1:
        for request in requests:
            if any(p.stop < len(p.ids) for p in request.prompts) or any(
                len(t) > 1 for t in request.targets
            ):
                raise BadInput(
                    f"layer {layers[-1]} is the last, and nothing reads there what the token"
                    f" {request.bare.subject_tokens[-1]!r} holds; choose a layer below."
                )
    preparation.gather(layers)
    if config.method in SEVERAL_LAYERS:
        patches, forecasts, notes = _spread(preparation, requests, layers, config, value)
    elif config.method == "ft":
        patches, forecasts, notes = _fine_tuned(preparation, requests, layers[0], config)
    elif config.method == "emmet":
        patches, forecasts, notes = _exact(preparation, requests, layers[0], value)
    else:
        patches, forecasts, notes = _one_by_one(preparation, requests, layers[0], config, value)
    settings = {
        "operation": "edit",
        "method": config.method,
        "layers": layers,
        "seed": preparation.config.seed,
        "facts": [[f.prompt, f.subject, f.target] for f in facts],
    }
    whole = reduce(compose, patches)
    patch = replace(whole, made_by={"surgeon": whole.made_by["surgeon"], **settings})
    return Edit(patch, requests, forecasts, notes, config.method, time.perf_counter() - began)


Made = tuple[list[Patch], list[LayerForecast], list[dict[str, Any]]]


def _request(preparation: Preparation, fact: Fact) -> Request:
    if fact.target is None:
        raise BadInput(f"the fact {fact.text!r} has no target; say what the model is to answer.")
    return Request.of(
        preparation.tokenizer,
        fact.prompt,
        fact.subject,
        fact.target,
        preparation.prefixes,
        preparation.config.bos,
    )


def _require_consistent(facts: Sequence[Fact]) -> None:
    seen: dict[str, str | None] = {}
    for fact in facts:
        if seen.setdefault(fact.text, fact.target) != fact.target:
            raise Refused(
                f"{fact.text!r} is to become {seen[fact.text]!r} and {fact.target!r} at once; keep"
                " one of the two."
            )


def _one_by_one(
    preparation: Preparation,
    requests: Sequence[Request],
    layer: int,
    config: EditConfig,
    value: ValueConfig,
) -> Made:
    """ROME, fact after fact. A single matrix is changed, so the forecast of all is that of the sum.

    The value is found as if it were added at the subject's last token only, and the edit acts at
    other tokens too; what that costs the bare prompt, a second round with the edit in place makes
    good. Keys of the layer do not change by it, so the rank stays one.
    """
    anatomy = preparation.anatomy
    which = {"rome": "both", "rome-mean": "mean", "rome-bare": "bare", "rome-legacy": "legacy"}[
        config.method
    ]
    site, factor = dense_down(anatomy, layer), preparation.factor(layer)
    start = anatomy.view(site).read().clone()
    patches, notes, factors = [], [], []
    with ExitStack() as applied:
        for request in requests:
            keys = keys_at(anatomy, PromptBatch.of(request.prompts), [layer])[layer].double()
            delta = torch.zeros(anatomy.d_model, dtype=torch.float64)
            change: Factors | None = None
            for _ in range(config.rounds):
                with ExitStack() as trial:
                    if change is not None:
                        trial.enter_context(Patch.low_rank(anatomy, site, *change).applied(anatomy))
                        if _probability(anatomy, request) >= value.stop:
                            break
                    values = optimise(
                        anatomy, [request], layer, value, progress=preparation.progress
                    )
                delta = delta + values.delta[0].double()
                if which == "legacy":
                    change = legacy_change(keys.mean(0), keys[0], delta, factor)
                else:
                    change = least_change(chosen_keys(keys, which), delta, factor)
            assert change is not None
            patches.append(Patch.low_rank(anatomy, site, *change))
            applied.enter_context(patches[-1].applied(anatomy))
            factors.append(change)
            notes.append(_note(preparation, request, layer, keys, delta, values, 0))
    total = torch.cat([f[0] for f in factors], 1), torch.cat([f[1] for f in factors])
    return patches, [forecast(site, start, total, preparation.moments(layer), factor)], notes


def _exact(
    preparation: Preparation, requests: Sequence[Request], layer: int, value: ValueConfig
) -> Made:
    """EMMET: all facts at once, exactly, at the mean and at the bare key of each."""
    anatomy = preparation.anatomy
    site, factor = dense_down(anatomy, layer), preparation.factor(layer)
    values = optimise(anatomy, requests, layer, value, progress=preparation.progress)
    keys = _keys(anatomy, requests, [layer])[layer]
    deltas = values.delta.double()
    held = [chosen_keys(k, "both") for k in keys]
    wanted = torch.cat([d.expand(len(k), -1) for k, d in zip(held, deltas, strict=True)])
    change = exact_change(torch.cat(held), wanted, factor)
    notes = [
        _note(preparation, r, layer, keys[i], deltas[i], values, i) for i, r in enumerate(requests)
    ]
    view = anatomy.view(site)
    return (
        [Patch.low_rank(anatomy, site, *change)],
        [forecast(site, view.read(), change, preparation.moments(layer), factor)],
        notes,
    )


def _spread(
    preparation: Preparation,
    requests: Sequence[Request],
    layers: Sequence[int],
    config: EditConfig,
    value: ValueConfig,
) -> Made:
    """MEMIT and AlphaEdit: the value is found at the last layer, and each layer takes its share of
    what is still missing there.
    """
    anatomy = preparation.anatomy
    last = layers[-1]
    values = optimise(anatomy, requests, last, value, "state", preparation.progress)
    bare = PromptBatch.of([r.bare for r in requests])
    wanted = _states(anatomy, bare, last) + values.delta.double()
    patches, forecasts, notes = [], [], []
    lost = torch.zeros(len(requests), dtype=torch.float64)
    with ExitStack() as applied:
        for done, layer in enumerate(layers):
            site, factor = dense_down(anatomy, layer), preparation.factor(layer)
            keys = _keys(anatomy, requests, [layer])[layer]
            held = [chosen_keys(k, "both") for k in keys]
            rows = torch.repeat_interleave(
                torch.arange(len(requests)), torch.tensor([len(k) for k in held])
            )
            missing = (wanted - _states(anatomy, bare, last)) / (len(layers) - done)
            if config.method == "memit":
                change = spread_change(torch.cat(held), missing[rows], factor, config.weight)
            else:
                moments = preparation.moments(layer)
                basis = null_basis(moments.covariance, config.energy)
                lost = torch.maximum(
                    lost, projection_loss(torch.stack([k.mean(0) for k in keys]), basis)
                )
                change = null_space_change(
                    torch.cat(held), missing[rows], basis, moments.mean_square / moments.d_mlp
                )
            forecasts.append(
                forecast(
                    site, anatomy.view(site).read(), change, preparation.moments(layer), factor
                )
            )
            patches.append(Patch.low_rank(anatomy, site, *change))
            applied.enter_context(patches[-1].applied(anatomy))
            if layer == last:
                notes = [
                    _note(preparation, r, layer, keys[i], missing[i], values, i)
                    for i, r in enumerate(requests)
                ]
    if config.method == "alphaedit":
        for note, share in zip(notes, lost.tolist(), strict=True):
            note["projection_loss"] = share
    return patches, forecasts, notes


def _fine_tuned(
    preparation: Preparation, requests: Sequence[Request], layer: int, config: EditConfig
) -> Made:
    anatomy = preparation.anatomy
    site = dense_down(anatomy, layer)
    before = anatomy.view(site).read().clone()
    after = fine_tune(anatomy, site, requests, config.fine_tune)
    change: Factors = (
        (after - before).double().cpu(),
        torch.eye(before.shape[1], dtype=torch.float64),
    )
    notes: list[dict[str, Any]] = [
        {"prompt": r.bare.text, "subject": r.bare.subject} for r in requests
    ]
    return (
        [Patch.from_matrix(anatomy, {site: after})],
        [forecast(site, before, change, preparation.moments(layer), preparation.factor(layer))],
        notes,
    )


def _note(
    preparation: Preparation,
    request: Request,
    layer: int,
    keys: Tensor,
    residual: Tensor,
    values: Values,
    i: int,
) -> dict[str, Any]:
    known: KeyForecast = key_forecast(
        keys, residual, preparation.factor(layer), preparation.half_factor(layer)
    )
    return {
        "prompt": request.bare.text,
        "subject": request.bare.subject,
        "subject_tokens": list(request.bare.subject_tokens),
        "position_zero": request.bare.position_zero,
        "warnings": list(request.bare.warnings),
        "steps": int(values.steps[i]),
        "optimised_probability": float(values.probability[i]),
        "relative_value_norm": float(values.delta[i].norm() / values.norm[i].clamp_min(1e-12)),
        **known.to_json(),
    }


@torch.no_grad()
def _probability(anatomy: Anatomy, request: Request) -> float:
    """Geometric mean over its tokens of the target's probability after the bare prompt."""
    ids = torch.tensor([[*request.bare.ids, *request.targets[0]]])
    logits = (
        anatomy.model(input_ids=ids.to(next(anatomy.model.parameters()).device), use_cache=False)
        .logits[0]
        .float()
        .cpu()
    )
    start = len(request.bare.ids) - 1
    log_p = logits.log_softmax(-1)[start : start + len(request.targets[0])]
    return float(log_p.gather(1, torch.tensor(request.targets[0])[:, None]).mean().exp())


def _keys(
    anatomy: Anatomy, requests: Sequence[Request], layers: Sequence[int]
) -> dict[int, list[Tensor]]:
    """For each layer and request, the keys (contexts, d_mlp) in float64."""
    batch = PromptBatch.of([p for r in requests for p in r.prompts])
    sizes = [len(r.prompts) for r in requests]
    return {
        layer: list(torch.split(k.double(), sizes))
        for layer, k in keys_at(anatomy, batch, layers).items()
    }


@torch.no_grad()
def _states(anatomy: Anatomy, batch: PromptBatch, layer: int) -> Tensor:
    """The residual stream (batch, d_model) behind a layer at the subject's last token, in
    float64.
    """
    found: list[Tensor] = []

    def keep(y: Tensor) -> None:
        found.append(
            y[torch.arange(len(y), device=y.device), batch.last.to(y.device)].double().cpu()
        )

    with Tap() as tap:
        tap.on_output(anatomy.layers[layer], keep)
        tap.stop_after(anatomy.layers[layer])
        tap.run(
            anatomy.model,
            input_ids=batch.ids.to(next(anatomy.model.parameters()).device),
            use_cache=False,
        )
    return found[0]
