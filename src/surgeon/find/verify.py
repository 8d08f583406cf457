"""Verification: what the model loses without given weights, alone, together and all but one,
against matched controls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..anatomy import Anatomy, Entry, Region
from ..corpus import Corpus
from ..errors import BadInput
from ..measure import Behaviours, Controls, VitalConfig, interval, is_close, is_vital, p_value
from ..measure.sequential import below
from ..result import Result, result
from ..settings import setting
from .causal import written_channels
from .controls import matched_controls
from .damage import Damage, Evidence, Tell, Variant
from .stream import damage_on

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class VerifyConfig(VitalConfig):
    """Settings of verification, and what `vital` demands."""

    seed: int = setting(0, "seed of the controls and of the bootstrap", low=0, high=2**32 - 1)
    exhaustive: bool = setting(
        False, "measure every control on every window; nothing is stopped early", group="Verdict"
    )


@result("verify")
class Verification(Result):
    """Damage in nats per token on the same tokens.

    at: the parts given, in whose order `single_nats` and `leave_one_out_nats` stand; those may be
    of the first parts only. restored_nats: the damage left after restoring the super activation
    alone (see causal.py), None where there is none to restore. close: a number that decides is
    within a tenth of its threshold.
    """

    at: list[Region]
    base_nll: float
    tokens: int
    single_nats: list[float]
    joint_nats: float
    leave_one_out_nats: list[float]
    ci95: tuple[float, float]
    p_value: float
    restored_nats: float | None
    controls: Controls
    vital: bool
    close: bool
    criteria: str
    behaviour: Behaviours | None = None

    def rows(self) -> list[dict[str, object]]:
        """One row."""
        return [
            {
                "parts": len(self.at),
                "base_nll": self.base_nll,
                "tokens": self.tokens,
                "joint_nats": self.joint_nats,
                "single_max_nats": max(self.single_nats),
                "leave_one_out_min_nats": min(self.leave_one_out_nats),
                "ci95_low": self.ci95[0],
                "ci95_high": self.ci95[1],
                "p_value": self.p_value,
                "restored_nats": self.restored_nats,
                "controls_median_nats": self.controls.median_nats,
                "controls_max_nats": self.controls.max_nats,
                "vital": self.vital,
            }
        ]


def verify(
    anatomy: Anatomy,
    parts: Sequence[Region],
    corpus: Corpus | Evidence,
    config: VerifyConfig = VerifyConfig(),
    progress: Progress | None = None,
    listed: int | None = None,
    damage: Damage | None = None,
) -> Verification:
    """Zero each part alone, all together, and all but one; the same on matched controls.

    A control is measured on as many windows as it takes to say that it does too little damage to
    count, see measure/sequential.py. `listed` limits single and leave-one-out damage to the first
    parts. damage: the means to measure on this corpus, where they are at hand. Parts are entries,
    whole rows `[88, :]` or columns `[:, 165]`. The model is left as it was.
    Raises: BadInput, UnknownSite for parts this model does not have, or if no part is given.
    """
    if not parts:
        raise BadInput(
            "no entry was given to verify; name at least one, like 'L0.mlp.down[88, 165]'."
        )
    entries = [e for part in parts for e in entries_of(anatomy, part)]
    alone = parts[:listed] if len(parts) > 1 else []
    drawn = matched_controls(anatomy, entries, config.controls, config.seed)

    joint = Variant(parts)
    singles = [Variant([part]) for part in alone]
    left_out = [Variant([other for other in parts if other is not part]) for part in alone]
    controls = [Variant([Region(e.site, e.row, e.col) for e in control]) for control in drawn]
    restorable = isinstance(corpus, Corpus) and bool(written_channels(parts))
    restored = [Variant(parts, restored=True)] if restorable else []

    if damage is None:
        evidence = corpus.windows if isinstance(corpus, Corpus) else corpus
        sites = [part.site for part in parts]
        damage = damage_on(anatomy, evidence, anatomy.first_changed(sites))
    ours = [joint, *singles, *left_out, *restored]
    looks = damage.looks[-1:] if config.exhaustive else damage.looks
    if len(looks) == 1:  # nothing can be stopped, so all go together: what is read once serves all
        measured = damage.of([*ours, *controls], _telling(progress))
        by_window, beside = measured[: len(ours)], measured[len(ours) :]
    else:
        by_window = damage.of(ours, _telling(progress))
        beside = below(
            lambda which, chosen: damage.of([controls[i] for i in which], None, chosen),
            len(controls),
            config.bar(float(by_window[0].mean())),
            looks,
            config.seed,
        )
    nats = [float(values.mean()) for values in by_window]
    joint_nats, alone_nats, rest = nats[0], nats[1 : 1 + len(alone)], nats[1 + len(alone) :]
    ci95 = interval(by_window[0], config.seed)
    compared = Controls(
        [float(values.mean()) for values in beside],
        control_kind(parts),
        [len(values) for values in beside],
    )
    return Verification(
        at=list(parts),
        base_nll=float(damage.base.mean()),
        tokens=corpus.predicted,
        single_nats=alone_nats or [joint_nats],
        joint_nats=joint_nats,
        leave_one_out_nats=rest[: len(alone)] or [0.0],
        ci95=ci95,
        p_value=p_value(joint_nats, compared.nats),
        restored_nats=rest[-1] if restored else None,
        controls=compared,
        vital=is_vital(joint_nats, ci95, compared, config),
        close=is_close(joint_nats, compared, config),
        criteria=config.criteria,
    )


def _telling(progress: Progress | None) -> Tell | None:
    if progress is None:
        return None
    return lambda done, total: progress("verify", done, total)


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
