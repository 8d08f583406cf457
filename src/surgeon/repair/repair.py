"""Repair: heal the broken model with a change of a few entries, and judge it beside a control.

How this works. The text is cut three ways (windows.py): windows to fit the change, windows to
choose its settings, and windows to judge it, which nothing saw before. What may change (target.py)
is by default the injured rows, whole. The change is solved in closed form (graft.py), trained
(distil.py), or trained from the closed form on, and becomes one patch on the injured weights, which
therefore goes on after the injury. The control spends the same effort on as many random other rows:
what it recovers, any place would have. All three states are held against one reference, the intact
model on the judging windows.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

from ..anatomy import Anatomy
from ..corpus import Corpus
from ..errors import SurgeonError
from ..measure import Reference, ThreeStates, mean_nll, perplexity, require_causal
from ..patch import Patch, stacked
from ..patch.file import to_bytes
from ..progress import Tell, silent
from ..result import Result, attached, derived, record, result
from ..settings import values_of
from .config import RepairConfig
from .distil import Distilled, distil
from .graft import GraftChoice, graft
from .run import Look
from .target import Change, Changes, Target, broken, targets, to_patch, write_
from .windows import JUDGE, recut, split


@record
class Divergence:
    """KL(base || state) in nats per token."""

    broken: float
    patched: float


@record
class ControlRepair:
    """The same effort spent on random other rows: the share of the damage it recovers, and the NLL.

    why: why there is none, where there is none.
    """

    recovered: float | None
    nll: float | None = None
    rows: dict[str, list[int]] = field(default_factory=dict)
    why: str | None = None


@record
class HeldOut:
    """The NLL on a second text, or on the judging windows again where there is none."""

    name: str
    second_text: bool
    nll: ThreeStates

    @derived
    def recovered(self) -> float | None:
        return self.nll.recovered


@record
class WindowCounts:
    """How many windows of the text the repair was fitted, chosen and judged on."""

    fitted: int
    chosen_on: int
    judged_on: int


@result("repair")
class RepairResult(Result):
    """A patch that heals, with its measures in nats per token on windows that it never saw.

    target_rows: those that may change, by site. control: None if it was not asked for.
    recovered_fitted: on the windows it was made from. delta_norm, row_norm, cosine_to_row: of the
    change and of the intact rows, as one vector. steps: taken in training, of which `kept_step` is
    the one kept. curve: the looks of the training. graft: what was chosen for each site.
    """

    method: str
    target_rows: dict[str, list[int]]
    windows: WindowCounts
    nll: ThreeStates
    kl: Divergence
    control: ControlRepair | None
    held_out: HeldOut
    recovered_fitted: float | None
    delta_norm: float
    row_norm: float
    cosine_to_row: float
    patch_bytes: int
    seconds: float
    steps: int
    kept_step: int | None
    curve: list[Look]
    graft: dict[str, GraftChoice]
    injury: Patch | None = attached("injury.safetensors")
    patch: Patch | None = attached("repair.safetensors")

    @derived
    def ppl(self) -> ThreeStates:
        nll = self.nll
        return ThreeStates(perplexity(nll.base), perplexity(nll.broken), perplexity(nll.patched))

    @derived
    def recovered(self) -> float:
        return self.nll.recovered or 0.0

    @derived
    def recovered_kl(self) -> float:
        return 1 - self.kl.patched / self.kl.broken

    def rows(self) -> list[dict[str, Any]]:
        """One row."""
        return [
            {
                "nll_base": self.nll.base,
                "nll_broken": self.nll.broken,
                "nll_patched": self.nll.patched,
                "kl_broken": self.kl.broken,
                "kl_patched": self.kl.patched,
                "recovered": self.recovered,
                "control_recovered": None if self.control is None else self.control.recovered,
                "steps_taken": self.steps,
                "delta_norm": self.delta_norm,
                "row_norm": self.row_norm,
                "cosine_to_row": self.cosine_to_row,
            }
        ]


def repair(
    anatomy: Anatomy,
    injury: Patch,
    corpus: Corpus,
    config: RepairConfig = RepairConfig(),
    held_out: Corpus | None = None,
    progress: Tell = silent,
    checkpoint: Path | None = None,
) -> RepairResult:
    """Find a patch that heals the model after `injury`. The model is intact when called, and left
    so.

    The patch is made on the injured tensors: it goes on after `injury`; where it leaves the injured
    entries alone the two come off in any order. held_out: a second text, to judge it on as well.
    checkpoint: file to save the training in, and to go on from.
    Raises: BadInput for too few windows or nothing that may change; SurgeonError if the injury does
    no damage on this text.
    """
    require_causal(anatomy.model)
    case = _Case(anatomy, injury, *split(corpus), corpus.bos, config)
    wanted = targets(
        anatomy, injury, config.rows, config.columns, config.exclude_injured, config.rank
    )
    reference = Reference(anatomy.model, case.judge)
    injured = reference.compare(lambda: injury.applied(anatomy))
    _require_damage(injured.nll - injured.base_nll, corpus)

    began = time.perf_counter()
    healing = _heal(case, wanted, config.method, progress, checkpoint)
    patch = _as_patch(case, healing.changes, corpus)
    seconds = time.perf_counter() - began

    healed = reference.compare(lambda: stacked(anatomy, [injury, patch]))
    nll = ThreeStates(injured.base_nll, injured.nll, healed.nll)
    control = None
    if config.control:
        control = _control(case, wanted, healing.changes, nll, progress, checkpoint)
    second = nll if held_out is None else _nll(case, patch, held_out.windows)
    delta, row = _change_and_row(case, patch, wanted)
    delta_norm, row_norm = float(delta.norm()), float(row.norm())
    both = delta_norm * row_norm
    trained = healing.trained
    return RepairResult(
        method=config.method,
        target_rows=_rows(wanted),
        windows=WindowCounts(len(case.fit), len(case.choose), len(case.judge)),
        nll=nll,
        kl=Divergence(injured.kl, healed.kl),
        control=control,
        held_out=HeldOut((held_out or corpus).name, held_out is not None, second),
        recovered_fitted=_nll(case, patch, case.fit[:JUDGE]).recovered,
        delta_norm=delta_norm,
        row_norm=row_norm,
        cosine_to_row=float(delta @ row) / both if both else 0.0,
        patch_bytes=len(to_bytes(patch)),
        seconds=seconds,
        steps=0 if trained is None else trained.steps,
        kept_step=None if trained is None else trained.kept,
        curve=[] if trained is None else trained.curve,
        graft=healing.grafted,
        injury=injury,
        patch=patch,
    )


@dataclass(frozen=True, eq=False)
class _Case:
    """What the repair and its control have in common: the windows are to fit, choose and judge."""

    anatomy: Anatomy
    injury: Patch
    fit: Tensor
    choose: Tensor
    judge: Tensor
    bos: bool
    config: RepairConfig


@dataclass(frozen=True)
class _Healing:
    """The repaired matrices, and how they came about."""

    changes: Changes
    grafted: dict[str, GraftChoice]
    trained: Distilled | None


def _require_damage(damage: float, corpus: Corpus) -> None:
    if damage <= 0:
        raise SurgeonError(
            f"the injury costs {damage:+.4f} nats per token on {corpus.name}, so there is no damage"
            " to repair."
        )


def _heal(
    case: _Case, wanted: Sequence[Target], method: str, progress: Tell, checkpoint: Path | None
) -> _Healing:
    config = case.config
    changes: Changes = {}
    grafted: dict[str, GraftChoice] = {}
    if "graft" in method:
        solved = graft(
            case.anatomy, case.injury, wanted, case.fit, case.choose, config.graft, config.rank
        )
        changes, grafted = solved.changes, solved.chosen
    if "distil" not in method:
        return _Healing(changes, grafted, None)
    # windows of the evaluation are no longer than the model reads
    short = recut(case.fit, case.bos, min(config.distil.length, case.fit.shape[1]))
    trained = distil(
        case.anatomy,
        case.injury,
        wanted,
        short,
        case.choose,
        config.distil,
        config.rank,
        changes,
        config.seed,
        progress,
        checkpoint,
    )
    return _Healing(trained.changes, grafted, trained)


def _as_patch(case: _Case, changes: Changes, corpus: Corpus) -> Patch:
    """Without a time in it: the same command gives the same bytes."""
    made_by = {
        "operation": "repair",
        "injury": case.injury.digest,
        "corpus": vars(corpus.record()),
        "settings": values_of(case.config),
    }
    with case.injury.applied(case.anatomy):
        return to_patch(case.anatomy, changes, made_by)


def _control(
    case: _Case,
    wanted: Sequence[Target],
    changes: Changes,
    nll: ThreeStates,
    progress: Tell,
    checkpoint: Path | None,
) -> ControlRepair:
    """The same spent on random other rows.

    Training begins from the broken model, which is better than from a graft in a wrong row.
    """
    generator = torch.Generator().manual_seed(case.config.seed)
    drawn = [target.elsewhere(generator) for target in wanted]
    others = [target for target in drawn if target is not None]
    if len(others) < len(wanted):
        return ControlRepair(
            None,
            why="the repair may change more than half of the rows, so there are no other ones to"
            " compare with",
        )
    if case.config.method == "graft":
        elsewhere = _moved(case, wanted, others, changes)
    else:
        file = None if checkpoint is None else checkpoint.with_name(f"{checkpoint.name}.control")

        def tell(what: str, done: int, total: int) -> None:
            progress(what.replace("distil", "control, a random row"), done, total)

        elsewhere = _heal(case, others, "distil", tell, file).changes
    with broken(case.anatomy, case.injury, list(elsewhere)):
        write_(case.anatomy, {site: change.matrix for site, change in elsewhere.items()})
        there = mean_nll(case.anatomy.model, case.judge)
    share = ThreeStates(nll.base, nll.broken, there).recovered
    return ControlRepair(share, there, _rows(others))


def _moved(
    case: _Case, wanted: Sequence[Target], others: Sequence[Target], changes: Changes
) -> Changes:
    """The changes of the target rows, made in other rows."""
    moved = {}
    with broken(case.anatomy, case.injury, [target.site for target in wanted]) as matrices:
        for target, other in zip(wanted, others, strict=True):
            before = matrices[target.site]
            after = before.clone()
            after[other.rows] += changes[target.site].matrix[target.rows] - before[target.rows]
            moved[target.site] = Change(after)
    return moved


def _nll(case: _Case, patch: Patch, windows: Tensor) -> ThreeStates:
    """The NLL of the three states on other windows."""
    states = ((), (case.injury,), (case.injury, patch))
    nlls = []
    for patches in states:
        with stacked(case.anatomy, patches):
            nlls.append(mean_nll(case.anatomy.model, windows))
    return ThreeStates(*nlls)


def _change_and_row(
    case: _Case, patch: Patch, wanted: Sequence[Target]
) -> tuple[Float64[Tensor, " n"], Float64[Tensor, " n"]]:
    """What the repair adds to the target rows, and those rows in the intact model."""

    def rows() -> Tensor:
        read = [case.anatomy.view(t.site).read()[t.rows].double().cpu() for t in wanted]
        return torch.cat([matrix.flatten() for matrix in read])

    intact = rows()
    with case.injury.applied(case.anatomy):
        before = rows()
        with patch.applied(case.anatomy):
            return rows() - before, intact


def _rows(wanted: Sequence[Target]) -> dict[str, list[int]]:
    return {str(target.site): target.rows.tolist() for target in wanted}
