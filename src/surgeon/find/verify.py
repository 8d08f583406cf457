"""Verification: what the model loses without given weights, alone, together and all but one,
against matched controls.

How this works. Everything that is asked is a variant of one model: all parts at zero, each part
alone, all parts but one, each control, and all parts at zero with the super activation put back
(causal.py). All variants are measured together, so that a model that is read from disk is read once
for all of them, and what lies below the lowest part is not computed again (stream.py). A control is
the same operation on other weights of the same matrices, matched in size and laid out alike
(controls.py). The damage of each variant is known window by window: the bootstrap draws windows,
and the verdict (measure/verdict.py) asks for a large damage, far above the worst control.

Where some windows cost less than all, a control is measured on as many as it takes to say that it
does too little damage to count (measure/sequential.py); mostly two to four do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

from jaxtyping import Float64, Int64
from torch import Tensor

from ..anatomy import Anatomy, Entry, Region
from ..corpus import Corpus
from ..errors import BadInput
from ..measure import Behaviours, Controls, VitalConfig, interval, is_close, is_vital, p_value
from ..measure.sequential import below
from ..progress import Tell, silent
from ..result import Result, result
from ..settings import setting
from .causal import written_channels
from .controls import matched_controls
from .damage import Damage, Evidence, Variant
from .stream import damage_on


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
    windows: int
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

    def weights(self) -> list[Region]:
        """What was verified."""
        return self.at

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
    progress: Tell = silent,
    listed: int | None = None,
    damage: Damage | None = None,
    aside_on: Int64[Tensor, " k"] | None = None,
) -> Verification:
    """Zero each part alone, all together, and all but one; the same on matched controls.

    `listed` limits single and leave-one-out damage to the first parts. damage: the means to measure
    on this corpus, where they are at hand. aside_on: the windows on which what decides nothing is
    measured, that is the parts alone, all but one, and restored; not given: all. Parts are entries,
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

    # where a channel peaks is asked of windows of text; other evidence has none
    restorable = isinstance(corpus, Corpus) and bool(written_channels(parts))
    variants = {
        "joint": [Variant(parts)],
        "single": [Variant([part]) for part in alone],
        "left out": [Variant([other for other in parts if other is not part]) for part in alone],
        "control": [Variant([Region(e.site, e.row, e.col) for e in control]) for control in drawn],
        "restored": [Variant(parts, restored=True)] if restorable else [],
    }

    if damage is None:
        evidence = corpus.windows if isinstance(corpus, Corpus) else corpus
        damage = damage_on(anatomy, evidence, anatomy.first_changed(p.site for p in parts))
    by_window = _measured(damage, variants, config, aside_on, progress)
    nats = {name: [float(one.mean()) for one in each] for name, each in by_window.items()}

    (joint_nats,) = nats["joint"]
    ci95 = interval(by_window["joint"][0], config.seed)
    windows = [len(one) for one in by_window["control"]]
    controls = Controls(nats["control"], control_kind(parts), windows)
    return Verification(
        at=list(parts),
        base_nll=float(damage.base.mean()),
        tokens=corpus.predicted,
        windows=len(damage.base),
        single_nats=nats["single"] or [joint_nats],
        joint_nats=joint_nats,
        leave_one_out_nats=nats["left out"] or [0.0],
        ci95=ci95,
        p_value=p_value(joint_nats, controls.nats),
        restored_nats=next(iter(nats["restored"]), None),
        controls=controls,
        vital=is_vital(joint_nats, ci95, controls, config),
        close=is_close(joint_nats, controls, config),
        criteria=config.criteria,
    )


def _measured(
    damage: Damage,
    variants: Mapping[str, Sequence[Variant]],
    config: VerifyConfig,
    aside_on: Int64[Tensor, " k"] | None,
    progress: Tell,
) -> dict[str, list[Float64[Tensor, " k"]]]:
    """The damage of each variant, by window, under the names of the variants; of controls perhaps
    on some of the windows.
    """
    count = partial(progress, "verify")
    if config.exhaustive or len(damage.looks) == 1:
        together = [variant for group in variants.values() for variant in group]
        damages = iter(damage.of(together, count))
        return {name: list(islice(damages, len(group))) for name, group in variants.items()}
    by_window = {
        name: damage.of(group, count, None if name == "joint" else aside_on)
        for name, group in variants.items()
        if name != "control"
    }
    controls = variants["control"]
    by_window["control"] = below(
        lambda which, chosen: damage.of([controls[i] for i in which], count, chosen),
        len(controls),
        config.bar(float(by_window["joint"][0].mean())),
        damage.looks,
        config.seed,
    )
    return by_window


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
