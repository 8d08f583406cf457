"""Edits one after the other, with guard rails: do earlier ones hold, how far has the matrix moved,
does unrelated text suffer.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import reduce
from math import isfinite

from jaxtyping import Int64
from torch import Tensor

from ..anatomy import Anatomy, Site
from ..errors import Refused, SurgeonError
from ..facts import Fact
from ..measure import continuations, mean_nll
from ..patch import Patch, compose
from ..progress import Tell, silent
from ..result import record
from ..settings import setting
from .config import DEFAULTS, EditConfig
from .edit import Edit, edit
from .preflight import REFUSE
from .prepare import Preparation
from .rome import UnusableKey


@dataclass(frozen=True)
class SessionConfig:
    """The guard rails of a session.

    The first one that an edit breaks ends it, and that edit is taken back.
    """

    max_nll_rise: float = setting(
        0.1, "most nats that the NLL of unrelated text may rise", above=0, group="Limits"
    )
    max_norm: float = setting(
        5.0,
        "largest norm of all changes of a matrix together, relative to its own",
        above=0,
        group="Limits",
    )
    min_kept: float = setting(
        0.5, "least share of earlier edits that must still hold", low=0, high=1, group="Limits"
    )
    force: bool = setting(False, "also make edits whose forecast says refuse", group="Limits")


RAILS = SessionConfig()


@record
class Step:
    """One edit of a session, as the model stood after it.

    earlier_kept: of the edits before it, how many still hold. norm: of all changes of a matrix so
    far, relative to the intact matrix's. relative_damage: as this edit was foreseen.
    """

    prompt: str
    target: str
    holds: bool
    earlier_kept: int
    nll: float
    norm: float
    relative_damage: float


@dataclass(frozen=True, eq=False)
class Session:
    """edits: those that stayed; steps: also the one that was taken back, if `stopped` says why.

    patch: all that stayed.
    """

    patch: Patch
    edits: list[Edit]
    steps: list[Step]
    stopped: str | None


def session(
    preparation: Preparation,
    facts: Sequence[Fact],
    windows: Int64[Tensor, "n window"],
    config: EditConfig = DEFAULTS,
    rails: SessionConfig = RAILS,
    progress: Tell = silent,
) -> Session:
    """Edit fact after fact, each on the model with those before it; the model itself is left as it
    was.

    windows: unrelated text for the guard rail on its NLL. The covariance stays that of the intact
    model, whose keys are to be kept.
    Raises: as `edit`; SurgeonError if the very first edit breaks a guard rail, Refused if that is
    its forecast.
    """
    anatomy = preparation.anatomy
    watch = _Watch(preparation, windows)
    edits: list[Edit] = []
    steps: list[Step] = []
    stopped = None
    with ExitStack() as applied:
        for number, fact in enumerate(facts):
            try:
                latest = edit(preparation, [fact], config)
            except UnusableKey as error:
                stopped = f"edit {number + 1} ({fact.text!r}) could not be made: {error}"
                break
            watch.remember(latest.patch.sites)
            with ExitStack() as trial:
                trial.enter_context(latest.patch.applied(anatomy))
                steps.append(watch.step(facts[: number + 1], latest))
                stopped = _broken(rails, steps[-1], watch.start_nll, number)
                if stopped is None:
                    applied.enter_context(trial.pop_all())
                    edits.append(latest)
            progress("edits", number + 1, len(facts))
            if stopped is not None:
                break
    if not edits:
        raise _nothing(stopped, steps, rails)
    return Session(_whole(edits, facts, config), edits, steps, stopped)


class _Watch:
    """What the guard rails look at."""

    def __init__(self, preparation: Preparation, windows: Tensor) -> None:
        self.anatomy: Anatomy = preparation.anatomy
        self.tokenizer, self.bos = preparation.tokenizer, preparation.config.bos
        self.windows = windows
        self.start_nll = mean_nll(self.anatomy.model, windows)
        self.intact: dict[Site, Tensor] = {}

    def remember(self, sites: Sequence[Site]) -> None:
        """Keep the matrices of these sites, where no edit changed them before."""
        for site in sites:
            if site not in self.intact:
                self.intact[site] = self.anatomy.view(site).read().clone()

    def step(self, facts: Sequence[Fact], latest: Edit) -> Step:
        """The model as it stands now, after the edit of the last of these facts."""
        asked = [(fact.text, str(fact.target)) for fact in facts]
        answers = continuations(self.anatomy.model, self.tokenizer, asked, self.bos)
        *earlier, holds = [says for _, says in answers]
        return Step(
            facts[-1].text,
            str(facts[-1].target),
            holds,
            sum(earlier),
            mean_nll(self.anatomy.model, self.windows),
            max(self._moved(site) for site in self.intact),
            latest.preflight.relative_damage,
        )

    def _moved(self, site: Site) -> float:
        old = self.intact[site]
        moved = self.anatomy.view(site).read() - old
        return float(moved.float().norm() / old.float().norm())


def _broken(rails: SessionConfig, step: Step, start_nll: float, earlier: int) -> str | None:
    """The guard rail that an edit broke, as a sentence."""
    name, rise = f"edit {earlier + 1} ({step.prompt!r})", step.nll - start_nll
    if step.relative_damage >= REFUSE and not rails.force:
        return (
            f"the forecast of {name} was refuse: its layer's output changes by"
            f" {step.relative_damage:.0%} on ordinary text, over {REFUSE:.0%}"
        )
    if not isfinite(rise) or rise > rails.max_nll_rise:
        return (
            f"{name} raised the NLL of unrelated text to {rise:+.3f} nats, over"
            f" {rails.max_nll_rise:g}"
        )
    if step.norm > rails.max_norm:
        return f"{name} moved the matrix by {step.norm:.2f} of its norm, over {rails.max_norm:g}"
    if earlier and step.earlier_kept < rails.min_kept * earlier:
        return f"after {name} only {step.earlier_kept} of {earlier} earlier edits held"
    return None


def _nothing(stopped: str | None, steps: Sequence[Step], rails: SessionConfig) -> SurgeonError:
    """The error of a session whose first edit did not stay."""
    refused = bool(steps) and steps[0].relative_damage >= REFUSE and not rails.force
    kind = Refused if refused else SurgeonError
    return kind(
        f"the first edit was taken back: {stopped}; try other ‹layers› or another ‹method›, or"
        " wider guard rails."
    )


def _whole(edits: Sequence[Edit], facts: Sequence[Fact], config: EditConfig) -> Patch:
    """The edits that stayed as one patch."""
    whole = reduce(compose, [one.patch for one in edits])
    kept = [[fact.prompt, fact.subject, fact.target] for fact in facts[: len(edits)]]
    made_by = {
        "surgeon": whole.made_by["surgeon"],
        "operation": "edit",
        "method": config.method,
        "session": True,
        "facts": kept,
    }
    return replace(whole, made_by=made_by)
