"""Where a repair points: its rows beside the rows they came from, and how few entries would do."""

# How this works.
#
# A stack of patches gives each changed matrix three states: base, broken (with the injury alone),
# merged (with all patches). `geometry` describes their rows: norms, angles between them, and how
# many entries the change really uses. Where a matrix changes in fewer columns than rows, columns
# are described instead.
#
# `topk_curve` asks the model itself: the last patch is cut to its k largest entries, and the share
# of the damage that the cut patch takes back is measured, beside random choices of k entries.
# Layers below the lowest changed one are computed once (ResumedNLL).

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

from ..anatomy import Anatomy, Entry, Region, Site
from ..corpus import Corpus
from ..errors import BadInput
from ..measure.likelihood import ResumedNLL, require_causal
from ..patch import Patch
from ..patch.deltas import differ
from .states import Progress, require_stack, stacked, states

Matrices = dict[Site, Tensor]
Point = tuple[Site, int, int]


@dataclass(frozen=True)
class GeometryConfig:
    """Settings of the geometry and of the top-k curve. Raises: BadInput for one below 1."""

    lines: int = field(
        default=8, metadata={"help": "rows (or columns) described, largest change first"}
    )
    top: int = field(default=10, metadata={"help": "entries listed of each row"})
    draws: int = field(
        default=3, metadata={"help": "random choices beside each point of the top-k curve"}
    )
    seed: int = field(default=0, metadata={"help": "seed of the random choices"})

    def __post_init__(self) -> None:
        if min(self.lines, self.top, self.draws) < 1:
            raise BadInput("lines, top and draws of the geometry count from 1.")


@dataclass(frozen=True)
class Line:
    """One row (or column) in its states; norms are Euclidean, in units of the weights.

    delta is what the patches after the injury add: merged minus broken, or for a lone injury broken
    minus base. changed: entries where it is not zero. top: its largest entries. cosines: of the
    pairs named.

    ablated: the injured entries, largest injury first, each with its rank (1 = largest) among the
    |delta| of this line, None where the repair left it alone; `injured` counts all of them.
    participation, entropy: effective number of entries of the delta, see `participation`.
    """

    region: Region
    norms: dict[str, float]
    cosines: dict[str, float]
    participation: float
    entropy: float
    changed: int
    top: list[dict[str, Any]]
    ablated: list[dict[str, Any]]
    injured: int

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "region": str(self.region)}


@dataclass(frozen=True)
class CurvePoint:
    """Share of the damage recovered by k entries.

    largest: the k largest of the repair. random: k random ones of them, mean and range of several
    draws. trained: of a patch that was made with k entries.
    """

    k: int
    largest: float | None = None
    random: float | None = None
    random_range: tuple[float, float] | None = None
    trained: float | None = None

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass(frozen=True)
class Curve:
    """recovered(k) = 1 - (NLL_k - NLL_base) / (NLL_broken - NLL_base), for the points by k.

    nll: of "base", "broken" and "patched", in nats per token. tokens: how many they are means over.
    """

    nll: dict[str, float]
    tokens: int
    points: list[CurvePoint]

    def to_json(self) -> dict[str, Any]:
        return {
            "nll": self.nll,
            "tokens": self.tokens,
            "points": [p.to_json() for p in self.points],
        }


@dataclass(frozen=True)
class Geometry:
    """`lines` is the number listed of `of` that changed."""

    lines: list[Line]
    of: int

    def to_json(self) -> dict[str, Any]:
        return {"lines": [line.to_json() for line in self.lines], "of": self.of}


