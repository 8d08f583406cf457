"""One small result of each kind, made by hand, with every text in it chosen by the test."""

from __future__ import annotations

from surgeon.anatomy import Entry, Region, Site
from surgeon.find import (
    Candidate,
    CriticalSet,
    Detection,
    ExpertProfile,
    FindResult,
    Rejection,
    Verification,
)
from surgeon.find.detect import Contribution, Heights
from surgeon.find.find import CriticalEntry, SearchedHeights, SetDamage
from surgeon.measure import Behaviour, Behaviours, BehaviourState, Controls
from surgeon.result import CorpusRecord, Provenance, Result
from surgeon.studies.ablate import Injury
from surgeon.studies.measure import Generation, Measurement, TaskAccuracy
from surgeon.studies.sites import SiteList, SiteRecord

DOWN = Site(0, "mlp.down")


def made_results(text: str = "text") -> dict[str, Result]:
    """Results by kind; names of models, files, prompts, reasons and commands are `text`."""
    made = (
        find_result(text),
        detection(text),
        verification(text),
        injury(text),
        measurement(text),
        site_list(text),
    )
    return {one.kind: one for one in made}


def provenance(text: str, verb: str) -> Provenance:
    return Provenance(
        model=text,
        fingerprint="0" * 64,
        corpus=CorpusRecord(text, 500, True, 2, 250),
        settings={"text": text, "seed": 0},
        seed=0,
        surgeon="0.1",
        command=f"surgeon {verb} '{text}'",
    )


def controls(text: str) -> Controls:
    return Controls([0.001 * i for i in range(-9, 11)], text)


def find_result(text: str = "text") -> FindResult:
    entries = [CriticalEntry(Entry(DOWN, 3, col), -2.5, 0.4, 7) for col in (5, 6)]
    damage = SetDamage(0.75, [0.5, 0.25], [0.1, 0.2], (0.6, 0.9), 0.0476, None, 500, 1.0, 8)
    critical = CriticalSet([3], [[2.0, 9.0, 8.0]], 1.0, entries, damage, controls(text), True, text)
    return FindResult(
        [critical],
        [Rejection(text, text, height=12.0, entries=8, joint_nats=0.04)],
        SearchedHeights(4.0, [5.0, 12.0, 11.0], 0.7),
        [ExpertProfile(0, 1, 9.0, 3, 0.25, 0.5, True)],
        provenance=provenance(text, "find"),
    )


def detection(text: str = "text") -> Detection:
    strongest = Contribution(Entry(DOWN, 3, 5), 0.2, -0.4, 9.0)
    return Detection(
        [Candidate(3, 0, 12.0, [2.0, 12.0, 11.0], 1.0, 1.0, (strongest,))],
        [Rejection(text, text, height=5.0, persistence=0.2)],
        Heights(4.0, [5.0, 12.0, 11.0]),
        provenance=provenance(text, "find"),
    )


def verification(text: str = "text") -> Verification:
    state = BehaviourState(0.3, 0.1, [Behaviour(text, f"{text} {text}", 0.1)])
    return Verification(
        at=[Region(DOWN, 3, 5), Region(DOWN, 3, None)],
        base_nll=0.7,
        tokens=500,
        single_nats=[0.5, 0.25],
        joint_nats=0.75,
        leave_one_out_nats=[0.1, 0.2],
        ci95=(0.6, 0.9),
        p_value=0.0476,
        restored_nats=0.1,
        controls=controls(text),
        vital=True,
        criteria=text,
        behaviour=Behaviours(0.7, 0.5, state, state),
        provenance=provenance(text, "verify"),
    )


def injury(text: str = "text") -> Injury:
    return Injury(text, 2, [text], provenance=provenance(text, "ablate"))


def measurement(text: str = "text") -> Measurement:
    return Measurement(
        patches=[text],
        at=[],
        mode=None,
        nll=0.8,
        tokens=500,
        kl_from_base=0.1,
        top1_agreement=0.9,
        base_nll=0.7,
        generations=[Generation(text, text, f"{text} {text}")],
        loop_rate=0.0,
        tasks={text: TaskAccuracy(0.5, 0.4)},
        provenance=provenance(text, "measure"),
    )


def site_list(text: str = "text") -> SiteList:
    site = SiteRecord(DOWN, (32, 48), text, text, text, text, [Site(None, "embed")])
    return SiteList(text, 1, [site], provenance=provenance(text, "sites"))
