"""The editors on a model: what each makes of the requests of one edit.

ROME goes fact after fact, each on the model with those before it. EMMET takes all facts at once in
one matrix; MEMIT and AlphaEdit too, in several layers; fine-tuning is the baseline. Each gives one
patch a matrix and fact or a matrix, with what is foreseen of it; the model stays as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Float64
from torch import Tensor

from ..anatomy import Anatomy
from ..patch import Patch
from ..tap import Tap, by_position
from .alphaedit import null_basis, null_space_change, projection_loss
from .config import EditConfig
from .emmet import exact_change
from .finetune import fine_tune
from .keys import PromptBatch, dense_down, keys_at
from .memit import spread_change
from .preflight import (
    FactForecast,
    Factors,
    FoundValue,
    LayerForecast,
    Preflight,
    forecast,
    key_forecast,
)
from .prepare import Preparation
from .rome import chosen_keys, least_change, legacy_change
from .value import Request, Values, optimise

# which keys the variants of ROME hold at
ROME_KEYS = {"rome": "both", "rome-mean": "mean", "rome-bare": "bare", "rome-legacy": "legacy"}


class Change(NamedTuple):
    """Patches, to be applied in order, and their forecast."""

    patches: list[Patch]
    preflight: Preflight


def one_by_one(
    preparation: Preparation, requests: Sequence[Request], layer: int, config: EditConfig
) -> Change:
    """ROME, fact after fact. A single matrix is changed, so the forecast of all is that of the
    sum.
    """
    anatomy = preparation.anatomy
    site = dense_down(anatomy, layer)
    intact = anatomy.view(site).read().clone()  # patches of earlier facts will lie on the matrix
    patches: list[Patch] = []
    changes: list[Factors] = []
    facts: list[FactForecast] = []
    with ExitStack() as earlier:
        for request in requests:
            change, fact = _rome(preparation, request, layer, config)
            patches.append(Patch.low_rank(anatomy, site, *change))
            earlier.enter_context(patches[-1].applied(anatomy))
            changes.append(change)
            facts.append(fact)
    together = torch.cat([left for left, _ in changes], 1), torch.cat([r for _, r in changes])
    return Change(patches, Preflight([_forecast(preparation, layer, intact, together)], facts))


def _rome(
    preparation: Preparation, request: Request, layer: int, config: EditConfig
) -> tuple[Factors, FactForecast]:
    """The change of rank one for one fact, in rounds.

    The value is found as if it were added at the subject's last token only, and the edit acts at
    other tokens too; what that costs the bare prompt, a second round with the edit in place makes
    good. Keys of the layer do not change by it, so the rank stays one.
    """
    anatomy, factor = preparation.anatomy, preparation.factor(layer)
    site, value = dense_down(anatomy, layer), config.settled_value
    keys = _keys(anatomy, [request], layer)[0]

    def written(residual: Tensor) -> Factors:
        if config.method == "rome-legacy":
            return legacy_change(keys.mean(0), keys[0], residual, factor)
        return least_change(chosen_keys(keys, ROME_KEYS[config.method]), residual, factor)

    values = optimise(anatomy, [request], layer, value, progress=preparation.progress)
    residual = values.delta[0].double()
    change = written(residual)
    for _ in range(config.rounds - 1):
        with Patch.low_rank(anatomy, site, *change).applied(anatomy):
            if probability(anatomy, request) >= (value.stop or 0.0):
                break
            values = optimise(anatomy, [request], layer, value, progress=preparation.progress)
        residual = residual + values.delta[0].double()
        change = written(residual)
    return change, _fact(preparation, request, layer, keys, residual, values, 0)


def exactly(
    preparation: Preparation, requests: Sequence[Request], layer: int, config: EditConfig
) -> Change:
    """EMMET: all facts at once, exactly, at the mean and at the bare key of each."""
    anatomy = preparation.anatomy
    site = dense_down(anatomy, layer)
    value, progress = config.settled_value, preparation.progress
    values = optimise(anatomy, requests, layer, value, progress=progress)
    keys = _keys(anatomy, requests, layer)
    residuals = values.delta.double()
    constraints, owner = _constraints(keys)
    change = exact_change(constraints, residuals[owner], preparation.factor(layer))
    foreseen = _forecast(preparation, layer, anatomy.view(site).read(), change)
    facts = [
        _fact(preparation, request, layer, keys[i], residuals[i], values, i)
        for i, request in enumerate(requests)
    ]
    return Change([Patch.low_rank(anatomy, site, *change)], Preflight([foreseen], facts))


def spread(
    preparation: Preparation, requests: Sequence[Request], layers: Sequence[int], config: EditConfig
) -> Change:
    """MEMIT and AlphaEdit: the value is found at the last layer, and each layer takes its share of
    what is still missing there.
    """
    anatomy, last = preparation.anatomy, layers[-1]
    values = optimise(anatomy, requests, last, config.settled_value, "state", preparation.progress)
    bare = PromptBatch.of([request.bare for request in requests])
    wanted = _states(anatomy, bare, last) + values.delta.double()
    unreached = torch.zeros(len(requests), dtype=torch.float64)
    patches: list[Patch] = []
    foreseen: list[LayerForecast] = []
    with ExitStack() as applied:
        for done, layer in enumerate(layers):
            missing = (wanted - _states(anatomy, bare, last)) / (len(layers) - done)
            keys = _keys(anatomy, requests, layer)
            if config.method == "memit":
                constraints, owner = _constraints(keys)
                factor = preparation.factor(layer)
                change = spread_change(constraints, missing[owner], factor, config.weight)
            else:
                change, lost = _within_null_space(preparation, layer, keys, missing, config.energy)
                unreached = torch.maximum(unreached, lost)
            site = dense_down(anatomy, layer)
            foreseen.append(_forecast(preparation, layer, anatomy.view(site).read(), change))
            patches.append(Patch.low_rank(anatomy, site, *change))
            applied.enter_context(patches[-1].applied(anatomy))
    facts = [
        _fact(preparation, request, last, keys[i], missing[i], values, i)
        for i, request in enumerate(requests)
    ]
    if config.method == "alphaedit":
        pairs = zip(facts, unreached.tolist(), strict=True)
        facts = [replace(fact, projection_loss=share) for fact, share in pairs]
    return Change(patches, Preflight(foreseen, facts))


def _within_null_space(
    preparation: Preparation, layer: int, keys: list[Tensor], missing: Tensor, energy: float
) -> tuple[Factors, Float64[Tensor, " n"]]:
    """AlphaEdit's change of one layer, and the share of each fact's key that it cannot reach."""
    moments = preparation.moments(layer)
    basis = null_basis(moments.covariance, energy)
    constraints, owner = _constraints(keys)
    # the mean diagonal of the covariance, so that it grows and shrinks with the model's keys
    ridge = moments.mean_square / moments.d_mlp
    lost = projection_loss(torch.stack([k.mean(0) for k in keys]), basis)
    return null_space_change(constraints, missing[owner], basis, ridge), lost


def fine_tuned(
    preparation: Preparation, requests: Sequence[Request], layer: int, config: EditConfig
) -> Change:
    """FT-M; it has no key and no value."""
    anatomy = preparation.anatomy
    site = dense_down(anatomy, layer)
    before = anatomy.view(site).read().clone()
    after = fine_tune(anatomy, site, requests, config.fine_tune)
    left = (after - before).double().cpu()
    change = left, torch.eye(before.shape[1], dtype=torch.float64)
    facts = [_read(request) for request in requests]
    foreseen = _forecast(preparation, layer, before, change)
    return Change([Patch.from_matrix(anatomy, {site: after})], Preflight([foreseen], facts))


# -- forecasts ------------------------------------------------------------------------------------


def _forecast(
    preparation: Preparation, layer: int, weight: Tensor, change: Factors
) -> LayerForecast:
    site = dense_down(preparation.anatomy, layer)
    moments, factor = preparation.moments(layer), preparation.factor(layer)
    return forecast(site, weight, change, moments, factor)


def _fact(
    preparation: Preparation,
    request: Request,
    layer: int,
    keys: Tensor,
    residual: Tensor,
    values: Values,
    i: int,
) -> FactForecast:
    """What is foreseen of one fact, whose value is the i-th of `values`."""
    value = FoundValue(
        int(values.steps[i]),
        float(values.probability[i]),
        float(values.delta[i].norm() / values.norm[i].clamp_min(1e-12)),
    )
    factor, half = preparation.factor(layer), preparation.half_factor(layer)
    return replace(_read(request), value=value, key=key_forecast(keys, residual, factor, half))


def _read(request: Request) -> FactForecast:
    """How the prompt of a fact was read."""
    bare = request.bare
    tokens, warnings = list(bare.subject_tokens), list(bare.warnings)
    return FactForecast(bare.text, bare.subject, tokens, bare.position_zero, warnings)


# -- what is read off the model -------------------------------------------------------------------


@torch.no_grad()
def probability(anatomy: Anatomy, request: Request) -> float:
    """Geometric mean over its tokens of the target's probability after the bare prompt."""
    target = torch.tensor(request.targets[0])
    ids = torch.tensor([[*request.bare.ids, *request.targets[0]]])
    device = next(anatomy.model.parameters()).device
    logits = anatomy.model(input_ids=ids.to(device), use_cache=False).logits[0].float().cpu()
    start = len(request.bare.ids) - 1  # position i predicts token i + 1
    log_p = logits.log_softmax(-1)[start : start + len(target)]
    return float(log_p.gather(1, target[:, None]).mean().exp())


