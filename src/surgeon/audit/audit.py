"""What became of the critical entries of a model in one that was made from it.

How this works. Of each matrix that holds a watched entry both versions are read, one matrix at a
time and nothing else. First it is made sure that they are the same matrix: of one shape, and beside
the watched entries alike by their cosine, which rotated, permuted and unrelated models are not.
Then every watched entry gets its ratio other/base and its rank by |w| in either version. Entries
that are vital together make a set: what counts is what is left of the sum that they write, each
with its share, and grade.py turns ratios into verdicts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite, nan
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..anatomy import Entry, Site
from ..errors import BadCheckpoint, BadInput, UnknownSite
from ..progress import Tell, silent
from ..result import Result, derived, record, result
from ..settings import nested, setting
from .activation import SuperActivation
from .grade import OK, Curve, worst
from .weights import Weights


@dataclass(frozen=True)
class AuditConfig:
    """Settings of the audit."""

    curve: Curve = nested(Curve)
    unrelated: float = setting(
        0.2,
        "least cosine between the two matrices, critical entries left out, below which OTHER is"
        " another model",
        low=-1,
        high=1,
        group="Grades",
    )


@dataclass(frozen=True)
class Watched:
    """Entries that are vital together.

    shares: what each contributes to the channels they write; where not known, |w| in the base.
    """

    entries: tuple[Entry, ...]
    shares: tuple[float, ...] | None = None


@record
class EntryAudit:
    """One entry in both models; ranks are by |w| in its matrix, 1 the largest.

    other, ratio, rank: None where there is no finite one. share: of what its set contributes.
    """

    entry: Entry
    base: float
    other: float | None
    ratio: float | None
    rank: int | None
    rank_base: int
    share: float
    verdict: str


@record
class SetAudit:
    """A set: `ratio` is what is left of its summed contribution; `verdict` the worst of that and of
    the entries that carry much.
    """

    verdict: str
    ratio: float | None
    entries: list[EntryAudit]


@record
class MatrixAudit:
    """A matrix that was read, and its cosine with the base's, critical entries left out; None where
    one side is zero or not finite.
    """

    site: Site
    cosine: float | None


@result("audit")
class Audit(Result):
    """What became of the critical entries of BASE in OTHER.

    source: where the entries come from. activations: the super activations of both models, where
    they were run; not_run: why they were not, though they should have been.
    """

    base: str
    other: str
    sets: list[SetAudit]
    matrices: list[MatrixAudit]
    curve: Curve
    bytes_read: int
    source: str = "given"
    activations: list[SuperActivation] = field(default_factory=list)
    not_run: str | None = None

    @derived
    def verdict(self) -> str:
        return worst([one.verdict for one in self.sets])

    @derived
    def entries(self) -> list[EntryAudit]:
        return [entry for one in self.sets for entry in one.entries]

    def rows(self) -> list[dict[str, object]]:
        return [
            {"set": number, **vars(entry)}
            for number, one in enumerate(self.sets, 1)
            for entry in one.entries
        ]


def audit(
    base: Weights,
    other: Weights,
    watched: Sequence[Watched],
    config: AuditConfig = AuditConfig(),
    tell: Tell = silent,
) -> Audit:
    """Read the matrices that hold the watched entries in both models, nothing else, and grade what
    became of the entries.

    Raises: BadInput if there is nothing to watch, if an entry is zero or not finite in the base, or
    if OTHER is shaped otherwise or unrelated; BadCheckpoint, UnknownSite.
    """
    by_site = _by_site(base, watched)
    if not by_site:
        raise BadInput(
            "no entries to audit were given; name at least one, like L2.mlp.down[3968, 7003]."
        )
    values: dict[Entry, _Values] = {}
    matrices = []
    for done, (site, entries) in enumerate(by_site.items()):
        tell("reading", done, len(by_site))
        matrix, values_here = _compare(base, other, site, entries, config.unrelated)
        matrices.append(matrix)
        values |= values_here
    tell("reading", len(by_site), len(by_site))
    return Audit(
        base=base.name,
        other=other.name,
        sets=[_graded(one, values, config.curve) for one in watched],
        matrices=matrices,
        curve=config.curve,
        bytes_read=base.bytes_read + other.bytes_read,
    )


class _Values(NamedTuple):
    """An entry in both models; `ratio` is None where there is no finite one."""

    base: float
    other: float
    rank_base: int
    rank: int | None

    @property
    def ratio(self) -> float | None:
        # x / 0 is no ratio, either
        return self.other / self.base if self.base and isfinite(self.other) else None


def _by_site(base: Weights, watched: Sequence[Watched]) -> dict[Site, list[Entry]]:
    """Every watched entry once, by its site."""
    by_site: dict[Site, list[Entry]] = {}
    # an entry may belong to several sets
    for entry in dict.fromkeys(entry for one in watched for entry in one.entries):
        by_site.setdefault(base.anatomy.resolve(entry.site), []).append(entry)
    return by_site


def _compare(
    base: Weights, other: Weights, site: Site, entries: Sequence[Entry], unrelated: float
) -> tuple[MatrixAudit, dict[Entry, _Values]]:
    """One matrix in both models, and the entries in it."""
    before, after = base.matrix(site), _counterpart(other, base, site)
    rows = torch.tensor([entry.row for entry in entries])
    cols = torch.tensor([entry.col for entry in entries])
    _check(base, site, before, rows, cols)
    cosine = _cosine(before, after, rows, cols)
    if cosine is not None and cosine < unrelated:
        raise BadInput(
            f"{other.name} is no relative of {base.name}: beside the critical entries their {site}"
            f" agree by a cosine of {cosine:.2f}. Give the model that it was made from (a rotated"
            " or permuted model has other coordinates, and cannot be audited by these)."
        )
    old, new = before[rows, cols], after[rows, cols]
    ranks_before = [rank for rank in _ranks(before, old) if rank is not None]  # all are finite
    numbers = zip(old.tolist(), new.tolist(), ranks_before, _ranks(after, new), strict=True)
    values = [_Values(*each) for each in numbers]
    return MatrixAudit(site, cosine), dict(zip(entries, values, strict=True))


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
    # without the watched: one entry a thousand times the others would decide alone
    before, after = before.clone(), after.clone()
    before[rows, cols] = after[rows, cols] = 0
    norms = float(before.norm()) * float(after.norm())
    cosine = float(before.flatten() @ after.flatten()) / norms if norms else nan
    return cosine if isfinite(cosine) else None


def _ranks(matrix: Float[Tensor, "out in"], values: Float[Tensor, " n"]) -> list[int | None]:
    """The place of each of the matrix's `values` by |w|, 1 the largest; None for one that is not
    finite.
    """
    sizes = values.abs()
    finite = sizes.isfinite()  # a quantized or merged model may well hold NaN
    if not bool(finite.any()):
        return [None] * len(values)
    magnitudes = matrix.abs().flatten()
    # only what is as large as the smallest of them can stand before one: far less to sort
    candidates = magnitudes[magnitudes >= sizes[finite].min()].sort().values
    no_larger = torch.searchsorted(candidates, sizes.nan_to_num(), right=True)
    places = (len(candidates) - no_larger + 1).tolist()
    return [place if ok else None for place, ok in zip(places, finite.tolist(), strict=True)]


def _graded(watched: Watched, values: dict[Entry, _Values], curve: Curve) -> SetAudit:
    here = [values[entry] for entry in watched.entries]
    shares = watched.shares or [abs(one.base) for one in here]
    # an entry that was zero carries nothing, and has no verdict of its own to give
    shares = [share if one.base else 0.0 for share, one in zip(shares, here, strict=True)]
    left, verdict = curve.of_set([one.ratio for one in here], shares)
    total = sum(map(abs, shares)) or 1.0
    entries = [
        EntryAudit(
            entry=entry,
            base=one.base,
            other=one.other if isfinite(one.other) else None,
            ratio=one.ratio,
            rank=one.rank,
            rank_base=one.rank_base,
            share=share / total,
            verdict=curve.grade(one.ratio) if one.base else OK,
        )
        for entry, one, share in zip(watched.entries, here, shares, strict=True)
    ]
    return SetAudit(verdict, left, entries)