def geometry(
    anatomy: Anatomy, patches: Sequence[Patch], config: GeometryConfig = GeometryConfig()
) -> Geometry:
    """Describe the rows that the patches change, or the columns, where fewer of those change.

    Raises: BadInput without patches, or if they change no entry; as `Patch.apply_` if they do not
    stack.

    >>> import surgeon
    >>> anatomy = Anatomy.of(surgeon.load_model("patient").model)
    >>> described = geometry(anatomy, [surgeon.ablate(anatomy, ["L0.mlp.down[88, :]"])])
    >>> str(described.lines[0].region), described.lines[0].changed
    ('L0.mlp.down[88, :]', 512)
    """
    matrices = _matrices(anatomy, patches)
    changed_lines = []
    for site, base in matrices["base"].items():
        broken, merged = matrices["broken"][site], matrices["merged"][site]
        changed = differ(base, broken) | differ(broken, merged)
        rows, cols = changed.any(1), changed.any(0)
        by_row = int(rows.sum()) <= int(cols.sum())
        for i in (rows if by_row else cols).nonzero().flatten().tolist():
            region = Region(site, i, None) if by_row else Region(site, None, i)
            states_of_line = {
                name: (matrix[i] if by_row else matrix[:, i]).double()
                for name, matrix in (("base", base), ("broken", broken), ("merged", merged))
            }
            last, before = ("merged", "broken") if len(patches) > 1 else ("broken", "base")
            states_of_line["delta"] = states_of_line[last] - states_of_line[before]
            changed_lines.append((region, states_of_line))
    if not changed_lines:
        raise BadInput(
            "the patches change no entry of any row or column, so they have no geometry."
        )
    changed_lines.sort(key=lambda line: -float(line[1]["delta"].norm()))
    largest = changed_lines[: config.lines]
    lines = [_line(region, states_of_line, config.top) for region, states_of_line in largest]
    return Geometry(lines, len(changed_lines))


def topk_curve(
    anatomy: Anatomy,
    patches: Sequence[Patch],
    corpus: Corpus,
    trained: Sequence[tuple[int, Patch]] = (),
    config: GeometryConfig = GeometryConfig(),
    progress: Progress | None = None,
) -> Curve:
    """How much of the damage the last patch takes back if cut to its k largest |delta| entries.

    k = 1, 2, 4, ... all. Beside it stand k random ones of its entries, and `trained`: patches made
    with k entries, each put in the place of the last patch. The model is left as it was.
    Raises: BadInput for fewer than two patches, if the last changes nothing, or if the injury does
    no damage here; as `Patch.apply_`.
    """
    if len(patches) < 2:
        raise BadInput(
            "a top-k curve needs an injury and a repair; give two patches, the injury first."
        )
    require_causal(anatomy.model)
    matrices = _matrices(anatomy, patches)
    below, merged = matrices["below"], matrices["merged"]
    points = _changed_points(below, merged)
    if not points:
        raise BadInput("the last patch changes no entry, so there is no top-k curve.")
    before = torch.stack([below[site][row, col].double() for site, row, col in points])
    after = torch.stack([merged[site][row, col].double() for site, row, col in points])
    largest_first = (after - before).abs().argsort(descending=True, stable=True).tolist()

    changed = [site for patch in [*patches, *(p for _, p in trained)] for site in patch.sites]
    lowest = min(0 if site.layer is None else site.layer for site in changed)
    nll = ResumedNLL(anatomy.model, anatomy.layers, lowest, corpus.windows)
    base = float(nll().mean())
    with stacked(anatomy, patches[:1]):
        broken = float(nll().mean())
    damage = broken - base
    if damage <= 0:
        raise BadInput(
            f"the injury does no damage on {corpus.name} ({damage:+.4f} nats), so no share of it"
            " can be recovered."
        )

    def recovered(patch: Patch) -> float:
        with patch.applied(anatomy):
            return 1 - (float(nll().mean()) - base) / damage

    def cut(chosen: Sequence[int]) -> Patch:
        """The last patch with some of its points only."""
        matrices = {site: matrix.clone() for site, matrix in below.items()}
        for site, row, col in (points[i] for i in chosen):
            matrices[site][row, col] = merged[site][row, col]
        return Patch.from_matrix(anatomy, matrices)

    ks = [*(2**i for i in range((len(points) - 1).bit_length())), len(points)]
    generator = torch.Generator().manual_seed(config.seed)
    curve = {}
    with stacked(anatomy, patches[:-1]):
        for done, k in enumerate(ks, 1):
            curve[k] = CurvePoint(k, largest=recovered(cut(largest_first[:k])))
            if k < len(points):
                draws = []
                for _ in range(config.draws):
                    random = torch.randperm(len(points), generator=generator)[:k].tolist()
                    draws.append(recovered(cut(random)))
                mean, span = sum(draws) / len(draws), (min(draws), max(draws))
                curve[k] = replace(curve[k], random=mean, random_range=span)
            if progress:
                progress("top-k curve", done, len(ks))
        for k, patch in trained:
            curve[k] = replace(curve.get(k, CurvePoint(k)), trained=recovered(patch))
    with stacked(anatomy, patches):
        patched = float(nll().mean())
    losses = {"base": base, "broken": broken, "patched": patched}
    return Curve(losses, corpus.predicted, [curve[k] for k in sorted(curve)])


