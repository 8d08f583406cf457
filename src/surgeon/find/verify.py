"""Verification: what the model loses without given weights, alone, together and all but one,
against matched controls.

How this works. Everything that is asked is a variant of one model: all parts at zero, each part
alone, all parts but one, each control, and all parts at zero with the super activation put back
(causal.py). All variants are measured together, so that a model that is read from disk is read once
for all of them, and what lies below the lowest part is not computed again (stream.py). A control is
the same operation on other weights of the same matrices, matched in size and laid out alike
(controls.py). The damage of each variant is known window by window: the bootstrap draws windows,
and the verdict (measure/verdict.py) asks for a large damage, far above the worst control.

Where a sample costs less than everything, a control is measured on as much as it takes to say that
it does too little damage to count (measure/sequential.py); mostly the beginnings of a few windows
do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

from torch import Tensor

from ..anatomy import Anatomy, Entry, Region
from ..corpus import Corpus
from ..errors import BadInput
from ..measure import (
    Behaviours,
    Controls,
    VitalConfig,
    interval,
    is_close,
    is_vital,
    p_value,
    severity,
)
from ..measure.intact import Sample
from ..measure.sequential import below
from ..progress import Tell, silent
from ..result import Result, derived, result
from ..settings import setting
from .causal import written_channels
from .controls import matched_controls
from .damage import Evidence, Variant
from .estimates import EACH_SITE
from .stream import damage_on


@dataclass(frozen=True)
class VerifyConfig(VitalConfig):
    """Settings of verification, and what `vital` demands."""

    seed: int = setting(0, "seed of the controls and of the bootstrap", low=0, high=2**32 - 1)
    exhaustive: bool = setting(
        False, "measure everything on every window; nothing is decided on a sample", group="Verdict"
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

    @derived
    def severity(self) -> str | None:
        """How bad the damage is, None where nothing is vital."""
        return severity(self.ci95[0]) if self.vital else None

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
) -> Verification:
    """Zero each part alone, all together, and all but one; the same on matched controls.

    `listed` limits single and leave-one-out damage to the first parts. Parts are entries, whole
    rows `[88, :]` or columns `[:, 165]`. The model is left as it was.
    Raises: BadInput, UnknownSite for parts this model does not have, or if no part is given.
    """
    lowest = anatomy.first_changed(part.site for part in parts) if parts else 0
    return Verifier(anatomy, corpus, config, progress, listed, lowest)(parts)


class Verifier:
    """Verifies one set after another on the same evidence.

    lowest: the first layer that a set can change.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        corpus: Corpus | Evidence,
        config: VerifyConfig,
        progress: Tell,
        listed: int | None,
        lowest: int = 0,
    ) -> None:
        self.anatomy, self.corpus, self.config = anatomy, corpus, config
        self.listed, self.count = listed, partial(progress, "verify")
        evidence = corpus.windows if isinstance(corpus, Corpus) else corpus
        self.damage = damage_on(anatomy, evidence, lowest, config.exhaustive)
        self.stops_early = len(self.damage.stages) > 1
        self._joint: dict[tuple[Region, ...], tuple[Tensor, Tensor]] = {}

    def joint(self, parts: Sequence[Region]) -> float:
        """Damage of the parts together on everything, in nats per token."""
        return float(self._together(parts)[0].mean())

    def __call__(
        self,
        parts: Sequence[Region],
        aside_on: Sample | None = None,
        taken: Sequence[Region] = (),
    ) -> Verification:
        """aside_on: the sample on which what decides nothing is measured, that is the parts alone,
        all but one, and restored, and only for a set that is vital; not given: everything, for any.
        taken: other weights that may be no controls.
        """
        if not parts:
            raise BadInput(
                "no entry was given to verify; name at least one, like 'L0.mlp.down[88, 165]'."
            )
        drawn = matched_controls(self.anatomy, parts, self.config.controls, self.config.seed, taken)
        matched = control_kind(parts, taken)
        aside = self._aside(parts)
        if self.stops_early:
            joint, _ = self._together(parts)
            controls = self._stopped_controls(parts, drawn, matched)
        else:  # together, so that a model that is read from disk is read once for all of them
            variants = {"joint": [Variant(parts)], "controls": [Variant(one) for one in drawn]}
            by_window = self._at_once(variants | aside)
            (joint,) = by_window["joint"]
            controls = Controls([float(one.mean()) for one in by_window["controls"]], matched)
        joint_nats = float(joint.mean())
        ci95 = interval(joint, self.config.seed)
        if self.stops_early:
            if aside_on is not None and not is_vital(joint_nats, ci95, controls, self.config):
                aside = {}
            by_window = {name: self.damage.of(v, self.count, aside_on) for name, v in aside.items()}
        nats = {name: [float(one.mean()) for one in each] for name, each in by_window.items()}
        return Verification(
            at=list(parts),
            base_nll=float(self.damage.base.mean()),
            tokens=self.corpus.predicted,
            windows=len(self.damage.base),
            single_nats=nats.get("single") or [joint_nats],
            joint_nats=joint_nats,
            leave_one_out_nats=nats.get("left out") or [0.0],
            ci95=ci95,
            p_value=p_value(joint_nats, controls.nats),
            restored_nats=next(iter(nats.get("restored", [])), None),
            controls=controls,
            vital=is_vital(joint_nats, ci95, controls, self.config),
            close=is_close(joint_nats, controls, self.config),
            criteria=self.config.criteria,
        )

    def _aside(self, parts: Sequence[Region]) -> dict[str, list[Variant]]:
        """What is measured beside the joint damage, and decides nothing."""
        alone = parts[: self.listed] if len(parts) > 1 else []
        rests = [[other for other in parts if other is not part] for part in alone]
        # where a channel peaks is asked of windows of text; other evidence has none
        restorable = isinstance(self.corpus, Corpus) and bool(written_channels(parts))
        return {
            "single": [Variant([part]) for part in alone],
            "left out": [Variant(rest) for rest in rests],
            "restored": [Variant(parts, restored=True)] if restorable else [],
        }

    def _together(self, parts: Sequence[Region]) -> tuple[Tensor, Tensor]:
        key = tuple(parts)
        if key not in self._joint:
            self._joint[key] = self.damage.with_beginning(parts)
        return self._joint[key]

    def _stopped_controls(
        self, parts: Sequence[Region], drawn: Sequence[Sequence[Region]], matched: str
    ) -> Controls:
        """Each control measured until it is decided whether it is small beside the joint damage."""
        # beginnings of windows are compared with beginnings
        joint_nats = min(float(one.mean()) for one in self._together(parts))
        nats, used = below(
            lambda which, sample: self.damage.of(
                [Variant(drawn[i]) for i in which], self.count, sample
            ),
            len(drawn),
            self.config.bar(joint_nats),
            self.damage.stages,
            hopeless=joint_nats,
        )
        windows, tokens = zip(*((len(one.windows), one.tokens) for one in used), strict=True)
        return Controls([float(one.mean()) for one in nats], matched, [*windows], [*tokens])

    def _at_once(self, variants: Mapping[str, Sequence[Variant]]) -> dict[str, list[Tensor]]:
        """The damage of every variant by window, all measured together and on everything."""
        together = [variant for each in variants.values() for variant in each]
        damages = iter(self.damage.of(together, self.count))
        return {name: list(islice(damages, len(each))) for name, each in variants.items()}


def entries_of(anatomy: Anatomy, part: Region) -> list[Entry]:
    """Every entry of a region of this model."""
    site = anatomy.resolve(part.site)
    rows, cols = part.rows_cols(anatomy.view(site).shape)
    return [Entry(site, r, c) for r, c in zip(rows, cols, strict=True)]


def control_kind(parts: Sequence[Region], taken: Sequence[Region] = ()) -> str:
    """How the controls were matched, in words."""
    without = ""
    if taken:
        without = f", without the {EACH_SITE} of the largest estimates where enough others are left"
    kinds = {p.geometry for p in parts}
    if kinds <= {"row", "column"}:
        lines = " and ".join(f"{kind}s" for kind in sorted(kinds, reverse=True))
        return f"whole {lines} of the same matrix, nearest in norm{without}"
    return f"entries of the same matrices, matched in |w|, laid out the same way{without}"
