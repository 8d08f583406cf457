"""One small result of each kind that is about models of gene expression, made by hand."""

from __future__ import annotations

from collections.abc import Callable

from surgeon.anatomy import Region, Site
from surgeon.cells import CellMap, CellTraining
from surgeon.cells.checkpoint import LoadReport
from surgeon.cells.donors import DonorTest
from surgeon.cells.enrich import Pathway
from surgeon.cells.map import Component, Damage, Gene, Null, NullWeight, Story
from surgeon.cells.planted import Planted
from surgeon.cells.probe import IntactProbe, ProbeScore
from surgeon.cells.stage import Embedding, Point, StageRecord
from surgeon.measure import Controls
from surgeon.result import Provenance, Result
from surgeon.studies.cells_geneformer import GeneformerDamage
from surgeon.studies.cells_screen import (
    CellScreen,
    Check,
    PlantedCheck,
    RescaledCheck,
    Tried,
    Verified,
)
from surgeon.studies.cells_sentences import CellSentences

AT = Region(Site(0, "mlp.down"), 3, 5)
OTHER = Region(Site(1, "norm.norm2"), 4, 0)
DAMAGE = Damage(0.25, (0.2, 0.3))
PLANTED = Planted(1e-5, AT, 8.0, 0.25)
Make = Callable[[str, str], Provenance]


def cell_results(text: str, about: Make, controls: Controls) -> list[Result]:
    """about: makes the provenance of a verb."""
    damage = GeneformerDamage(
        at=[AT],
        base_nll=0.7,
        tokens=500,
        single_nats=[0.75],
        joint_nats=0.75,
        leave_one_out_nats=[0.0],
        ci95=(0.6, 0.9),
        p_value=0.0476,
        restored_nats=None,
        controls=controls,
        windows=12,
        vital=True,
        close=False,
        criteria=text,
        cells=12,
        provenance=about(text, "cells geneformer"),
    )
    sentences = CellSentences(text, 40, 100, text, text, provenance=about(text, "cells sentences"))
    return [
        training(text, about),
        cell_screen(text, about, controls),
        cell_map(text, about),
        sentences,
        damage,
    ]


def training(text: str, about: Make) -> CellTraining:
    return CellTraining(
        nll=1.6,
        baseline_nll=1.7,
        lead_nats=0.1,
        lead_ci95=(0.05, 0.15),
        train_nll=1.55,
        validation_nll=1.61,
        seconds=3.5,
        steps=100,
        best_step=50,
        validation_curve=[(50, 1.61), (100, 1.62)],
        cells={"test": 6, "validation": 6, "train": 28},
        genes=40,
        parameters=9000,
        source=text,
        expression="counts",
        mask_ratio=0.4,
        output=text,
        provenance=about(text, "cells train"),
    )


def stage(text: str) -> StageRecord:
    return StageRecord(LoadReport(text, 9, [text], 0), "categorical", text, text, True, text)


def verified(text: str, controls: Controls, found: bool, at: list[Region]) -> Verified:
    score = ProbeScore(0.7, 0.6)
    return Verified(
        addresses=at,
        nats=0.005 if not found else 0.25,
        ci95=(0.004, 0.3),
        p_value=0.0476,
        collapse_share=0.05,
        controls=controls,
        found=found,
        by_type={text: 0.1, "other": 0.05},
        by_gene={text: 0.1},
        by_cell={text: 0.1},
        probe={"frozen": score, "refitted": score},
    )


def cell_screen(text: str, about: Make, controls: Controls) -> CellScreen:
    """None found, with the screen's own controls."""
    alone = verified(text, controls, False, [AT])
    planted = PlantedCheck(
        **vars(PLANTED), found=True, rank=1, verified=verified(text, controls, True, [AT])
    )
    return CellScreen(
        candidates=[
            Tried(AT, -2.5, 9.0, 8.0, 0.006, alone),
            Tried(OTHER, 1.5, 3.0, 2.0, 0.001),
        ],
        together=verified(text, controls, False, [AT, OTHER]),
        intact_nll=1.6,
        baseline_nll=1.7,
        lead_nats=0.1,
        masked_values=500,
        cells={"probe": 6, "judge": 18},
        draws=2,
        probe=IntactProbe(0.8, 0.7, 0.5, 2, 1),
        criteria=text,
        stage=stage(text),
        check=Check(planted, RescaledCheck(1e-5, 1, 7, 1000.0, False, "none", 0.01, [OTHER])),
        note=text,
        provenance=about(text, "cells screen"),
    )


def cell_map(text: str, about: Make) -> CellMap:
    """With every part that a map can have."""
    pathway = Pathway(text, 12, 0.5, 1.5, 0.001, 0.01, 8, 1e-5, 1e-4, [text], 0.75)
    story = Story(1, [1, 0], [pathway])
    return CellMap(
        at=[AT],
        damage=DAMAGE,
        intact_nll=1.6,
        genes=[Gene(text, 0.5, 1.5, 0.1, 20), Gene("other", 0.1, 1.7, -0.1, 20)],
        difficulty_correlation=-0.2,
        by_cell={text: 0.3, "other": 0.2},
        cell_nll={text: 1.6, "other": 1.5},
        by_type={text: 0.3, "other": 0.2},
        enrichment={"raw": story, "residual": story},
        null=Null([NullWeight(OTHER, -8.0, 0.26), NullWeight(AT, 9.0, 0.24)], [-0.3, 0.6]),
        components=[Component("L0.head1", 0, 0.2, (0.1, 0.3))],
        by_condition={text: 0.3, "other": 0.2},
        donors=DonorTest(
            condition=text,
            donor=text,
            means={text: {"a": 0.3, "b": 0.2}, "other": {"c": 0.1, "d": 0.2}},
            statistic=0.1,
            measure=text,
            p=0.3,
            smallest_p=0.03,
            design="unpaired",
            rearrangements=6,
        ),
        stage=stage(text),
        embedding=Embedding(text, [Point(0.1, 0.2, 0.3), Point(0.4, 0.5, 0.2)]),
        planted=PLANTED,
        note=text,
        provenance=about(text, "cells map"),
    )
