"""Where a repair points: its rows beside the rows they came from, how many entries it really uses,
and how few would do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float64
from torch import Tensor

from ..anatomy import Anatomy, Entry, Region, Site
from ..corpus import Corpus
from ..errors import BadInput
from ..measure import ThreeStates
from ..measure.likelihood import ResumedNLL, require_causal
from ..patch import Patch, stacked
from ..patch.deltas import differ
from ..progress import Tell, silent
from ..result import record
from ..settings import setting
from .states import require_stack, states

Matrices = dict[Site, Tensor]


@dataclass(frozen=True)
class GeometryConfig:
    """Settings of the geometry and of the top-k curve."""

    lines: int = setting(
        8, "rows (or columns) described, largest change first", low=1, group="Geometry"
    )
    entries: int = setting(10, "entries listed of each row", low=1, group="Geometry")
    draws: int = setting(
        3, "random choices beside each point of the top-k curve", low=1, group="Geometry"
    )


@record
class EntryChange:
    """One entry of a line in its states, and its rank (1 = largest) among the |delta| of the line,
    None where the last patches left it alone.
    """

    entry: Entry
    base: float
    broken: float
    delta: float
    merged: float
    rank: int | None


@record
class Line:
    """One row (or column) in its states; norms are Euclidean, in units of the weights.

    delta is what the last patches add: merged minus broken, or for a lone injury broken minus base.
    cosines: of the pairs named. top: the delta's largest entries. ablated: the injured entries,
    largest injury first; `injured` counts all of them. participation: (sum d^2)^2 / sum d^4.
    entropy: exp of the entropy of d^2 / sum d^2. Both count entries: 1 for a single one.
    """

    region: Region
    norms: dict[str, float]
    cosines: dict[str, float]
    participation: float
    entropy: float
    changed: int
    top: list[EntryChange]
    ablated: list[EntryChange]
    injured: int


@record
class CurvePoint:
    """Share of the damage recovered by k entries: the largest, random ones (mean and range of
    several draws), or trained as such.
    """

    k: int
    largest: float | None = None
    random: float | None = None
    random_range: tuple[float, float] | None = None
    trained: float | None = None


@record
class Curve:
    """NLL in nats per token, and the points by k."""

    nll: ThreeStates
    tokens: int
    points: list[CurvePoint]


@record
class Geometry:
    """`lines` is the number listed of `of` that changed."""

    lines: list[Line]
    of: int


def geometry(
    anatomy: Anatomy, patches: Sequence[Patch], config: GeometryConfig = GeometryConfig()
) -> Geometry:
    """Describe the rows that the patches change, in matrices where they change fewer columns than
    rows, the columns.

    Raises: BadInput without patches, or if they change no entry; as `Patch.apply_` if they do not
    stack.
    """
    matrices = _matrices(anatomy, patches)
    lines = []
    for site, base in matrices["base"].items():
        broken, merged = matrices["broken"][site], matrices["merged"][site]
        changed = differ(base, broken) | differ(broken, merged)
        by_row = int(changed.any(1).sum()) <= int(changed.any(0).sum())
        for i in changed.any(1 if by_row else 0).nonzero().flatten().tolist():
            region = Region(site, i, None) if by_row else Region(site, None, i)
            states_of = [(m[i] if by_row else m[:, i]).double() for m in (base, broken, merged)]
            # of a lone injury, which is all that was merged, the change is the injury itself
            before, after = states_of[-2:] if len(patches) > 1 else states_of[:2]
            lines.append((region, states_of, after - before))
    if not lines:
        raise BadInput(
            "the patches change no entry of any row or column, so they have no geometry."
        )
    lines.sort(key=lambda line: -float(line[2].norm()))
    listed = [_line(*line, config.entries) for line in lines[: config.lines]]
    return Geometry(listed, len(lines))


def topk_curve(
    anatomy: Anatomy,
    patches: Sequence[Patch],
    corpus: Corpus,
    trained: Sequence[tuple[int, Patch]] = (),
    config: GeometryConfig = GeometryConfig(),
    seed: int = 0,
    progress: Tell = silent,
) -> Curve:
    """The last patch cut to its k largest |delta| entries, k = 1, 2, 4, ... all; beside it k random
    ones of its entries, and `trained`: patches made with k entries, each put in the place of the
    last patch. The model is left as it was.

    Raises: BadInput for fewer than two patches, if the last changes nothing, or if the injury does
    no damage here; as `Patch.apply_`.
    """
    if len(patches) < 2:
        raise BadInput(
            "a top-k curve needs an injury and a repair; give two patches, the injury first."
        )
    require_causal(anatomy.model)
    cut = _Cut(anatomy, patches, [patch for _, patch in trained], corpus)
    generator = torch.Generator().manual_seed(seed)
    sizes = _doubling(len(cut.entries))
    points: dict[int, CurvePoint] = {}
    with stacked(anatomy, patches[:-1]):
        for done, k in enumerate(sizes, 1):
            points[k] = _point(cut, k, config.draws, generator)
            progress("top-k curve", done, len(sizes))
        for k, patch in trained:
            with patch.applied(anatomy):
                points[k] = replace(points.get(k, CurvePoint(k)), trained=cut.recovered())
    with stacked(anatomy, patches):
        patched = cut.nll()
    by_size = [points[k] for k in sorted(points)]
    return Curve(ThreeStates(cut.base, cut.broken, patched), corpus.predicted, by_size)


class _Cut:
    """The last patch cut to some of its entries, and the share of the damage that comes back.

    entries: all that it changes; order: their indices, largest |delta| first. base, broken: the NLL
    of these states.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        patches: Sequence[Patch],
        trained: Sequence[Patch],
        corpus: Corpus,
    ) -> None:
        matrices = _matrices(anatomy, patches)
        self.anatomy, self.below, self.merged = anatomy, matrices["below"], matrices["merged"]
        self.entries = _changed(self.below, self.merged)
        if not self.entries:
            raise BadInput("the last patch changes no entry, so there is no top-k curve.")
        self.order = self._by_size()
        layers = [site.layer or 0 for patch in [*patches, *trained] for site in patch.sites]
        self._nll = ResumedNLL(anatomy.model, anatomy.layers, min(layers), corpus.windows)
        self.base = self.nll()
        with stacked(anatomy, patches[:1]):
            self.broken = self.nll()
        if self.broken <= self.base:
            raise BadInput(
                f"the injury does no damage on {corpus.name} ({self.broken - self.base:+.4f} nats),"
                " so no share of it can be recovered."
            )

    def _by_size(self) -> list[int]:
        sizes = [
            (self.merged[site][row, col].double() - self.below[site][row, col].double()).abs()
            for site, row, col in self.entries
        ]
        return torch.stack(sizes).argsort(descending=True, stable=True).tolist()

    def nll(self) -> float:
        """Of the model as it stands."""
        return float(self._nll().mean())

    def recovered(self) -> float:
        """The share of the damage that is undone in the model as it stands."""
        share = ThreeStates(self.base, self.broken, self.nll()).recovered
        assert share is not None  # there is damage
        return share

    def kept(self, chosen: Sequence[int]) -> float:
        """The share that these entries of the last patch recover, put on what lies below it."""
        matrices = {site: matrix.clone() for site, matrix in self.below.items()}
        for site, row, col in (self.entries[i] for i in chosen):
            matrices[site][row, col] = self.merged[site][row, col]
        with Patch.from_matrix(self.anatomy, matrices).applied(self.anatomy):
            return self.recovered()


