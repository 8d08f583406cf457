"""Screen: is there a weight this model cannot live without? Candidates by |w·x|, each pruned; the
worst verified against controls.

A finding needs an effect size, the share of what the model knows over the gene-marginal baseline
that is lost, beside significance. "None found" is the expected answer for many of these models, and
comes with the numbers that decided it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..errors import BadInput
from ..measure.bootstrap import interval
from .damage import Damage, Progress, by_cell, by_gene, by_type, cells_of
from .model import ScGPT
from .parts import Part, scaled
from .probe import Probe, ProbeScore
from .spikes import Spike, spikes
from .tokenise import Batch

NOTE = (
    "Hypotheses about the model, not biomarkers: what a model loses without a weight says how the"
    " model computes, not what cells do."
)
NEIGHBOURS = 4  # how many times more entries than controls are considered the nearest in magnitude


@dataclass(frozen=True)
class ScreenConfig:
    """Settings of the screen, and what a finding demands."""

    each: int = field(
        default=4,
        metadata={
            "help": "candidates from every MLP output matrix, LayerNorm scale and LayerNorm shift"
        },
    )
    verify: int = field(
        default=3,
        metadata={"help": "candidates, the most damaging ones, that are verified against controls"},
    )
    controls: int = field(
        default=20, metadata={"help": "matched controls of each verified candidate, at least 20"}
    )
    probe_share: float = field(
        default=0.25,
        metadata={
            "help": "share of the cells on which candidates are chosen; the others judge them"
        },
    )
    min_share: float = field(
        default=0.1,
        metadata={
            "help": (
                "least collapse share: of the lead over the gene-marginal baseline, what is lost"
            )
        },
    )
    min_ratio: float = field(
        default=3.0, metadata={"help": "least damage as a multiple of the worst control's"}
    )
    least: int = field(default=5, metadata={"help": "scored values a gene needs to be named"})
    seed: int = field(
        default=0,
        metadata={
            "help": "seed of the controls, the split of the cells, the probe and the bootstrap"
        },
    )

    def __post_init__(self) -> None:
        if self.controls < 20:
            raise BadInput(
                f"{self.controls} controls cannot show anything at the 5% level; use at least 20."
            )
        if not 0 < self.probe_share < 1 or min(self.each, self.verify, self.least) < 1:
            raise BadInput(
                "a screen needs a probe share between 0 and 1, and at least one candidate, one"
                " verification and one value per gene."
            )


@dataclass(frozen=True)
class Verified:
    """What one candidate, or several together, cost on the judging cells, in nats per masked value,
    beside matched controls.
    """

    addresses: list[str]
    nats: float
    ci95: tuple[float, float]
    p_value: float
    collapse_share: float | None
    controls: list[float]
    control_kind: str
    found: bool
    by_type: dict[str, float]
    by_gene: dict[str, float]
    by_cell: dict[str, float]
    probe: dict[str, ProbeScore]

    def to_json(self) -> dict[str, Any]:
        return {
            "addresses": self.addresses,
            "nats": self.nats,
            "ci95": list(self.ci95),
            "p_value": self.p_value,
            "collapse_share": self.collapse_share,
            "controls": control_summary(self.controls, self.control_kind),
            "found": self.found,
            "by_type": self.by_type,
            "by_gene": self.by_gene,
            "by_cell": self.by_cell,
            "probe": {name: score.to_json() for name, score in self.probe.items()},
        }


@dataclass(frozen=True)
class Screen:
    """The result. pruned: damage of each candidate alone on the probe cells, most damaging first;
    verified: the worst of them, and, last, all of those together where there are several."""

    verdict: str
    intact_nll: float
    baseline_nll: float
    values: int
    cells: dict[str, int]
    draws: int
    pruned: list[tuple[Spike, float]]
    verified: list[Verified]
    probe: dict[str, float]
    config: ScreenConfig

    @property
    def found(self) -> list[Verified]:
        return [v for v in self.verified if v.found]

    @property
    def lead(self) -> float:
        """How much better than the gene-marginal baseline the intact model is, in nats per masked
        value.
        """
        return self.baseline_nll - self.intact_nll

    @property
    def criteria(self) -> str:
        c = self.config
        return (
            f"a finding needs at least {c.min_share:.0%} of the lead over the gene-marginal"
            f" baseline lost, {c.min_ratio:g} times the worst of {c.controls} matched controls, p"
            " <= 0.05 against them, and a 95% interval over cells above 0"
        )

    def to_json(self) -> dict[str, Any]:
        worst = max(self.verified, key=lambda v: v.nats)
        verified = {v.addresses[0]: v.to_json() for v in self.verified if len(v.addresses) == 1}
        together = [v.to_json() for v in self.verified if len(v.addresses) > 1]
        return {
            "verdict": self.verdict,
            "candidates": [
                {
                    "address": s.part.address,
                    "kind": s.kind,
                    "layer": s.part.layer,
                    "weight": s.weight,
                    "write": s.write,
                    "height": s.height,
                    "probe_nats": nats,
                    "verified": verified.get(s.part.address),
                }
                for s, nats in self.pruned
            ],
            "together": together[0] if together else None,
            "controls": control_summary(worst.controls, worst.control_kind),
            "intact_nll": self.intact_nll,
            "baseline_nll": self.baseline_nll,
            "lead_nats": self.lead,
            "masked_values": self.values,
            "cells": self.cells,
            "draws": self.draws,
            "probe": self.probe,
            "criteria": self.criteria,
            "settings": asdict(self.config),
            "note": NOTE,
        }


def screen(
    model: ScGPT,
    batch: Batch,
    masked: Bool[Tensor, "draw cell pos"],
    baseline: Float[Tensor, "draw cell pos"],
    types: Sequence[str] | None = None,
    config: ScreenConfig = ScreenConfig(),
    progress: Progress | None = None,
) -> Screen:
    """Prune every candidate on the probe cells, then verify the worst on the others. The model is
    left as it was.

    batch: cells tokenised once. masked: which values are hidden and scored in each draw. baseline:
    the gene-marginal baseline's NLL of the same values, in nats, NaN elsewhere. types: the cell
    type of each cell, if known.
    Raises: BadInput with fewer than 8 cells.
    """
    if len(batch.cell_names) < 8:
        raise BadInput(
            f"{len(batch.cell_names)} cells are too few to choose candidates on some and judge them"
            " on others; give at least 8."
        )
    choose, judge = _split(len(batch.cell_names), config)
    candidates = spikes(model, cells_of(batch, choose), config.each)
    tick = _Tick(
        progress,
        len(candidates)
        + min(config.verify, len(candidates)) * (config.controls + 1)
        + config.controls
        + 1,
    )
    pruned = _prune(model, cells_of(batch, choose), masked[:1, choose], candidates, tick)

    damage = Damage(model, cells_of(batch, judge), masked[:, judge])
    lead = float(by_cell(baseline[:, judge] - damage.intact).nanmean())
    judged = [types[i] for i in judge.tolist()] if types is not None else None
    probe = (
        Probe(embeddings(model, damage.batch), judged, config.seed) if judged is not None else None
    )
    bench = _Bench(
        damage, lead, judged, probe if probe is not None and probe.possible else None, config, tick
    )
    worst = [spike.part for spike, _ in pruned[: config.verify]]
    generator = torch.Generator().manual_seed(config.seed)
    sets = [matched(model, part, config.controls, worst, generator) for part in worst]
    verified = [
        bench.verify([part], [[c] for c in controls])
        for part, controls in zip(worst, sets, strict=True)
    ]
    if len(worst) > 1:
        verified.append(bench.verify(worst, [list(row) for row in zip(*sets, strict=True)]))
    return Screen(
        verdict="found" if any(v.found for v in verified) else "none",
        intact_nll=damage.base,
        baseline_nll=damage.base + lead,
        values=int(damage.masked.sum()),
        cells={"probe": len(choose), "judge": len(judge)},
        draws=len(masked),
        pruned=pruned,
        verified=verified,
        probe=_probe_summary(bench),
        config=config,
    )


def worst_candidate(
    model: ScGPT,
    batch: Batch,
    masked: Bool[Tensor, "draw cell pos"],
    each: int = ScreenConfig.each,
    progress: Progress | None = None,
) -> Part:
    """The candidate whose removal alone costs most on these cells, in one draw of masks; nothing is
    verified.
    """
    candidates = spikes(model, batch, each)
    pruned = _prune(model, batch, masked[:1], candidates, _Tick(progress, len(candidates)))
    return pruned[0][0].part


def _prune(
    model: ScGPT, batch: Batch, masked: Tensor, candidates: Sequence[Spike], tick: _Tick
) -> list[tuple[Spike, float]]:
    """Each candidate with its damage alone, most damaging first."""
    damage = Damage(model, batch, masked)
    pruned = [
        (spike, tick(float(by_cell(damage.of([spike.part])).nanmean()))) for spike in candidates
    ]
    return sorted(pruned, key=lambda item: (-item[1], item[0].part.address))


def matched(
    model: ScGPT, part: Part, n: int, taken: Sequence[Part], generator: torch.Generator
) -> list[Part]:
    """`n` entries of the same matrix or LayerNorm vector, near in |w|, none of them in `taken`;
    some twice where there are too few.
    """
    stored = model.get_parameter(part.parameter).detach()
    distance = (stored.abs() - stored[part.index].abs()).abs()
    for other in taken:
        if other.parameter == part.parameter:
            distance[other.index] = float("inf")
    near = (
        distance.flatten()
        .topk(min(NEIGHBOURS * n, int(distance.isfinite().sum())), largest=False)
        .indices
    )
    picks = near[torch.randperm(len(near), generator=generator)[torch.arange(n) % len(near)]]
    found = []
    for flat in picks.tolist():
        index = divmod(flat, stored.shape[1]) if stored.dim() == 2 else (flat,)
        address = f"{part.address.partition('[')[0]}[{', '.join(map(str, index))}]"
        found.append(Part(address, part.parameter, tuple(index), part.layer))
    return found


@torch.no_grad()
def embeddings(model: ScGPT, batch: Batch) -> Float[Tensor, "cell d_model"]:
    """The state of each cell at <cls>, the first position, with nothing masked."""
    pieces = [cells_of(batch, slice(at, at + 16)) for at in range(0, len(batch.cell_names), 16)]
    return torch.cat([model(p.genes, p.values, p.padding).states[:, 0] for p in pieces])


def control_summary(nats: Sequence[float], kind: str) -> dict[str, Any]:
    """Damage of the controls as every document has it."""
    middle = float(torch.tensor(nats, dtype=torch.float64).quantile(0.5))
    return {
        "n": len(nats),
        "max_nats": max(nats),
        "median_nats": middle,
        "nats": list(nats),
        "kind": kind,
    }


class _Tick:
    """Counts measurements and hands them through."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def __call__(self, value: Any) -> Any:
        self.done += 1
        if self.progress:
            self.progress("screen", self.done, max(self.total, self.done))
        return value