def _keys(
    anatomy: Anatomy, requests: Sequence[Request], layer: int
) -> list[Float64[Tensor, "contexts d_mlp"]]:
    """For each request its keys after each context."""
    batch = PromptBatch.of([prompt for request in requests for prompt in request.prompts])
    keys = keys_at(anatomy, batch, [layer])[layer].double()
    return list(torch.split(keys, [len(request.prompts) for request in requests]))


def _constraints(keys: Sequence[Tensor]) -> tuple[Float64[Tensor, "m d_mlp"], Tensor]:
    """The keys that an edit of several facts is to hold at, the mean and the bare one of each, and
    to which fact each belongs.
    """
    of_each = [chosen_keys(k, "both") for k in keys]
    numbers = torch.tensor([len(some) for some in of_each])
    return torch.cat(of_each), torch.repeat_interleave(torch.arange(len(keys)), numbers)


@torch.no_grad()
def _states(anatomy: Anatomy, batch: PromptBatch, layer: int) -> Float64[Tensor, "batch d_model"]:
    """The residual stream behind a layer at the subject's last token."""
    states: list[Tensor] = []

    def keep(y: Tensor) -> None:
        row = torch.arange(len(batch), device=y.device)
        states.append(by_position(y, len(batch))[row, batch.last.to(y.device)].double().cpu())

    with Tap() as tap:
        tap.on_output(anatomy.layers[layer], keep)
        tap.stop_after(anatomy.layers[layer])
        ids = batch.ids.to(next(anatomy.model.parameters()).device)
        tap.run(anatomy.model, input_ids=ids, use_cache=False)
    return states[0]