def _changed(below: Matrices, merged: Matrices) -> list[tuple[Site, int, int]]:
    """The entries in which two states differ: site, row and column."""
    return [
        (site, row, col)
        for site in below
        for row, col in differ(below[site], merged[site]).nonzero().tolist()
    ]


def _doubling(size: int) -> list[int]:
    """1, 2, 4, ... and `size` itself."""
    return [*(2**i for i in range((size - 1).bit_length())), size]


def _point(cut: _Cut, k: int, draws: int, generator: torch.Generator) -> CurvePoint:
    """The k largest entries beside k random ones; all of them leave nothing to choose."""
    n, largest = len(cut.entries), cut.kept(cut.order[:k])
    if k == n:
        return CurvePoint(k, largest)
    shares = [cut.kept(torch.randperm(n, generator=generator)[:k].tolist()) for _ in range(draws)]
    return CurvePoint(k, largest, sum(shares) / draws, (min(shares), max(shares)))


def participation(delta: Float64[Tensor, " n"]) -> tuple[float, float]:
    """Effective number of entries: participation ratio (sum d^2)^2 / sum d^4, and exp of the
    entropy of d^2 / sum d^2. 0 for none.
    """
    share = delta.square()
    if not bool(share.any()):
        return 0.0, 0.0
    share = share / share.sum()
    return float(1 / share.square().sum()), float(torch.special.entr(share).sum().exp())


def _matrices(anatomy: Anatomy, patches: Sequence[Patch]) -> dict[str, Matrices]:
    """The changed matrices (out, in), on the CPU, in each state; "below" is what the last patch was
    put on.
    """
    require_stack(anatomy, patches)
    sites = list(dict.fromkeys(site for patch in patches for site in patch.sites))

    def read(some: Sequence[Patch]) -> Matrices:
        with stacked(anatomy, some):
            return {site: anatomy.view(site).read().to("cpu", copy=True) for site in sites}

    named = states(patches)
    merged = named.get("patched", named["broken"])
    return {
        "base": read(()),
        "broken": read(named["broken"]),
        "below": read(merged[:-1]),
        "merged": read(merged),
    }


def _line(
    region: Region, rows: Sequence[Float64[Tensor, " n"]], delta: Float64[Tensor, " n"], top: int
) -> Line:
    base, broken, merged = rows
    named = {"base": base, "broken": broken, "delta": delta, "merged": merged}
    pairs = (("delta", "base"), ("delta", "broken"), ("merged", "base"), ("broken", "base"))
    order = delta.abs().argsort(descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(1, len(order) + 1))
    injury = (broken - base).abs()
    injured = injury.argsort(descending=True, stable=True)[: int((injury > 0).sum())]

    def entry(i: int) -> EntryChange:
        row = i if region.row is None else region.row
        at = Entry(region.site, row, i if region.col is None else region.col)
        values = {name: float(row[i]) for name, row in named.items()}
        return EntryChange(at, **values, rank=int(rank[i]) if values["delta"] else None)

    changed = int((delta != 0).sum())
    return Line(
        region=region,
        norms={name: float(row.norm()) for name, row in named.items()},
        cosines={f"{a}_{b}": _cosine(named[a], named[b]) for a, b in pairs},
        **dict(zip(("participation", "entropy"), participation(delta), strict=True)),
        changed=changed,
        top=[entry(i) for i in order[: min(top, changed)].tolist()],
        ablated=[entry(i) for i in injured[:top].tolist()],
        injured=len(injured),
    )


def _cosine(a: Float64[Tensor, " n"], b: Float64[Tensor, " n"]) -> float:
    """0 if one of them is zero."""
    size = float(a.norm() * b.norm())
    return float(a @ b) / size if size else 0.0
