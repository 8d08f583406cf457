"""`cells screen`: `find.verify` with a masked likelihood in the place of a text's.

A screen takes the entries with the largest |w·x|, zeroes each on some of the cells, and hands the
worst to `verify` on the others: the same controls, interval and verdict as of a language model. The
least effect is a share of what the model knows over the gene-marginal baseline. "None found" is the
expected answer for many of these models, and comes with the numbers that decided it. `check` says
whether a screen can be believed: it must find a planted fragile weight, and no weight of a rescaled
neuron.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from sys import float_info

import torch

from ..anatomy import Region
from ..cells.candidates import EACH, Candidate, candidates, prune, screened
from ..cells.data import write_back
from ..cells.likelihood import MaskedNLL, by_cell, by_gene, by_group
from ..cells.planted import Planted, Rescaled, plant, rescale
from ..cells.probe import IntactProbe, Probe, ProbeScore, embeddings
from ..cells.stage import NOTE, Stage, StageConfig, StageRecord, open_stage
from ..errors import BadInput
from ..find import VerifyConfig, verify
from ..measure import Controls
from ..patch import injured
from ..progress import Tell, silent
from ..result import Result, derived, record, result
from ..settings import check_values, nested, setting
from .desk import Desk

LEAST_CELLS = 8


@dataclass(frozen=True)
class ScreenConfig:
    """Settings of the screen, and what a finding demands."""

    each: int = setting(EACH, "candidates from every MLP output matrix and norm vector", low=1)
    verify: int = setting(3, "candidates, the worst, that are held against controls", low=1)
    min_share: float = setting(
        0.1, "least share of the lead over the baseline that is lost", group="Verdict"
    )
    rules: VerifyConfig = nested(VerifyConfig, without=("min_nats", "seed"))
    probe_share: float = setting(
        0.25, "share of the cells that choose; the others judge", low=0.01, high=0.99
    )
    least: int = setting(5, "scored values a gene needs to be named", low=1)
    controls_check: bool = setting(False, "also screen a planted weight and a rescaled neuron")
    seed: int = setting(0, "seed of everything random", low=0, high=2**32 - 1)

    def __post_init__(self) -> None:
        check_values(self)

    def demands(self, lead: float) -> VerifyConfig:
        """What verification demands of a model with that lead; one that is no better than the
        baseline knows nothing that it could lose.
        """
        least = self.min_share * lead if lead > 0 else float_info.max
        return replace(self.rules, min_nats=least, seed=self.seed)

    @property
    def criteria(self) -> str:
        return (
            f"a finding needs at least {self.min_share:.0%} of the lead over the gene-marginal"
            f" baseline lost, {self.rules.min_ratio:g} times the worst of {self.rules.controls}"
            " matched controls, p <= 0.05 against them, and a 95% interval over cells above 0"
        )


@dataclass(frozen=True)
class Settings(StageConfig):
    """Is there a weight the model in FOLDER cannot live without, on the cells in DATA?

    "None found" is a result.
    """

    screen: ScreenConfig = nested(ScreenConfig)


@record
class Verified:
    """What one candidate, or several together, cost on the judging cells, beside matched controls;
    in nats per masked value.

    collapse_share: of the lead; None without one.
    """

    addresses: list[Region]
    nats: float
    ci95: tuple[float, float]
    p_value: float
    collapse_share: float | None
    controls: Controls
    found: bool
    by_type: dict[str, float]
    by_gene: dict[str, float]
    by_cell: dict[str, float]
    probe: dict[str, ProbeScore]

    @property
    def name(self) -> str:
        return ", ".join(map(str, self.addresses))


@record
class Tried(Candidate):
    """A candidate, with its verification if it was among the worst."""

    verified: Verified | None = None


@record
class PlantedCheck(Planted):
    """The planted weight, which must be found alone; rank: among the candidates."""

    found: bool
    rank: int | None
    verified: Verified | None


@record
class RescaledCheck(Rescaled):
    """The rescaled neuron, no weight of which may be found; nats: of the worst that was verified
    there.
    """

    found: bool
    verdict: str
    nats: float
    worst: list[Region]


@record
class Check:
    """Whether the planted weight was found alone, and no weight of the rescaled neuron was."""

    planted: PlantedCheck
    rescaled: RescaledCheck

    @derived
    def passed(self) -> bool:
        return self.planted.found and not self.rescaled.found


@result("cells screen")
class CellScreen(Result):
    """Candidates by damage alone on the probe cells, worst first, the worst held against controls.

    together: the verified ones zeroed together; probe: what it says of the intact model.
    """

    candidates: list[Tried]
    together: Verified | None
    intact_nll: float
    baseline_nll: float
    lead_nats: float
    masked_values: int
    cells: dict[str, int]
    draws: int
    probe: IntactProbe | None
    criteria: str
    stage: StageRecord
    check: Check | None = None
    note: str = NOTE

    @property
    def verified(self) -> list[Verified]:
        alone = [c.verified for c in self.candidates]
        return [v for v in (*alone, self.together) if v is not None]

    @property
    def worst(self) -> Verified:
        return max(self.verified, key=lambda v: v.nats)

    @derived
    def entries(self) -> list[Region]:
        """What was found."""
        found = [v.addresses for v in self.verified if v.found]
        return list(dict.fromkeys(address for addresses in found for address in addresses))

    def weights(self) -> list[Region]:
        """What was found. Raises: BadInput if nothing was."""
        entries: list[Region] = self.entries
        if not entries:
            raise BadInput("this screen found nothing; name weights instead.")
        return entries

    @derived
    def verdict(self) -> str:
        return "found" if self.entries else "none"

    @derived
    def controls(self) -> Controls:
        """Those of the worst."""
        return self.worst.controls


def run(desk: Desk, settings: Settings) -> CellScreen:
    stage = open_stage(settings, settings.screen.seed)
    about = desk.provenance(settings, model=settings.folder, fingerprint=stage.fingerprint)
    result = replace(screen(stage, settings.screen, desk.tell), provenance=about)
    if settings.write_h5ad is not None:
        per_gene, per_cell = ({"damage": d} for d in (result.worst.by_gene, result.worst.by_cell))
        write_back(stage.adata, settings.write_h5ad, per_gene, per_cell, result.to_json())
    return result


def screen(stage: Stage, config: ScreenConfig = ScreenConfig(), tell: Tell = silent) -> CellScreen:
    """Is there an entry that the model cannot live without? The model is left as it was.

    Raises: BadInput for fewer than 8 cells; MissingExtra for types without scikit-learn.
    """
    n = len(stage.batch.cell_names)
    if n < LEAST_CELLS:
        raise BadInput(
            f"{n} cells are too few to choose candidates on some and judge them on others; give at"
            f" least {LEAST_CELLS}."
        )
    order = torch.randperm(n, generator=torch.Generator().manual_seed(config.seed))
    cut = min(max(round(config.probe_share * n), 2), n - 4)
    choose, judge = order[:cut].sort().values, order[cut:].sort().values
    tried = [Tried(**vars(one)) for one in _pruned(stage.of(choose), config.each, tell)]
    bench = _Bench(stage.of(judge), config, tell)
    worst = [one.address for one in tried[: config.verify]]
    for i, region in enumerate(worst):
        tried[i] = replace(tried[i], verified=bench.verify([region]))
    return CellScreen(
        candidates=tried,
        together=bench.verify(worst) if len(worst) > 1 else None,
        intact_nll=bench.nll.base,
        baseline_nll=bench.nll.base + bench.lead,
        lead_nats=bench.lead,
        masked_values=bench.nll.predicted,
        cells={"probe": len(choose), "judge": len(judge)},
        draws=len(stage.masked),
        probe=None if bench.probe is None else bench.probe.intact(bench.states()),
        criteria=config.criteria,
        stage=stage.record,
        check=check(stage, config, tell) if config.controls_check else None,
    )


def worst_candidate(stage: Stage, each: int = EACH, tell: Tell = silent) -> Region:
    """The candidate whose removal alone costs most on these cells, in one draw of masks; nothing is
    verified.
    """
    return _pruned(stage, each, tell)[0].address


def _pruned(stage: Stage, each: int, tell: Tell) -> list[Candidate]:
    nll = MaskedNLL(stage.model.anatomy, stage.batch, stage.masked[:1])
    return prune(nll, candidates(nll, screened(nll.anatomy), each), tell)


class _Bench:
    """The judging cells, and all that the verifications share."""

    def __init__(self, stage: Stage, config: ScreenConfig, tell: Tell) -> None:
        self.stage, self.config, self.tell = stage, config, tell
        self.nll = MaskedNLL(stage.model.anatomy, stage.batch, stage.masked)
        self.lead = float(by_cell(stage.baseline).mean()) - self.nll.base
        self.probe: Probe | None = None
        if stage.types is not None:
            probe = Probe(self.states(), stage.types, config.seed)
            self.probe = probe if probe.possible else None

    def verify(self, parts: Sequence[Region]) -> Verified:
        nll, types = self.nll, self.stage.types
        demands = self.config.demands(self.lead)
        said = verify(nll.anatomy, parts, nll, demands, self.tell, listed=0)
        values = nll.damage(parts)
        cells = by_cell(values)
        names, means, _ = by_gene(values, nll.batch, self.config.least)
        genes = sorted(zip(names, means.tolist(), strict=True), key=lambda gene: -gene[1])
        return Verified(
            said.at,
            nats=said.joint_nats,
            ci95=said.ci95,
            p_value=said.p_value,
            collapse_share=said.joint_nats / self.lead if self.lead > 0 else None,
            controls=said.controls,
            found=said.vital,
            by_type={} if types is None else by_group(cells, types),
            by_gene=dict(genes),
            by_cell=dict(zip(nll.batch.cell_names, cells.tolist(), strict=True)),
            probe=self._scores(parts),
        )

    def _scores(self, parts: Sequence[Region]) -> dict[str, ProbeScore]:
        if self.probe is None:
            return {}
        with injured(self.nll.anatomy, parts):
            states = self.states()
        return {"frozen": self.probe.frozen(states), "refitted": self.probe.refitted(states)}

    def states(self) -> torch.Tensor:
        return embeddings(self.stage.model, self.stage.batch)


def check(stage: Stage, config: ScreenConfig = ScreenConfig(), tell: Tell = silent) -> Check:
    """Screen a copy of the model with a planted weight, and one with a rescaled neuron.

    Raises: as `screen` and `plant`.
    """
    config = replace(config, controls_check=False)
    fragile, planted = plant(stage.model, stage.batch, stage.masked, seed=config.seed)
    scaled, rescaled = rescale(stage.model, stage.batch)
    first, second = (screen(replace(stage, model=copy), config, tell) for copy in (fragile, scaled))
    ranks = {one.address: rank for rank, one in enumerate(first.candidates, 1)}
    alone = next((v for v in first.verified if v.addresses == [planted.address]), None)
    worst = second.worst
    return Check(
        PlantedCheck(
            **vars(planted),
            found=alone is not None and alone.found,
            rank=ranks.get(planted.address),
            verified=alone,
        ),
        RescaledCheck(
            **vars(rescaled),
            found=any(rescaled.holds(region) for region in second.entries),
            verdict=second.verdict,
            nats=worst.nats,
            worst=worst.addresses,
        ),
    )
