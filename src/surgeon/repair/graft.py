"""Graft: the row change that writes what the injured entries wrote, in closed form, from one pass
over text.

How this works. What enters the matrix in the broken model, x, and what the matrix fails to write
there, c, are seen once over the text; their second moments E[x x'] and E[x c'] are all that the
least-squares change d of a row needs, with a ridge. Two settings decide how good it is, and neither
is known beforehand: the ridge, and how often the first position of a window is counted, since it
takes a write many times larger than all others and steers the whole window. So each pair is solved
from the same moments, and the NLL of the repaired model on other windows chooses. Matrices are
solved from the lowest layer up, each in the model with those below it repaired.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from ..anatomy import Anatomy, Site
from ..errors import BadInput
from ..measure import ResumedNLL
from ..measure.likelihood import batches
from ..patch import Patch
from ..patch.deltas import wide
from ..result import record
from ..tap import Tap
from .config import GraftConfig
from .target import Change, Changes, Target, broken, is_projection, lowest, write_


@dataclass(frozen=True, eq=False)
class Moments:
    """Sums over tokens of x x' (in, in) and x c' (in, rows); x enters the matrix in the broken
    model, c is the write it lacks there.
    """

    gram: Float64[Tensor, "in in"]
    cross: Float64[Tensor, "in rows"]

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.gram + other.gram, self.cross + other.cross)

    def __rmul__(self, factor: float) -> Moments:
        return Moments(factor * self.gram, factor * self.cross)


@record
class GraftChoice:
    """What the held-out windows chose for one matrix, and the NLL there, in nats per token."""

    first_weight: float
    ridge: float
    nll: float


@dataclass(frozen=True)
class Graft:
    """The repaired matrices, and what was chosen for each site."""

    changes: Changes
    chosen: dict[str, GraftChoice]


@torch.no_grad()
def graft(
    anatomy: Anatomy,
    injury: Patch,
    targets: Sequence[Target],
    fit: Int64[Tensor, "n window"],
    choose: Int64[Tensor, "m window"],
    config: GraftConfig = GraftConfig(),
    rank: int = 0,
) -> Graft:
    """Solve min over d of E[(d.x - c)^2] + ridge |d|^2 for each target row, matrix by matrix from
    the lowest layer up.

    c is what the intact matrix writes and the broken one does not, x what enters it in the broken
    model. Windows hold no padding. The ridge, and the weight of the first position, are those with
    the least NLL of the repaired model on the `choose` windows. rank: of the change of each matrix,
    0 for any; reduced-rank ridge regression (Izenman 1975).
    Raises: BadInput for an expert of a fused matrix, whose inputs cannot be seen, or if the injured
    entries wrote nothing.
    """
    for target in targets:
        if not is_projection(anatomy.module(target.site)):
            raise BadInput(
                f"{target.site} is part of a fused matrix, whose inputs cannot be seen; use"
                " ‹method› distil."
            )
    wanted = [_writes(anatomy, injury, target, fit) for target in targets]
    changes: dict[Site, Change] = {}
    chosen = {}
    with broken(anatomy, injury, [t.site for t in targets]) as matrices:
        nll = ResumedNLL(anatomy.model, anatomy.layers, lowest(targets), choose)
        for target, write in zip(targets, wanted, strict=True):
            matrix = matrices[target.site]
            first, rest = _moments(anatomy, target, fit, write, matrix)
            change, choice = _best(anatomy, target, first, rest, matrix, nll, config, rank)
            write_(anatomy, {target.site: change.matrix})
            changes[target.site], chosen[str(target.site)] = change, choice
    return Graft(changes, chosen)


def _best(
    anatomy: Anatomy,
    target: Target,
    first: Moments,
    rest: Moments,
    matrix: Tensor,
    nll: ResumedNLL,
    config: GraftConfig,
    rank: int,
) -> tuple[Change, GraftChoice]:
    """The weight of the first position at a middling ridge, then the ridge at that weight, by the
    NLL of the model with the change.
    """
    tried: dict[tuple[float, float], tuple[float, Change]] = {}

    def attempt(weight: float, ridge: float) -> float:
        if (weight, ridge) not in tried:
            solution = solve(weight * first + rest, target, ridge, rank)
            change = _change(target, matrix, solution, rank)
            write_(anatomy, {target.site: change.matrix})
            tried[weight, ridge] = (float(nll().mean()), change)
        return tried[weight, ridge][0]

    # one after the other, not every pair: each attempt is a pass over the windows
    middle = sorted(config.ridges)[len(config.ridges) // 2]
    weight = min(config.first_weights, key=lambda w: attempt(w, middle))
    ridge = min(config.ridges, key=lambda r: attempt(weight, r))
    held_out, change = tried[weight, ridge]
    return change, GraftChoice(weight, ridge, held_out)


def solve(
    moments: Moments, target: Target, ridge: float, rank: int = 0
) -> Float64[Tensor, "out in"]:
    """The change of the target's entries with the least squared error and ridge; float64, by
    Cholesky factors.

    ridge: as a share of the mean diagonal. Raises: BadInput if nothing enters the matrix, or
    nothing is to be written.
    """
    if not bool(moments.cross.any()):
        raise BadInput(
            f"what was injured in {target.site} wrote nothing on this text, so there is nothing to"
            " graft."
        )
    change = torch.zeros(target.mask.shape, dtype=torch.float64)
    rows = target.rows
    # rows in which the same columns may change share a factor
    patterns: dict[bytes, list[int]] = {}
    for i, row in enumerate(rows.tolist()):
        patterns.setdefault(target.mask[row].numpy().tobytes(), []).append(i)
    for members in patterns.values():
        cols = target.mask[rows[members[0]]].nonzero().flatten()
        gram = moments.gram[cols][:, cols]
        gram.diagonal().add_(ridge * gram.diagonal().mean())
        d = torch.cholesky_solve(moments.cross[cols][:, members], torch.linalg.cholesky(gram))
        if rank:
            # the best approximation of rank r in the metric of the ridge-regularised second moments
            # (eigh orders its values upwards)
            left = torch.linalg.eigh(d.T @ gram @ d).eigenvectors[:, -rank:]
            d = d @ left @ left.T
        change[rows[members][:, None], cols] = d.T
    return change


def _change(target: Target, matrix: Tensor, d: Float64[Tensor, "out in"], rank: int) -> Change:
    if not rank:
        dtype = wide(matrix.dtype)
        d = d.to(matrix.device)
        changed = (matrix.to(dtype) + d.to(dtype)).to(matrix.dtype)
        # only the target's entries: adding a zero would turn -0.0 into 0.0
        return Change(torch.where(target.mask.to(matrix.device), changed, matrix))
    u, s, v = torch.linalg.svd(d[target.rows][:, target.cols], full_matrices=False)
    r = min(rank, len(s))
    left = torch.zeros(d.shape[0], r, dtype=wide(matrix.dtype))
    right = torch.zeros(r, d.shape[1], dtype=wide(matrix.dtype))
    left[target.rows] = (u[:, :r] * s[:r]).to(left)
    right[:, target.cols] = v[:r].to(right)
    return Change.low_rank(target.site, matrix, left, right)


def _inputs(
    anatomy: Anatomy, site: Site, windows: Int64[Tensor, "n window"]
) -> Iterator[Float64[Tensor, "batch pos in"]]:
    """What enters the module of `site`, batch by batch; the pass ends there."""
    module, device = anatomy.module(site), next(anatomy.model.parameters()).device
    for ids in batches(windows):
        inputs: list[Tensor] = []
        with Tap() as tap:
            tap.on_input(module, inputs.append)
            tap.stop_after(module)
            tap.run(anatomy.model, input_ids=ids.to(device), use_cache=False)
        # some modules see batch and positions flattened into one axis
        yield inputs[0].double().cpu().reshape(*ids.shape, -1)


def _writes(anatomy: Anatomy, injury: Patch, target: Target, fit: Tensor) -> list[Tensor] | Tensor:
    """What the intact matrix writes to the target rows, batch by batch; or its rows, if the injury
    does not reach what enters it.
    """
    rows = anatomy.view(target.site).read()[target.rows].double().cpu()
    if all(site == target.site or _above(site, target.site) for site in injury.sites):
        return rows
    return [x @ rows.T for x in _inputs(anatomy, target.site, fit)]


def _above(site: Site, other: Site) -> bool:
    """Whether a site lies in a higher layer than another."""
    return site.layer is not None and other.layer is not None and site.layer > other.layer


def _moments(
    anatomy: Anatomy, target: Target, fit: Tensor, wanted: list[Tensor] | Tensor, matrix: Tensor
) -> tuple[Moments, Moments]:
    """Moments of the first position of each window, and of all others."""
    n_in, now = matrix.shape[1], matrix[target.rows].double().cpu()
    first, others = _no_moments(n_in, len(now)), _no_moments(n_in, len(now))
    for i, x in enumerate(_inputs(anatomy, target.site, fit)):
        lacking = x @ (wanted - now).T if isinstance(wanted, Tensor) else wanted[i] - x @ now.T
        for total, at in ((first, slice(0, 1)), (others, slice(1, None))):
            flat = x[:, at].flatten(0, 1)
            total.gram.addmm_(flat.T, flat)
            total.cross.addmm_(flat.T, lacking[:, at].flatten(0, 1))
    return first, others


def _no_moments(n_in: int, rows: int) -> Moments:
    gram = torch.zeros(n_in, n_in, dtype=torch.float64)
    return Moments(gram, torch.zeros(n_in, rows, dtype=torch.float64))
