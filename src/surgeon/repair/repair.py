"""Repair: heal the broken model with a change of a few entries, and judge it on text that it never
saw, beside a control.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from math import exp
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from ..anatomy import Anatomy
from ..corpus import Corpus
from ..errors import BadInput, SurgeonError
from ..measure import Reference, mean_nll, require_causal
from ..patch import Patch
from ..patch.file import to_bytes
from .distil import DistilConfig, Progress, distil
from .graft import GraftConfig, graft
from .target import Change, Changes, Target, broken, targets, to_patch, write_

METHODS = ("graft", "distil", "graft+distil")
CHOOSE, JUDGE = 24, 40  # at most so many windows choose among candidates, and judge the result


@dataclass(frozen=True)
class RepairConfig:
    """What may change, and how it is found."""

    method: str = field(
        default="graft+distil",
        metadata={"help": "graft (closed form), distil (training), or graft+distil"},
    )
    exclude_injured: bool = field(
        default=False, metadata={"help": "leave the injured entries as they are"}
    )
    rows: tuple[int, ...] = field(
        default=(), metadata={"help": "output channels that may change; default: the injured ones"}
    )
    columns: tuple[int, ...] = field(
        default=(), metadata={"help": "input neurons that may change; default: all"}
    )
    rank: int = field(
        default=0, metadata={"help": "rank of the change; 0: any, stored entry by entry"}
    )
    seed: int = field(
        default=0, metadata={"help": "seed of the order of the windows, and of the control"}
    )
    control: bool = field(default=True, metadata={"help": "also spend the same on a random row"})
    graft: GraftConfig = field(default_factory=GraftConfig)
    distil: DistilConfig = field(default_factory=DistilConfig)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise BadInput(
                f"the method {self.method!r} of repair is not known; use {', '.join(METHODS)}."
            )
        if self.rank < 0:
            raise BadInput(
                f"a repair of rank {self.rank} does not exist; use 1 or more, or 0 for any."
            )
        if self.method == "graft" and (self.distil.sparse_k or self.distil.l1):
            raise BadInput(
                "a graft is solved for all entries at once; for a sparse repair use the method"
                " distil or graft+distil."
            )

    @classmethod
    def reference(cls) -> RepairConfig:
        """The published experiment on OLMo-1B-0724-hf: the whole row of the super weight, trained
        at a constant rate to the last step.
        """
        training = DistilConfig(
            loss="kl",
            steps=400,
            batch=2,
            length=128,
            lr=1e-3,
            schedule="constant",
            cooldown=0.0,
            weight_decay=0.01,
            patience=0,
        )  # weight decay is PyTorch's default
        return cls(method="distil", distil=training)


@dataclass(frozen=True)
class RepairResult:
    """All measures are in nats per token on `judged`, windows of the text that neither the repair
    nor its settings were made from.

    control: {recovered} of the same spent on random rows; None if it was not asked for. held_out:
    {name, second_text, recovered, nll} on the second text, or on `judged` again where there is
    none. details: how it was made; `fitted` is on the windows it was made from.
    """

    patch: Patch
    nll: dict[str, float]
    kl: dict[str, float]
    steps: int
    seconds: float
    delta_norm: float
    row_norm: float
    cosine_to_row: float
    control: dict[str, Any] | None
    held_out: dict[str, Any]
    details: dict[str, Any]

    @property
    def recovered(self) -> float:
        return recovered(self.nll) or 0.0

    def to_json(self) -> dict[str, Any]:
        return {
            "nll": self.nll,
            "ppl": {name: exp(min(nll, 700.0)) for name, nll in self.nll.items()},
            "kl": self.kl,
            "recovered": self.recovered,
            "recovered_kl": 1 - self.kl["patched"] / self.kl["broken"],
            "steps": self.steps,
            "seconds": self.seconds,
            "patch_bytes": len(to_bytes(self.patch)),
            "cosine_to_row": self.cosine_to_row,
            "delta_norm": self.delta_norm,
            "row_norm": self.row_norm,
            "control": self.control,
            "held_out": self.held_out,
            **self.details,
        }


def repair(
    anatomy: Anatomy,
    injury: Patch,
    corpus: Corpus,
    config: RepairConfig = RepairConfig(),
    held_out: Corpus | None = None,
    progress: Progress | None = None,
    checkpoint: Path | None = None,
) -> RepairResult:
    """Find a patch that heals the model after `injury`. The model is intact when called, and left
    so.

    The patch is made on the injured tensors: it goes on after `injury`; where it leaves the injured
    entries alone the two come off in any order. Of the windows the last are kept to judge it, those
    before them to choose its settings. held_out: a second text, to judge it on as well. checkpoint:
    file to save the training in, and to go on from.
    Raises: BadInput for too few windows or nothing that may change; SurgeonError if the injury does
    no damage on this text.
    """
    require_causal(anatomy.model)
    fit, choose, judge = split(corpus)
    wanted = targets(
        anatomy, injury, config.rows, config.columns, config.exclude_injured, config.rank
    )
    base = {t.site: anatomy.view(t.site).read()[t.rows].double().cpu() for t in wanted}
    nll = {"base": mean_nll(anatomy.model, judge)}
    with injury.applied(anatomy):
        nll["broken"] = mean_nll(anatomy.model, judge)
    if nll["broken"] <= nll["base"]:
        raise SurgeonError(
            f"the injury costs {nll['broken'] - nll['base']:+.4f} nats per token on {corpus.name},"
            " so there is no damage to repair."
        )
    begun = time.perf_counter()
    case = _Case(anatomy, injury, (fit, choose, judge), corpus.bos, config)
    changes, details = _heal(case, wanted, config.method, progress, checkpoint)
    made_by = {
        "operation": "repair",
        "injury": injury.digest,
        "corpus": corpus.to_json(),
        "settings": asdict(config),
    }
    with injury.applied(anatomy):
        patch = to_patch(
            anatomy, changes, made_by
        )  # without a time in it: the same command gives the same bytes
        before = {t.site: anatomy.view(t.site).read()[t.rows].double().cpu() for t in wanted}
    seconds = time.perf_counter() - begun

    @contextmanager
    def healed() -> Iterator[None]:
        with injury.applied(anatomy), patch.applied(anatomy):
            yield

    with healed():
        nll["patched"] = mean_nll(anatomy.model, judge)
        delta = torch.cat(
            [
                (anatomy.view(t.site).read()[t.rows].double().cpu() - before[t.site]).flatten()
                for t in wanted
            ]
        )
    row = torch.cat([base[t.site].flatten() for t in wanted])
    norms = float(delta.norm()), float(row.norm())
    control = _control(case, wanted, changes, nll, progress, checkpoint) if config.control else None
    there = nll if held_out is None else _nlls(anatomy, injury, healed, held_out.windows)
    return RepairResult(
        patch=patch,
        nll=nll,
        kl={
            "broken": Reference(anatomy.model, judge).compare(lambda: injury.applied(anatomy)).kl,
            "patched": Reference(anatomy.model, judge).compare(healed).kl,
        },
        steps=int(details.get("steps", 0)),
        seconds=seconds,
        delta_norm=norms[0],
        row_norm=norms[1],
        cosine_to_row=float(delta @ row) / (norms[0] * norms[1]) if min(norms) > 0 else 0.0,
        control=control,
        held_out={
            "name": (held_out or corpus).name,
            "second_text": held_out is not None,
            "recovered": recovered(there),
            "nll": there,
        },
        details={
            "method": config.method,
            "rows": {str(t.site): t.rows.tolist() for t in wanted},
            "corpus": {
                **corpus.to_json(),
                "fitted": len(fit),
                "chosen_on": len(choose),
                "judged_on": len(judge),
            },
            "fitted": {"recovered": recovered(_nlls(anatomy, injury, healed, fit[:JUDGE]))},
            **details,
        },
    )


def recovered(nll: dict[str, float]) -> float | None:
    """Share of the damage that the patch undoes: 1 - (patched - base) / (broken - base); None where
    there is no damage.
    """
    damage = nll["broken"] - nll["base"]
    return 1 - (nll["patched"] - nll["base"]) / damage if damage > 0 else None


@dataclass(frozen=True, eq=False)
class _Case:
    """What the repair and its control have in common.

    The windows are to fit, to choose and to judge.
    """

    anatomy: Anatomy
    injury: Patch
    windows: tuple[Tensor, Tensor, Tensor]
    bos: bool
    config: RepairConfig


def _heal(
    case: _Case,
    wanted: list[Target],
    method: str,
    progress: Progress | None,
    checkpoint: Path | None,
) -> tuple[Changes, dict[str, Any]]:
    config, (fit, choose, _) = case.config, case.windows
    changes: Changes = {}
    details: dict[str, Any] = {}
    if "graft" in method:
        grafted = graft(case.anatomy, case.injury, wanted, fit, choose, config.graft, config.rank)
        changes, details["graft"] = grafted.changes, grafted.chosen
    if "distil" in method:
        # windows of the evaluation are no longer than the model reads
        short = recut(fit, case.bos, min(config.distil.length, fit.shape[1]))
        trained = distil(
            case.anatomy,
            case.injury,
            wanted,
            short,
            choose,
            config.distil,
            config.rank,
            changes,
            config.seed,
            progress,
            checkpoint,
        )
        changes = trained.changes
        details |= {"steps": trained.steps, "kept_step": trained.kept, "curve": trained.curve}
    return changes, details


def _control(
    case: _Case,
    wanted: list[Target],
    changes: Changes,
    nll: dict[str, float],
    progress: Progress | None,
    checkpoint: Path | None,
) -> dict[str, Any]:
    """The same spent on random other rows.

    Training begins from the broken model, which is better than from a graft in a wrong row.
    """
    generator = torch.Generator().manual_seed(case.config.seed)
    found = [t.elsewhere(generator) for t in wanted]
    others = [t for t in found if t is not None]
    if len(others) < len(wanted):
        return {
            "recovered": None,
            "why": (
                "the repair may change more than half of the rows, so there are no other ones to"
                " compare with"
            ),
        }
    moved: Changes
    if case.config.method == "graft":
        with broken(case.anatomy, case.injury, [t.site for t in wanted]) as matrices:
            moved = {
                t.site: _moved(changes[t.site].matrix, matrices[t.site], t, other)
                for t, other in zip(wanted, others, strict=True)
            }
    else:
        file = None if checkpoint is None else checkpoint.with_name(f"{checkpoint.name}.control")

        def tell(what: str, done: int, total: int) -> None:
            if progress:
                progress(what.replace("distil", "control, a random row"), done, total)

        moved, _ = _heal(case, others, "distil", tell, file)
    with broken(case.anatomy, case.injury, list(moved)):
        write_(case.anatomy, {site: change.matrix for site, change in moved.items()})
        there = mean_nll(case.anatomy.model, case.windows[2])
    return {
        "recovered": recovered({**nll, "patched": there}),
        "nll": there,
        "rows": {str(t.site): t.rows.tolist() for t in others},
    }


def _moved(healed: Tensor, matrix: Tensor, target: Target, other: Target) -> Change:
    """The change of the target's rows, made in the other's rows."""
    after = matrix.clone()
    after[other.rows] += healed[target.rows] - matrix[target.rows]
    return Change(after)


def _nlls(
    anatomy: Anatomy,
    injury: Patch,
    healed: Callable[[], AbstractContextManager[None]],
    windows: Tensor,
) -> dict[str, float]:
    nll = {"base": mean_nll(anatomy.model, windows)}
    with injury.applied(anatomy):
        nll["broken"] = mean_nll(anatomy.model, windows)
    with healed():
        nll["patched"] = mean_nll(anatomy.model, windows)
    return nll


def split(corpus: Corpus) -> tuple[Tensor, Tensor, Tensor]:
    """Windows to fit, to choose and to judge; contiguous, so that few documents are in two of
    them.
    """
    n = len(corpus.windows)
    choose, judge = min(CHOOSE, n // 5), min(JUDGE, n // 4)
    if not choose or not judge:
        raise BadInput(
            f"{corpus.name} has {n} windows, and a repair needs 5: to make it, to choose, to judge;"
            " give more text or a smaller --window."
        )
    fit, chosen, judged = torch.split(corpus.windows, [n - choose - judge, choose, judge])
    return fit, chosen, judged


def recut(windows: Int64[Tensor, "n window"], bos: bool, length: int) -> Int64[Tensor, "m length"]:
    """The same text in windows of `length` tokens, each beginning with BOS if these do; nothing is
    padded.
    """
    head = int(bos)
    tokens, step = windows[:, head:].flatten(), length - head
    if step < 1 or len(tokens) < step:
        raise BadInput(
            f"the text to train on has {len(tokens)} tokens, less than one window of {length}; give"
            " more text."
        )
    rows = tokens[: len(tokens) // step * step].view(-1, step)
    return torch.cat([windows[:1, :head].expand(len(rows), head), rows], 1)
