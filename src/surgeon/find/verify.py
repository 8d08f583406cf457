"""Verification: what the model loses without given weights, alone, together and all but one,
against matched controls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..anatomy import Anatomy, Entry, Region
from ..corpus import Corpus
from ..errors import BadInput
from ..measure.bootstrap import interval
from .causal import written_channels
from .controls import matched_controls
from .damage import Evidence, Variant
from .stream import damage_on

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class VerifyConfig:
    """Settings of verification, and what `vital` demands."""

    controls: int = field(
        default=20, metadata={"help": "number of matched control sets, at least 20"}
    )
    min_nats: float = field(
        default=0.1, metadata={"help": "least joint damage, in nats per token, to be called vital"}
    )
    min_ratio: float = field(
        default=3.0, metadata={"help": "least joint damage as a multiple of the worst control's"}
    )
    seed: int = field(default=0, metadata={"help": "seed of the controls and of the bootstrap"})

    def __post_init__(self) -> None:
        if self.controls < 20:
            raise BadInput(
                f"{self.controls} controls cannot show anything at the 5% level; use at least 20."
            )


@dataclass(frozen=True)
class Controls:
    """Damage, in nats, of the matched control sets."""

    nats: list[float]
    kind: str

    @property
    def max(self) -> float:
        return max(self.nats)

    @property
    def median(self) -> float:
        return float(torch.tensor(self.nats, dtype=torch.float64).quantile(0.5))

    def __str__(self) -> str:
        return f"{self.median:+.4f} median, {self.max:+.4f} worst of {len(self.nats)} ({self.kind})"

    def to_json(self) -> dict[str, Any]:
        return {
            "n": len(self.nats),
            "max_nats": self.max,
            "median_nats": self.median,
            "nats": self.nats,
            "kind": self.kind,
        }


@dataclass(frozen=True)
class Verification:
    """Damage in nats per token on the same tokens. `single` and `leave_one_out` follow the order of
    the parts given.

    `restored` is the damage that stays when the super activation alone is put back (see causal.py);
    None if there is none.
    """

    base_nll: float
    tokens: int
    single: list[float]
    joint: float
    leave_one_out: list[float]
    ci95: tuple[float, float]
    p_value: float
    restored: float | None
    controls: Controls
    config: VerifyConfig

    @property
    def vital(self) -> bool:
        """Significant and large: the interval lies above 0, no control does as much, and the effect
        is big enough.
        """
        c = self.config
        significant = self.ci95[0] > 0 and self.p_value <= 0.05
        return (
            significant
            and self.joint >= c.min_nats
            and self.joint >= c.min_ratio * max(self.controls.max, 0.0)
        )

    @property
    def criteria(self) -> str:
        c = self.config
        return (
            f"vital: joint damage at least {c.min_nats:g} nats and {c.min_ratio:g} times the worst"
            f" of {len(self.controls.nats)} matched controls, p <= 0.05 against them, and a 95%"
            " interval over windows above 0"
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "base_nll": self.base_nll,
            "tokens": self.tokens,
            "single_nats": self.single,
            "joint_nats": self.joint,
            "leave_one_out_nats": self.leave_one_out,
            "ci95": list(self.ci95),
            "p_value": self.p_value,
            "restored_nats": self.restored,
            "controls": self.controls.to_json(),
            "vital": self.vital,
            "criteria": self.criteria,
        }


def verify(
    anatomy: Anatomy,
    parts: Sequence[Region],
    corpus: Corpus | Evidence,
    config: VerifyConfig = VerifyConfig(),
    progress: Progress | None = None,
    listed: int | None = None,
) -> Verification:
    """Zero each part alone, all together, and all but one; the same on matched controls.

    `listed` limits single and leave-one-out damage to the first parts. Parts are entries, whole
    rows `[88, :]` or columns `[:, 165]`. The model is left as it was.
    Raises: BadInput, UnknownSite for parts this model does not have, or if no part is given.
    """
    if not parts:
        raise BadInput(
            "no entry was given to verify; name at least one with --at 'L0.mlp.down[88, 165]'."
        )
    entries = [e for part in parts for e in entries_of(anatomy, part)]
    layers = [part.site.layer for part in parts]
    lowest = min((n for n in layers if n is not None), default=0) if None not in layers else 0
    alone = parts[:listed] if len(parts) > 1 else []
    controls = matched_controls(anatomy, entries, config.controls, config.seed)
    sets = [parts, *([p] for p in alone), *([q for q in parts if q is not p] for p in alone)]
    sets += [[Region(e.site, e.row, e.col) for e in control] for control in controls]
    variants = [Variant(regions) for regions in sets]
    if isinstance(corpus, Corpus):
        damage = damage_on(anatomy, corpus.windows, lowest)
        variants += [Variant(parts, restored=True)] * bool(written_channels(parts))
    else:
        damage = damage_on(anatomy, corpus, lowest)
    joint, *others = damage.of(
        variants, (lambda done, total: progress("verify", done, total)) if progress else None
    )
    nats = [float(nll.mean()) for nll in others]
    n = len(alone)
    mean = float(joint.mean())
    single, leave, nats, restored = (
        nats[:n],
        nats[n : 2 * n],
        nats[2 * n : 2 * n + config.controls],
        nats[2 * n + config.controls :],
    )
    return Verification(
        base_nll=float(damage.base.mean()),
        tokens=corpus.predicted,
        single=single or [mean],
        joint=mean,
        leave_one_out=leave or [0.0],
        ci95=interval(joint, config.seed),
        p_value=(1 + sum(n >= mean for n in nats)) / (1 + len(nats)),
        restored=restored[0] if restored else None,
        controls=Controls(nats, control_kind(parts)),
        config=config,
    )


def entries_of(anatomy: Anatomy, part: Region) -> list[Entry]:
    """Every entry of a region of this model."""
    site = anatomy.resolve(part.site)
    rows, cols = part.rows_cols(anatomy.view(site).shape)
    return [Entry(site, r, c) for r, c in zip(rows, cols, strict=True)]


def control_kind(parts: Sequence[Region]) -> str:
    kinds = {p.geometry for p in parts}
    if kinds == {"row"}:
        return "whole rows of the same matrix, nearest in norm"
    if kinds == {"column"}:
        return "whole columns of the same matrix, nearest in norm"
    return "entries of the same matrices, matched in |w|, laid out the same way"
