"""The settings of a repair: what may change, and how the change is found."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from ..errors import BadInput
from ..settings import configured, nested, setting

METHODS = ("graft", "distil", "graft+distil")

# the published experiment on OLMo-1B-0724-hf: the whole row of the super weight, trained at a
# constant rate to the last step; its weight decay is PyTorch's default
REFERENCE: dict[str, Any] = {
    "method": "distil",
    "loss": "kl",
    "steps": 400,
    "batch": 2,
    "length": 128,
    "lr": 1e-3,
    "schedule": "constant",
    "cooldown": 0.0,
    "weight_decay": 0.01,
    "patience": 0,
}


@dataclass(frozen=True)
class GraftConfig:
    """Settings of the graft.

    Each pair is solved from the same moments, and the held-out NLL chooses.
    """

    ridges: tuple[float, ...] = setting(
        (1e-1, 1e-2, 1e-3, 1e-4, 1e-6),
        "ridge to choose from, as a share of the mean diagonal of E[x x']",
        group="Graft",
        spelled="ridge",
    )
    first_weights: tuple[float, ...] = setting(
        (1.0, 3.0, 10.0, 30.0, 100.0),
        "how often the first position of a window, the attention sink, is counted; to choose from",
        group="Graft",
        spelled="first-weight",
    )

    def __post_init__(self) -> None:
        numbers = (*self.ridges, *self.first_weights)
        if not (self.ridges and self.first_weights and min(numbers) > 0):
            raise BadInput("a graft needs ‹ridges› and ‹first_weights›, all above 0.")


_training = partial(setting, group="Training")


@dataclass(frozen=True)
class DistilConfig:
    """Settings of distillation."""

    loss: str = _training(
        "kl",
        "what is minimised: kl (to the intact model) or ce (cross-entropy on the text)",
        choices=("kl", "ce"),
    )
    steps: int = _training(400, "most training steps", low=1)
    batch: int = _training(2, "windows of a step", low=1)
    length: int = _training(
        128,
        "tokens of a training window, BOS included; at most those of an evaluation window",
        low=2,
    )
    lr: float = _training(0.0, "learning rate of AdamW; 0: a share of the weights, as below", low=0)
    relative_lr: float = _training(
        0.08,
        "learning rate as a share of the RMS weight of the rows; for OLMo-1B's vital row 1e-3",
        low=0,
    )
    schedule: str = _training(
        "constant",
        "constant (but for the cooldown) or cosine (down to 0)",
        choices=("constant", "cosine"),
    )
    cooldown: float = _training(
        0.2,
        "share of the steps, at the end, over which a constant rate goes straight to 0",
        low=0,
        high=1,
    )
    weight_decay: float = _training(0.0, "weight decay of AdamW", low=0)
    l1: float = _training(
        0.0, "pull of every change back to 0, as a share of the optimizer's own step", low=0
    )
    sparse_k: int = _training(
        0, "change only this many entries, chosen during training; 0: all", low=0
    )
    every: int = _training(50, "steps between looks at the held-out slice", low=1)
    patience: int = _training(
        4, "looks without improvement before stopping; 0: train on and keep the last step", low=0
    )
    cache_mb: int = _training(
        1024,
        "MiB for the intact model's predictions; where they do not fit, the likeliest tokens'",
        low=1,
    )


@dataclass(frozen=True)
class RepairConfig:
    """What may change, and how it is found."""

    method: str = setting(
        "graft+distil",
        "how the change is found: graft (closed form), distil (training), or training from the"
        " closed form",
        choices=METHODS,
    )
    exclude_injured: bool = setting(False, "leave the injured entries as they are")
    rows: tuple[int, ...] = setting(
        (),
        "output channel that may change; not given: the injured ones",
        low=0,
        group="Change",
        spelled="row",
    )
    columns: tuple[int, ...] = setting(
        (),
        "input neuron that may change; not given: all",
        low=0,
        group="Change",
        spelled="column",
    )
    rank: int = setting(
        0, "rank of the change; 0: any, stored entry by entry", low=0, group="Change"
    )
    control: bool = setting(True, "also spend the same on a random row")
    seed: int = setting(
        0, "seed of the order of the windows, and of the control", low=0, high=2**32 - 1
    )
    graft: GraftConfig = nested(GraftConfig)
    distil: DistilConfig = nested(DistilConfig)

    def __post_init__(self) -> None:
        if self.method == "graft" and (self.distil.sparse_k or self.distil.l1):
            raise BadInput(
                "a graft is solved for all entries at once; for a sparse repair use ‹method› distil"
                " or graft+distil."
            )

    @classmethod
    def reference(cls) -> RepairConfig:
        """The settings of the published experiment."""
        config: RepairConfig = configured(cls(), REFERENCE)
        return config
