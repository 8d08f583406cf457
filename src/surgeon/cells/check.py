"""Whether a screen can be believed: it must find a planted fragile weight, and must not find a
rescaled neuron.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor

from .damage import Progress
from .model import ScGPT
from .planted import Planted, Rescaled, plant, rescale
from .screen import Screen, ScreenConfig, screen
from .tokenise import Batch


@dataclass(frozen=True)
class CheckConfig:
    """Settings of the screen's own controls."""

    nats: float = field(
        default=0.25,
        metadata={"help": "what removing the planted weight is to cost, in nats per masked value"},
    )
    factor: float = field(
        default=1000.0,
        metadata={"help": "by how much a ReLU neuron is scaled up, and its output weights down"},
    )
    screen: ScreenConfig = field(
        default=ScreenConfig(), metadata={"help": "settings of the screens"}
    )


@dataclass(frozen=True)
class Check:
    """Both controls, and the screens of them.

    The planted weight must be found alone; no weight of the rescaled neuron may be.
    """

    planted: Planted
    planted_screen: Screen
    rescaled: Rescaled
    rescaled_screen: Screen
    config: CheckConfig

    @property
    def planted_found(self) -> bool:
        return any(v.addresses == [self.planted.part.address] for v in self.planted_screen.found)

    @property
    def rescaled_found(self) -> bool:
        column = f", {self.rescaled.neuron}]"
        name = f"L{self.rescaled.layer}.mlp.down["
        return any(
            a.startswith(name) and a.endswith(column)
            for v in self.rescaled_screen.found
            for a in v.addresses
        )

    @property
    def passed(self) -> bool:
        return self.planted_found and not self.rescaled_found

    def to_json(self) -> dict[str, Any]:
        verified = {
            v.addresses[0]: v for v in self.planted_screen.verified if len(v.addresses) == 1
        }.get(self.planted.part.address)
        ranks = [s.part.address for s, _ in self.planted_screen.pruned]
        worst = max(self.rescaled_screen.verified, key=lambda v: v.nats)
        return {
            "passed": self.passed,
            "planted": {
                **self.planted.to_json(),
                "found": self.planted_found,
                "rank": (
                    ranks.index(self.planted.part.address) + 1
                    if self.planted.part.address in ranks
                    else None
                ),
                "verified": None if verified is None else verified.to_json(),
            },
            "rescaled": {
                **self.rescaled.to_json(),
                "found": self.rescaled_found,
                "verdict": self.rescaled_screen.verdict,
                "nats": worst.nats,
                "worst": worst.addresses,
            },
            "settings": asdict(self.config),
        }


def check(
    model: ScGPT,
    batch: Batch,
    masked: Bool[Tensor, "draw cell pos"],
    baseline: Float[Tensor, "draw cell pos"],
    types: Sequence[str] | None = None,
    config: CheckConfig = CheckConfig(),
    progress: Progress | None = None,
) -> Check:
    """Screen a copy of the model with a planted weight, and one with a rescaled neuron.

    Arguments and errors as `screen` and `plant`.
    """
    planted = plant(model, batch, masked, config.nats, seed=config.screen.seed)
    rescaled = rescale(model, batch, config.factor)
    first, second = (
        screen(copy, batch, masked, baseline, types, config.screen, progress)
        for copy in (planted.model, rescaled.model)
    )
    return Check(planted, first, rescaled, second, config)
