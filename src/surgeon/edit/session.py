"""Edits one after the other, with guard rails: do earlier ones hold, how far has the matrix moved,
does unrelated text suffer.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from ..errors import BadInput, SurgeonError
from ..facts import Fact
from ..measure import continuations, mean_nll
from ..patch import Patch, compose
from .covariance import Progress
from .edit import Edit, EditConfig, edit
from .prepare import Preparation


@dataclass(frozen=True)
class SessionConfig:
    """The guard rails of a session.

    The first one that an edit breaks ends it, and that edit is taken back.
    """

    nll_rise: float = field(
        default=0.1,
        metadata={"help": "tripwire: most nats that the NLL of unrelated text may rise"},
    )
    norm: float = field(
        default=5.0,
        metadata={
            "help": "budget: largest norm of all changes of a matrix together, relative to its own"
        },
    )
    kept: float = field(
        default=0.5, metadata={"help": "least share of earlier edits that must still hold"}
    )

    def __post_init__(self) -> None:
        if self.nll_rise <= 0 or self.norm <= 0 or not 0 <= self.kept <= 1:
            raise BadInput(
                "the guard rails need a rise and a norm above 0, and a share between 0 and 1."
            )


DEFAULTS = EditConfig()
RAILS = SessionConfig()


@dataclass(frozen=True)
class Step:
    """One edit of a session, as the model stood after it.

    earlier_kept: of the edits before it, how many still hold.
    """

    fact: Fact
    holds: bool
    earlier_kept: int
    nll: float
    norm: float
    relative_damage: float

    def to_json(self) -> dict[str, Any]:
        return {
            "prompt": self.fact.text,
            "target": self.fact.target,
            **{k: v for k, v in vars(self).items() if k != "fact"},
        }


@dataclass(frozen=True, eq=False)
class Session:
    """edits: those that stayed; steps: also the one that was taken back, if `stopped` says why.

    patch: all that stayed.
    """

    patch: Patch
    edits: list[Edit]
    steps: list[Step]
    stopped: str | None

    def to_json(self) -> dict[str, Any]:
        return {
            "kept_edits": len(self.edits),
            "stopped": self.stopped,
            "steps": [s.to_json() for s in self.steps],
        }


def session(
    preparation: Preparation,
    facts: Sequence[Fact],
    windows: Int64[Tensor, "n window"],
    config: EditConfig = DEFAULTS,
    rails: SessionConfig = RAILS,
    progress: Progress | None = None,
) -> Session:
    """Edit fact after fact, each on the model with those before it; the model itself is left as it
    was.

    windows: unrelated text for the tripwire. The covariance stays that of the intact model, whose
    keys are to be kept.
    Raises: as `edit`; SurgeonError if the very first edit breaks a guard rail.
    """
    anatomy, tokenizer, bos = preparation.anatomy, preparation.tokenizer, preparation.config.bos
    start_nll = mean_nll(anatomy.model, windows)
    edits: list[Edit] = []
    steps: list[Step] = []
    stopped = None
    before: dict[str, Tensor] = {}
    with ExitStack() as applied:
        for number, fact in enumerate(facts):
            made = edit(preparation, [fact], config)
            for site in made.patch.sites:
                before.setdefault(str(site), anatomy.view(site).read().clone())
            with ExitStack() as trial:
                trial.enter_context(made.patch.applied(anatomy))
                asked = [(f.text, str(f.target)) for f in facts[: number + 1]]
                says = [ok for _, ok in continuations(anatomy.model, tokenizer, asked, bos)]
                norm = max(
                    float((anatomy.view(s).read() - old).float().norm() / old.float().norm())
                    for s, old in before.items()
                )
                nll = mean_nll(anatomy.model, windows)
                steps.append(
                    Step(
                        fact,
                        says[-1],
                        sum(says[:-1]),
                        nll,
                        norm,
                        max(f.relative_damage for f in made.layers),
                    )
                )
                stopped = _broken(rails, steps[-1], nll - start_nll, number)
                if stopped is None:
                    applied.enter_context(trial.pop_all())
                    edits.append(made)
            if progress:
                progress("edits", number + 1, len(facts))
            if stopped is not None:
                break
    if not edits:
        raise SurgeonError(
            f"the first edit was taken back: {stopped}; try another --layer or --method, or wider"
            " guard rails."
        )
    whole = reduce(compose, [e.patch for e in edits])
    done = [[s.fact.prompt, s.fact.subject, s.fact.target] for s in steps[: len(edits)]]
    made_by = {"operation": "edit", "method": config.method, "session": True, "facts": done}
    return Session(
        replace(whole, made_by={"surgeon": whole.made_by["surgeon"], **made_by}),
        edits,
        steps,
        stopped,
    )


def _broken(rails: SessionConfig, step: Step, rise: float, earlier: int) -> str | None:
    if not torch.isfinite(torch.tensor(rise)) or rise > rails.nll_rise:
        return (
            f"edit {earlier + 1} ({step.fact.text!r}) raised the NLL of unrelated text to"
            f" {rise:+.3f} nats, over {rails.nll_rise:g}"
        )
    if step.norm > rails.norm:
        return (
            f"edit {earlier + 1} ({step.fact.text!r}) moved the matrix by {step.norm:.2f} of its"
            f" norm, over {rails.norm:g}"
        )
    if earlier and step.earlier_kept < rails.kept * earlier:
        return (
            f"after edit {earlier + 1} ({step.fact.text!r}) only {step.earlier_kept} of {earlier}"
            " earlier edits held"
        )
    return None
