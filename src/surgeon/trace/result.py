"""What a trace is outside the operation: means over the samples, with their intervals."""

from __future__ import annotations

from typing import Any

from ..result import Result, record, result
from .config import TRACED

Interval = tuple[float, float]
Grid = list[list[float]]  # [layer][token]


@record
class Corruption:
    """How the subject was corrupted. kind: "noise" or "replace". sigma: of the noise, absolute, and
    what it was measured on; noise: in standard deviations. words: what took the subject's place.
    """

    kind: str
    sigma: float
    sigma_of: str
    noise: float | None
    words: str | None
    samples: int
    seed: int


@record
class RestoredSite:
    """A site that was restored, and the metric with it."""

    layer: int
    position: int
    token: str
    value: float


@record
class TraceIntervals:
    """Intervals of the means, in the same places; None where there is only one sample."""

    method: str | None
    p_corrupt: Interval | None
    state: list[list[Interval]] | None = None
    mlp: list[list[Interval]] | None = None
    attn: list[list[Interval]] | None = None
    severed: list[list[Interval]] | None = None


@result("trace")
class TraceResult(Result):
    """The metric of one answer with one site restored, [layer][token], mean over the samples.

    subject_range: the subject is tokens[a:b]. p_clean, p_corrupt: the metric of the clean run, and
    with the subject corrupted and nothing restored. state, mlp, attn, severed: what was traced, the
    others None. best: the sites that bring most back. window: layers of MLP or attention restored
    together.
    """

    prompt: str
    tokens: list[str]
    bos: bool
    subject_range: tuple[int, int]
    answer: str
    versus: str | None
    metric: str
    p_clean: float
    p_corrupt: float
    state: Grid | None
    mlp: Grid | None
    attn: Grid | None
    severed: Grid | None
    ci: TraceIntervals
    best: dict[str, list[RestoredSite]]
    corruption: Corruption
    window: int
    sever: str | None
    warnings: list[str]

    @property
    def effects(self) -> dict[str, Grid]:
        """What was traced, by kind."""
        return _traced(self)

    def rows(self) -> list[dict[str, object]]:
        return [
            {"restored": kind, "layer": layer, "token": token, "position": i, "value": row[i]}
            for kind, grid in self.effects.items()
            for layer, row in enumerate(grid)
            for i, token in enumerate(self.tokens)
        ]


@record
class LayerEffect:
    """The effect of a layer's MLP at the subject's last token."""

    layer: int
    effect: float
    ci95: Interval


@record
class AverageIntervals:
    """Intervals of the means, in the same places; None where no prompt has the place."""

    method: str
    p_clean: Interval
    p_corrupt: Interval
    state: list[list[Interval | None]] | None = None
    mlp: list[list[Interval | None]] | None = None
    attn: list[list[Interval | None]] | None = None
    severed: list[list[Interval | None]] | None = None


@result("trace average")
class TraceAverage(Result):
    """Mean indirect effects over the facts that a model knows, [layer][place]: the metric with one
    site restored, less that of the corrupted run; None where no prompt has such a place.

    facts: how many were traced; skipped: those it does not know. facts_with_place: in how many
    prompts each place is. layers_by_mlp: layers by the effect of their MLP at the subject's last
    token, most first.
    """

    facts: int
    skipped: int
    metric: str
    p_clean: float
    p_corrupt: float
    places: list[str]
    facts_with_place: list[int]
    state: list[list[float | None]] | None
    mlp: list[list[float | None]] | None
    attn: list[list[float | None]] | None
    severed: list[list[float | None]] | None
    ci: AverageIntervals
    layers_by_mlp: list[LayerEffect] | None
    corruption: Corruption
    window: int
    sever: str | None
    warnings: list[str]

    @property
    def effects(self) -> dict[str, list[list[float | None]]]:
        """What was traced, by kind."""
        return _traced(self)

    def rows(self) -> list[dict[str, object]]:
        return [
            {"restored": kind, "layer": layer, "place": place, "effect": row[i]}
            for kind, grid in self.effects.items()
            for layer, row in enumerate(grid)
            for i, place in enumerate(self.places)
        ]


def _traced(one: Any) -> dict[str, Any]:
    grids = {kind: getattr(one, kind) for kind in TRACED}
    return {kind: grid for kind, grid in grids.items() if grid is not None}


def by_kind(grids: dict[str, Any]) -> dict[str, Any]:
    """The grids by kind; None for the kinds that were not traced."""
    return {kind: grids.get(kind) for kind in TRACED}