@dataclass(frozen=True)
class _Bench:
    """What every verification shares."""

    damage: Damage
    lead: float
    types: list[str] | None
    probe: Probe | None
    config: ScreenConfig
    tick: _Tick

    def verify(self, parts: Sequence[Part], controls: Sequence[Sequence[Part]]) -> Verified:
        c = self.config
        values = self.tick(self.damage.of(parts))
        cells = by_cell(values)
        cells = cells[~cells.isnan()]
        nats = float(cells.mean())
        chance = [
            float(by_cell(self.tick(self.damage.of(control))).nanmean()) for control in controls
        ]
        low, high = interval(cells, c.seed)
        p = (1 + sum(n >= nats for n in chance)) / (1 + len(chance))
        # a model that is no better than the baseline knows nothing that it could lose
        share = nats / self.lead if self.lead > 0 else None
        large = (
            share is not None
            and share >= c.min_share
            and nats >= c.min_ratio * max(max(chance), 0.0)
        )
        names, means, _ = by_gene(values, self.damage.batch, c.least)
        return Verified(
            [p.address for p in parts],
            nats,
            (low, high),
            p,
            share,
            chance,
            _kind(parts),
            large and low > 0 and p <= 0.05,
            by_type(by_cell(values), self.types) if self.types is not None else {},
            {
                names[i]: float(means[i])
                for i in means.argsort(descending=True, stable=True).tolist()
            },
            {
                name: v
                for name, v in zip(
                    self.damage.batch.cell_names, by_cell(values).tolist(), strict=True
                )
                if v == v
            },
            self._probe(parts),
        )

    def _probe(self, parts: Sequence[Part]) -> dict[str, ProbeScore]:
        if self.probe is None:
            return {}
        with scaled(self.damage.model, parts):
            states = embeddings(self.damage.model, self.damage.batch)
        return {"frozen": self.probe.frozen(states), "refitted": self.probe.refitted(states)}


def _probe_summary(bench: _Bench) -> dict[str, float]:
    if bench.probe is None:
        return {}
    intact = bench.probe.frozen(embeddings(bench.damage.model, bench.damage.batch))
    return {
        **intact.to_json(),
        "majority": bench.probe.majority,
        "types": len(bench.probe.names),
        "cells_left_out": bench.probe.left_out,
    }


def _kind(parts: Sequence[Part]) -> str:
    if len(parts) > 1:
        return "one matched control of each, together"
    norm = ".scale[" in parts[0].address or ".shift[" in parts[0].address
    return (
        "entries of the same LayerNorm vector, near in |w|"
        if norm
        else "entries of the same matrix, near in |w|"
    )


def _split(n: int, config: ScreenConfig) -> tuple[Tensor, Tensor]:
    """Cells to choose candidates on, and cells to judge them on; both in order."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(config.seed))
    first = min(max(round(config.probe_share * n), 2), n - 4)
    return order[:first].sort().values, order[first:].sort().values
