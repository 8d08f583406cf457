"""The screen of a model of gene expression: `find.verify` with a masked likelihood in the place of
a text's.

A screen takes the entries with the largest |w·x|, zeroes each on some of the cells, and hands the
worst to `verify` on the others: the same controls, interval and verdict as of a language model. The
least effect is a share of what the model knows over the gene-marginal baseline. "None found" is the
expected answer for many of these models, and comes with the numbers that decided it. `check` says
whether a screen can be believed: it must find a planted fragile weight, and no weight of a rescaled
neuron.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from sys import float_info
from typing import Any

import torch

from ..anatomy import Region
from ..cells.candidates import EACH, Candidate, candidates, prune, screened
from ..cells.enrich import EnrichConfig, read_gmt
from ..cells.likelihood import MaskedNLL, Masks, Progress, Values, by_cell, by_gene, by_group
from ..cells.map import NOTE, Map, MapConfig, map_damage
from ..cells.model import ScGPT
from ..cells.planted import plant, rescale
from ..cells.probe import Probe, ProbeScore, embeddings
from ..cells.stage import Stage
from ..cells.tokenise import Batch
from ..errors import BadInput
from ..find import VerifyConfig, verify
from ..measure import Controls
from ..patch import injured
from ..progress import silent
from ..result import Result, result
from ..settings import setting

LEAST_CELLS = 8


@dataclass(frozen=True)
class ScreenConfig:
    """Settings of the screen, and what a finding demands."""

    each: int = setting(EACH, "candidates from every MLP output matrix and norm vector")
    verify: int = setting(3, "candidates, the worst, that are held against controls")
    controls: int = setting(20, "matched controls of each verified candidate, at least 20")
    probe_share: float = setting(0.25, "share of the cells that choose; the others judge")
    min_share: float = setting(0.1, "least share of the lead over the baseline that is lost")
    min_ratio: float = setting(3.0, "least damage as a multiple of the worst control's")
    least: int = setting(5, "scored values a gene needs to be named")
    controls_check: bool = setting(False, "also screen a planted weight and a rescaled neuron")
    seed: int = setting(0, "seed of everything random")

    def __post_init__(self) -> None:
        if not 0 < self.probe_share < 1 or min(self.each, self.verify, self.least) < 1:
            raise BadInput(
                "a screen needs a ‹probe_share› between 0 and 1, and at least one candidate, one"
                " verification and one value per gene."
            )
        self.demands(0.0)

    def demands(self, lead: float) -> VerifyConfig:
        """What verification demands of a model with that lead; one that is no better than the
        baseline knows nothing that it could lose.
        """
        least = self.min_share * lead if lead > 0 else float_info.max
        return VerifyConfig(self.controls, least, self.min_ratio, self.seed)

    @property
    def criteria(self) -> str:
        return (
            f"a finding needs at least {self.min_share:.0%} of the lead over the gene-marginal"
            f" baseline lost, {self.min_ratio:g} times the worst of {self.controls} matched"
            " controls, p <= 0.05 against them, and a 95% interval over cells above 0"
        )


@dataclass(frozen=True)
class Verified:
    """What one candidate, or several together, cost on the judging cells, beside matched controls;
    in nats per masked value.

    collapse_share: of the lead; None without one.
    """

    addresses: list[str]
    nats: float
    ci95: tuple[float, float]
    p_value: float
    collapse_share: float | None
    controls: dict[str, Any]
    found: bool
    by_type: dict[str, float]
    by_gene: dict[str, float]
    by_cell: dict[str, float]
    probe: dict[str, ProbeScore]


@dataclass(frozen=True)
class Tried(Candidate):
    """A candidate, with its verification if it was among the worst."""

    verified: Verified | None = None


@dataclass(frozen=True)
class Check:
    """Whether the planted weight was found alone, and no weight of the rescaled neuron was."""

    passed: bool
    planted: dict[str, Any]
    rescaled: dict[str, Any]


@result("cells screen")
class Screen(Result):
    """The result. entries: what was found; candidates: by damage alone on the probe cells, worst
    first; together: the verified ones zeroed together; controls: those of the worst; probe: what it
    says of the intact model.
    """

    verdict: str
    entries: list[str]
    candidates: list[Tried]
    together: Verified | None
    controls: dict[str, Any]
    intact_nll: float
    baseline_nll: float
    lead_nats: float
    masked_values: int
    cells: dict[str, int]
    draws: int
    probe: dict[str, float]
    criteria: str
    check: Check | None = None
    note: str = NOTE

    @property
    def verified(self) -> list[Verified]:
        alone = [c.verified for c in self.candidates]
        return [v for v in (*alone, self.together) if v is not None]

    @property
    def worst(self) -> Verified:
        return max(self.verified, key=lambda v: v.nats)


def control_figures(controls: Controls) -> dict[str, Any]:
    """Matched controls as the documents have them."""
    return {
        "n": controls.n,
        "max_nats": controls.max_nats,
        "median_nats": controls.median_nats,
        "nats": controls.nats,
        "kind": controls.matched,
    }


def screen(
    model: ScGPT,
    batch: Batch,
    masked: Masks,
    baseline: Values,
    types: Sequence[str] | None = None,
    config: ScreenConfig = ScreenConfig(),
    progress: Progress | None = None,
) -> Screen:
    """Is there an entry that the model cannot live without? The model is left as it was.

    baseline: NLL of the same hidden values by the gene-marginal baseline. types: the cell type of
    each cell, for the probe and for means by type.
    Raises: BadInput for fewer than 8 cells; MissingExtra for types without scikit-learn.
    """
    n = len(batch.cell_names)
    if n < LEAST_CELLS:
        raise BadInput(
            f"{n} cells are too few to choose candidates on some and judge them on others; give at"
            f" least {LEAST_CELLS}."
        )
    order = torch.randperm(n, generator=torch.Generator().manual_seed(config.seed))
    cut = min(max(round(config.probe_share * n), 2), n - 4)
    choose, judge = order[:cut].sort().values, order[cut:].sort().values
    pruned = _pruned(model, batch.of(choose), masked[:1, choose], config.each, progress)
    bench = _Bench(
        model,
        MaskedNLL(model.anatomy, batch.of(judge), masked[:, judge]),
        float(by_cell(baseline[:, judge]).mean()),
        None if types is None else [types[i] for i in judge.tolist()],
        config,
        progress,
    )
    worst = [c.region for c in pruned[: config.verify]]
    tried = [Tried(**vars(candidate)) for candidate in pruned]
    for i, region in enumerate(worst):
        tried[i] = replace(tried[i], verified=bench.verify([region]))
    together = bench.verify(worst) if len(worst) > 1 else None
    checked = None
    if config.controls_check:
        checked = check(model, batch, masked, baseline, types, config, progress)
    verified = [c.verified for c in tried if c.verified] + ([together] if together else [])
    found = [v for v in verified if v.found]
    return Screen(
        verdict="found" if found else "none",
        entries=list(dict.fromkeys(address for v in found for address in v.addresses)),
        candidates=tried,
        together=together,
        controls=max(verified, key=lambda v: v.nats).controls,
        intact_nll=bench.nll.base,
        baseline_nll=bench.baseline,
        lead_nats=bench.lead,
        masked_values=bench.nll.predicted,
        cells={"probe": len(choose), "judge": len(judge)},
        draws=len(masked),
        probe=bench.intact_probe(),
        criteria=config.criteria,
        check=checked,
    )


def worst_candidate(
    model: ScGPT, batch: Batch, masked: Masks, each: int = EACH, progress: Progress | None = None
) -> Region:
    """The candidate whose removal alone costs most on these cells, in one draw of masks; nothing is
    verified.
    """
    return _pruned(model, batch, masked[:1], each, progress)[0].region


def _pruned(
    model: ScGPT, batch: Batch, masked: Masks, each: int, progress: Progress | None
) -> list[Candidate]:
    nll = MaskedNLL(model.anatomy, batch, masked)
    return prune(nll, candidates(nll, screened(nll.anatomy), each), progress)


class _Bench:
    """The judging cells, and all that the verifications share."""

    def __init__(
        self,
        model: ScGPT,
        nll: MaskedNLL,
        baseline: float,
        types: Sequence[str] | None,
        config: ScreenConfig,
        progress: Progress | None,
    ) -> None:
        self.model, self.nll, self.baseline, self.types = model, nll, baseline, types
        self.config, self.progress = config, progress
        self.lead = baseline - nll.base
        probe = None if types is None else Probe(self._states(), types, config.seed)
        self.probe = probe if probe is not None and probe.possible else None

    def verify(self, parts: list[Region]) -> Verified:
        nll, demands = self.nll, self.config.demands(self.lead)
        verification = verify(nll.anatomy, parts, nll, demands, self.progress or silent, 0)
        values = nll.damage(parts)
        cells = by_cell(values)
        names, means, _ = by_gene(values, nll.batch, self.config.least)
        genes = sorted(zip(names, means.tolist(), strict=True), key=lambda gene: -gene[1])
        scores = {}
        if self.probe is not None:
            with injured(nll.anatomy, parts):
                states = self._states()
            scores = {
                "frozen": self.probe.frozen(states),
                "refitted": self.probe.refitted(states),
            }
        return Verified(
            [str(part) for part in parts],
            nats=verification.joint_nats,
            ci95=verification.ci95,
            p_value=verification.p_value,
            collapse_share=verification.joint_nats / self.lead if self.lead > 0 else None,
            controls=control_figures(verification.controls),
            found=verification.vital,
            by_type={} if self.types is None else by_group(cells, self.types),
            by_gene=dict(genes),
            by_cell=dict(zip(nll.batch.cell_names, cells.tolist(), strict=True)),
            probe=scores,
        )

    def intact_probe(self) -> dict[str, float]:
        if self.probe is None:
            return {}
        return {
            **asdict(self.probe.frozen(self._states())),
            "majority": self.probe.majority,
            "types": len(self.probe.names),
            "cells_left_out": self.probe.left_out,
        }

    def _states(self) -> torch.Tensor:
        return embeddings(self.model, self.nll.batch)


def check(
    model: ScGPT,
    batch: Batch,
    masked: Masks,
    baseline: Values,
    types: Sequence[str] | None = None,
    config: ScreenConfig = ScreenConfig(),
    progress: Progress | None = None,
) -> Check:
    """Screen a copy of the model with a planted weight, and one with a rescaled neuron.

    Arguments and errors as `screen` and `plant`.
    """
    config = replace(config, controls_check=False)
    planted, rescaled = plant(model, batch, masked, seed=config.seed), rescale(model, batch)
    first, second = (
        screen(copy, batch, masked, baseline, types, config, progress)
        for copy in (planted.model, rescaled.model)
    )
    ranks = {c.address: i for i, c in enumerate(first.candidates, 1)}
    verified = next((v for v in first.verified if v.addresses == [planted.address]), None)
    found = [Region.parse(address) for address in second.entries]
    must = verified is not None and verified.found
    must_not = any(rescaled.holds(region) for region in found)
    return Check(
        passed=must and not must_not,
        planted={
            **planted.to_json(),
            "found": must,
            "rank": ranks.get(planted.address),
            "verified": None if verified is None else asdict(verified),
        },
        rescaled={
            **rescaled.to_json(),
            "found": must_not,
            "verdict": second.verdict,
            "nats": second.worst.nats,
            "worst": second.worst.addresses,
        },
    )


@dataclass(frozen=True)
class MapCellsConfig:
    """What is mapped, and beside what."""

    at: tuple[str, ...] = setting(
        (), "weights to take out together, or the worst one", metavar="ENTRY"
    )
    plant: bool = setting(False, "map a weight of +0.25 nats, planted in a copy of the model")
    gmt: str | None = setting(
        None, "gene sets: name, description, genes, tab-separated", metavar="FILE"
    )
    min_size: int = setting(EnrichConfig.min_size, "least scored genes in a gene set")
    null: int = setting(MapConfig.null, "arbitrary weights of equal damage; 0 for none")
    condition: str | None = setting(
        None, "column of obs with the condition or stage", metavar="COL"
    )
    donor: str | None = setting(None, "column of obs with the donors of a condition", metavar="COL")
    seed: int = setting(0, "seed of everything random")

    def __post_init__(self) -> None:
        if self.donor is not None and self.condition is None:
            raise BadInput(
                "‹donor› names the replicates of a comparison; name what is compared with"
                " ‹condition›."
            )
        if self.plant and self.at:
            raise BadInput("‹plant› maps the planted weight and ‹at› others; give one of them.")


def map_cells(
    stage: Stage, config: MapCellsConfig = MapCellsConfig(), progress: Progress | None = None
) -> Map:
    """Which genes, cells, cell types and pathways fall with given weights, beside arbitrary weights
    of equal damage.

    Without weights: with the one that a screen would prune to.
    Raises: as `map_damage` and `plant`; BadInput, UnknownSite for weights or columns that are not
    there.
    """
    model, at, planted = stage.model, config.at, None
    sets = None if config.gmt is None else read_gmt(config.gmt)
    compared, replicates = (
        None if name is None else (name, stage.column(name))
        for name in (config.condition, config.donor)
    )
    if config.plant:
        planted = plant(model, stage.batch, stage.masked, seed=config.seed)
        model, at = planted.model, (planted.address,)
    parts = [model.anatomy.region(address) for address in at]
    if not parts:
        parts = [worst_candidate(model, stage.batch, stage.masked, progress=progress)]
    enrich = EnrichConfig(min_size=config.min_size, seed=config.seed)
    settings = MapConfig(null=config.null, enrich=enrich, seed=config.seed)
    cells = (model, stage.batch, stage.masked, parts, sets, stage.types)
    mapped = map_damage(*cells, compared, replicates, settings, progress)
    return replace(
        mapped,
        planted=None if planted is None else planted.to_json(),
        embedding=stage.embedding(mapped.by_cell),
    )