def participation(delta: Float64[Tensor, " n"]) -> tuple[float, float]:
    """Effective number of entries of a change d, by two counts; both are 0 for none, 1 for one.

    The participation ratio (sum d^2)^2 / sum d^4, and exp of the entropy of d^2 / sum d^2.

    >>> participation(torch.tensor([2.0, -2.0, 0.0], dtype=torch.float64))
    (2.0, 2.0)
    """
    share = delta.square()
    if not bool(share.any()):
        return 0.0, 0.0
    share = share / share.sum()
    return float(1 / share.square().sum()), float(torch.special.entr(share).sum().exp())


def _matrices(anatomy: Anatomy, patches: Sequence[Patch]) -> dict[str, Matrices]:
    """The changed matrices (out, in), on the CPU, in each state.

    "below" is what the last patch was put on.
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


def _changed_points(before: Matrices, after: Matrices) -> list[Point]:
    return [
        (site, row, col)
        for site in before
        for row, col in differ(before[site], after[site]).nonzero().tolist()
    ]


def _line(region: Region, named: Mapping[str, Float64[Tensor, " n"]], top: int) -> Line:
    """Describe a line; `named` are its "base", "broken", "merged" and "delta"."""
    delta = named["delta"]
    pairs = (("delta", "base"), ("delta", "broken"), ("merged", "base"), ("broken", "base"))
    order = delta.abs().argsort(descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(1, len(order) + 1))
    injury = (named["broken"] - named["base"]).abs()
    injured = injury.argsort(descending=True, stable=True)[: int((injury > 0).sum())]

    def entry(i: int) -> dict[str, Any]:
        row = i if region.row is None else region.row
        col = i if region.col is None else region.col
        values = {name: float(named[name][i]) for name in ("base", "broken", "delta", "merged")}
        changes = values["delta"] != 0
        return {
            "entry": str(Entry(region.site, row, col)),
            **values,
            "rank": int(rank[i]) if changes else None,
        }

    changed = int((delta != 0).sum())
    ratio, entropy = participation(delta)
    return Line(
        region=region,
        norms={name: float(named[name].norm()) for name in ("base", "broken", "delta", "merged")},
        cosines={f"{a}_{b}": _cosine(named[a], named[b]) for a, b in pairs},
        participation=ratio,
        entropy=entropy,
        changed=changed,
        top=[entry(i) for i in order[: min(top, changed)].tolist()],
        ablated=[entry(i) for i in injured[:top].tolist()],
        injured=len(injured),
    )


def _cosine(a: Float64[Tensor, " n"], b: Float64[Tensor, " n"]) -> float:
    """0 if one of them is zero."""
    size = float(a.norm() * b.norm())
    return float(a @ b) / size if size else 0.0
