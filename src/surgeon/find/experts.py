"""Super experts: which experts of a mixture write the outliers of the residual stream."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from ..anatomy import Anatomy
from ..errors import BadInput
from ..result import record
from ..tap import Tap

QUANTILE = 0.995  # of the peaks of all experts
FRACTION = 0.1  # of the highest peak


@record
class ExpertProfile:
    """One expert on a text. peak: the largest |output| of its mlp.down, before the router's weight,
    and `channel` where; 0 without tokens.

    routed: share of the tokens that go to it. share: its part of what the experts of its layer
    write, in summed norm, routing weights included. is_super: peak above the 99.5% quantile of all
    experts' and above a tenth of the highest.
    """

    layer: int
    expert: int
    peak: float
    channel: int
    routed: float
    share: float
    is_super: bool


@torch.no_grad()
def profile_experts(
    anatomy: Anatomy, windows: Int64[Tensor, "n window"], end: int | None = None
) -> list[ExpertProfile]:
    """Every expert of the layers below `end` (default: all), highest peak first; one pass over
    `windows`.

    Raises: BadInput if those layers hold no experts.
    Source: Su et al. 2025, arXiv:2507.23279, section 3, without its restriction to the layers where
    massive activations form.
    """
    layers = [
        i for i in range(len(anatomy.layers) if end is None else end) if anatomy.has_experts(i)
    ]
    if not layers:
        raise BadInput(
            f"this {type(anatomy.model).__name__} has no mixture of experts in the layers asked"
            " for; leave ‹experts› out."
        )
    profiles: dict[int, list[ExpertProfile]] = {}
    with Tap() as tap:
        for index in layers:
            module = anatomy.module(anatomy.downs(index)[0])
            tap.on_call(module, _watch(profiles, index, module))
        tap.stop_after(anatomy.layers[layers[-1]])
        tap.run(
            anatomy.model,
            input_ids=windows.to(next(anatomy.model.parameters()).device),
            use_cache=False,
        )
    experts = [one for index in layers for one in profiles[index]]
    peaks = torch.tensor([one.peak for one in experts], dtype=torch.float64)
    bar = max(float(peaks.quantile(QUANTILE)), FRACTION * float(peaks.max()))
    # of a few experts the highest alone can be the quantile itself
    judged = [replace(one, is_super=one.peak > 0 and one.peak >= bar) for one in experts]
    return sorted(judged, key=lambda one: -one.peak)


def _watch(
    profiles: dict[int, list[ExpertProfile]], layer: int, module: nn.Module
) -> Callable[[tuple[Any, ...]], None]:
    def watch(args: tuple[Any, ...]) -> None:
        states, chosen, weights = args
        profiles[layer] = _profile(layer, module, states, chosen, weights)

    return watch


def _profile(
    layer: int, module: nn.Module, states: Tensor, chosen: Int64[Tensor, "token k"], weights: Tensor
) -> list[ExpertProfile]:
    """Each expert alone on the tokens that are routed to it; states (token, d_model), weights
    (token, k).
    """
    states = states.flatten(0, -2)
    n_experts = next(p for p in module.parameters() if p.dim() == 3).shape[0]
    rows = []
    for expert in range(n_experts):
        at = chosen == expert
        tokens = at.any(1)
        if not tokens.any():
            rows.append((0.0, 0, 0.0, 0.0))
            continue
        mine = states[tokens]
        alone = torch.full((len(mine), 1), expert, dtype=chosen.dtype, device=chosen.device)
        # `forward` itself, because calling the module would call its watchers again
        written: Tensor = module.forward(
            mine, alone, torch.ones_like(alone, dtype=weights.dtype)
        ).float()
        top = written.abs().amax(0)
        weight = (weights * at)[tokens].sum(1).float()
        rows.append(
            (
                float(top.max()),
                int(top.argmax()),
                float(tokens.float().mean()),
                float((written.norm(dim=1) * weight).sum()),
            )
        )
    total = sum(row[3] for row in rows)
    return [
        ExpertProfile(layer, e, peak, channel, routed, size / total, False)
        for e, (peak, channel, routed, size) in enumerate(rows)
    ]
