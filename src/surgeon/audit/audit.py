"""What became of the critical entries of a model in one that was made from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..anatomy import Entry, Site
from ..errors import BadCheckpoint, BadInput, UnknownSite
from .activation import SuperActivation
from .grade import Curve, worst
from .weights import Weights

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class AuditConfig:
    """Settings of the audit."""

    curve: Curve = field(default_factory=Curve)
    unrelated: float = field(
        default=0.2,
        metadata={
            "help": (
                "least cosine between the two matrices, critical entries left out, below which"
                " OTHER is another model"
            )
        },
    )


@dataclass(frozen=True)
class Watched:
    """Entries that are vital together.

    shares: what each contributes to the channels they write; where not known, |w| in the base.
    """

    entries: tuple[Entry, ...]
    shares: tuple[float, ...] | None = None


@dataclass(frozen=True)
class EntryAudit:
    """One entry in both models; ranks are by |w| in its matrix, 1 the largest.

    `ratio` is None where there is no finite one.
    """

    entry: Entry
    base: float
    other: float | None
    ratio: float | None
    rank: int | None
    rank_base: int
    share: float
    verdict: str

    def to_json(self) -> dict[str, Any]:
        numbers = {
            "base": self.base,
            "other": self.other,
            "ratio": self.ratio,
            "rank": self.rank,
            "rank_base": self.rank_base,
        }
        return {"entry": str(self.entry), **numbers, "share": self.share, "verdict": self.verdict}


@dataclass(frozen=True)
class SetAudit:
    """A set: `ratio` is what is left of its summed contribution; `verdict` the worst of that and of
    the entries that carry much.
    """

    entries: list[EntryAudit]
    ratio: float | None
    verdict: str

    def to_json(self) -> dict[str, Any]:
        return {
            "verdict": self.verdict,
            "ratio": self.ratio,
            "size": len(self.entries),
            "entries": [str(e.entry) for e in self.entries],
        }


@dataclass(frozen=True)
class Audit:
    """The audit of OTHER against BASE.

    cosines: of each matrix concerned with the base's, critical entries left out.
    """

    sets: list[SetAudit]
    cosines: dict[Site, float | None]
    bytes_read: int
    activations: list[SuperActivation] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        return worst([s.verdict for s in self.sets])

    @property
    def entries(self) -> list[EntryAudit]:
        return [e for s in self.sets for e in s.entries]

    def to_json(self) -> dict[str, Any]:
        return {
            "verdict": self.verdict,
            "entries": [e.to_json() for e in self.entries],
            "sets": [s.to_json() for s in self.sets],
            "matrices": [
                {"site": str(site), "cosine": cosine} for site, cosine in self.cosines.items()
            ],
            "activations": [a.to_json() for a in self.activations],
            "bytes_read": self.bytes_read,
        }


def audit(
    base: Weights,
    other: Weights,
    watched: Sequence[Watched],
    config: AuditConfig = AuditConfig(),
    progress: Progress | None = None,
) -> Audit:
    """Read the matrices that hold the watched entries in both models, nothing else, and grade what
    became of the entries.

    Raises: BadInput if there is nothing to watch, if an entry is zero or not finite in the base, or
    if OTHER is shaped otherwise or unrelated; BadCheckpoint, UnknownSite.
    """
    sites = list(dict.fromkeys(base.anatomy.resolve(e.site) for w in watched for e in w.entries))
    if not sites:
        raise BadInput(
            "no entries to audit were given; name at least one, like L2.mlp.down[3968, 7003]."
        )
    entries = {
        site: list(dict.fromkeys(e for w in watched for e in w.entries if e.site == site))
        for site in sites
    }
    found: dict[Entry, tuple[float, float, int | None, int]] = {}
    cosines: dict[Site, float | None] = {}
    for done, site in enumerate(sites):
        if progress is not None:
            progress("reading", done, len(sites))
        before, after = base.matrix(site), _counterpart(other, base, site)
        rows, cols = (
            torch.tensor(i) for i in zip(*((e.row, e.col) for e in entries[site]), strict=True)
        )
        _check(base, site, before, rows, cols)
        cosines[site] = _cosine(before, after, rows, cols)
        if (cosine := cosines[site]) is not None and cosine < config.unrelated:
            raise BadInput(
                f"{other.name} is no relative of {base.name}: beside the critical entries their"
                f" {site} agree by a cosine of {cosine:.2f}. Give the model that it was made from"
                " (a rotated or permuted model has other coordinates, and cannot be audited by"
                " these)."
            )
        ranks = [_ranks(matrix, matrix[rows, cols]) for matrix in (after, before)]
        values = before[rows, cols].tolist(), after[rows, cols].tolist()
        found |= dict(zip(entries[site], zip(*values, *ranks, strict=True), strict=True))
    if progress is not None:
        progress("reading", len(sites), len(sites))
    sets = [_grade(w, found, config.curve) for w in watched]
    return Audit(sets, cosines, base.bytes_read + other.bytes_read)


def _counterpart(other: Weights, base: Weights, site: Site) -> Float[Tensor, "out in"]:
    try:
        other.anatomy.resolve(site)
    except UnknownSite as error:
        raise BadInput(
            f"{other.name} has no {site}, so it was not made from {base.name}, or layers were taken"
            f" out: {error}"
        ) from error
    matrix, shape = other.matrix(site), base.anatomy.view(site).shape
    if tuple(matrix.shape) != shape:
        raise BadInput(
            f"{site} has shape (out, in) = {tuple(matrix.shape)} in {other.name} and {shape} in"
            f" {base.name}; an audit compares a model with one made from it, whose matrices keep"
            " their shape."
        )
    return matrix


def _check(base: Weights, site: Site, matrix: Tensor, rows: Tensor, cols: Tensor) -> None:
    if tuple(matrix.shape) != base.anatomy.view(site).shape:
        raise BadCheckpoint(
            f"{base.name} holds {site} as {tuple(matrix.shape)}, and its config.json says"
            f" {base.anatomy.view(site).shape}."
        )
    for name, index, size in (("row", rows, matrix.shape[0]), ("column", cols, matrix.shape[1])):
        if int(index.max()) >= size:
            raise BadInput(
                f"{site} has shape (out, in) = {tuple(matrix.shape)}, so there is no {name}"
                f" {int(index.max())}, counted from 0."
            )
    values = matrix[rows, cols]
    if not bool(values.isfinite().all()) or not bool(values.any()):
        raise BadInput(
            f"the entries of {site} to be audited are zero or not finite in {base.name} itself, so"
            " there is nothing to compare."
        )


def _cosine(before: Tensor, after: Tensor, rows: Tensor, cols: Tensor) -> float | None:
    """The cosine of all that is not watched; None where one side is zero or not finite."""
    before, after = before.clone(), after.clone()
    before[rows, cols] = after[rows, cols] = 0
    norms = float(before.norm()) * float(after.norm())
    cosine = float(before.flatten() @ after.flatten()) / norms if norms else math.nan
    return cosine if math.isfinite(cosine) else None


def _ranks(matrix: Float[Tensor, "out in"], values: Float[Tensor, " n"]) -> list[int | None]:
    """The place of each of the matrix's `values` by |w|, 1 the largest; None for one that is not
    finite.
    """
    sizes = values.abs()
    finite = sizes.isfinite()
    magnitude = matrix.abs().flatten()
    larger = (
        magnitude[magnitude >= (sizes[finite].min() if bool(finite.any()) else math.inf)]
        .sort()
        .values
    )
    places = len(larger) - torch.searchsorted(larger, sizes.nan_to_num(), right=True) + 1
    return [int(p) if ok else None for p, ok in zip(places, finite.tolist(), strict=True)]


def _grade(
    watched: Watched, found: dict[Entry, tuple[float, float, int | None, int]], curve: Curve
) -> SetAudit:
    numbers = [found[e] for e in watched.entries]
    # x / 0 is no ratio: an entry that was zero carries nothing, and has no verdict of its own to
    # give
    ratios = [b / a if a and math.isfinite(b) else None for a, b, *_ in numbers]
    shares = list(watched.shares) if watched.shares is not None else [abs(a) for a, *_ in numbers]
    shares = [s if a else 0.0 for s, (a, *_) in zip(shares, numbers, strict=True)]
    total = sum(map(abs, shares)) or 1.0
    summed, verdict = curve.of_set(ratios, shares)
    entries = [
        EntryAudit(
            e,
            a,
            b if math.isfinite(b) else None,
            r,
            rank,
            rank_base,
            s / total,
            curve.grade(r) if a else "ok",
        )
        for e, (a, b, rank, rank_base), r, s in zip(
            watched.entries, numbers, ratios, shares, strict=True
        )
    ]
    return SetAudit(entries, summed, verdict)
