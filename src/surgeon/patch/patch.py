"""A patch: a small exact change to a few weights of a frozen base."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..anatomy import Anatomy, Entry, Site, WeightView, digest
from ..errors import BadInput
from .deltas import Delta, EntriesDelta, LineDelta, LowRankDelta, differ, kept_delta, wide
from .stack import put_on_, stack_of, take_off_, views


@dataclass(frozen=True)
class BaseTensor:
    """The tensor a patch was made on.

    digest: of the matrix (out, in), see `surgeon.anatomy.digest`. result: the same with the patch
    applied; "" if not known. parameter: its name in the model. dtype: as in "bfloat16". stored: the
    shape of the parameter, which may hold more than the matrix. transposed: whether it holds the
    matrix as (in, out).
    """

    digest: str
    result: str
    parameter: str
    shape: tuple[int, int]
    dtype: str
    stored: tuple[int, ...]
    transposed: bool


@dataclass(frozen=True, eq=False)
class Patch:
    """Deltas, applied in order, and the base tensor of every site they change.

    made_by: what made it, its settings and seed, and the package's version; anything JSON can hold.
    Raises: ValueError if the parts do not fit one another.
    """

    deltas: tuple[Delta, ...]
    base: dict[Site, BaseTensor]
    made_by: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.deltas or {d.site for d in self.deltas} != set(self.base):
            raise ValueError(
                "a patch needs at least one delta, and a base tensor for each site it changes and"
                " for no other"
            )
        for delta in self.deltas:
            base = self.base[delta.site]
            delta.check(base.shape)
            if not isinstance(delta, LowRankDelta) and dtype_name(delta.old.dtype) != base.dtype:
                raise ValueError(
                    f"a delta of {delta.site} holds {dtype_name(delta.old.dtype)}, its base tensor"
                    f" is {base.dtype}"
                )

    # -- making one ----------------------------------------------------------------------------

    @classmethod
    def from_matrix(
        cls,
        anatomy: Anatomy,
        matrices: Mapping[Site, Float[Tensor, "out in"]],
        made_by: Mapping[str, Any] | None = None,
        named: Mapping[Site, Bool[Tensor, "out in"]] | None = None,
    ) -> Patch:
        """What turns the model's matrices into `matrices`, which are rounded to its dtypes; stored
        the smallest way.

        named: entries to keep in the patch even where they do not change.
        Raises: BadInput for a wrong shape, or if nothing changes and nothing is named.
        """
        deltas: list[Delta] = []
        base = {}
        for site, matrix in matrices.items():
            view = anatomy.view(site)
            if tuple(matrix.shape) != view.shape:
                raise BadInput(
                    f"a matrix of shape {tuple(matrix.shape)} was given for {site}, which has shape"
                    f" (out, in) = {view.shape}."
                )
            old = view.read().cpu()
            new = matrix.detach().to("cpu", old.dtype)
            mask = differ(old, new)
            if named is not None and site in named:
                mask |= named[site].cpu()
            if mask.any():
                deltas.append(_pack(site, old, new, mask))
                base[site] = _base(anatomy, view, new)
        if not deltas:
            raise BadInput(
                f"the new values of {', '.join(map(str, matrices))} are the ones the model has, so"
                " there is nothing to patch."
            )
        return cls(tuple(deltas), base, signed(made_by))

    @classmethod
    def from_entries(
        cls,
        anatomy: Anatomy,
        entries: Sequence[Entry],
        values: Sequence[float] | Tensor,
        made_by: Mapping[str, Any] | None = None,
    ) -> Patch:
        """Set each entry to its value.

        Raises: BadInput if one entry is given two values; UnknownSite.
        """
        wanted: dict[Entry, float] = {}
        for entry, value in zip(
            entries, torch.as_tensor(values, dtype=torch.float64).tolist(), strict=True
        ):
            if wanted.setdefault(entry, value) != value:
                raise BadInput(
                    f"{entry} is given twice, once as {wanted[entry]} and once as {value}; give it"
                    " once."
                )
        matrices: dict[Site, Tensor] = {}
        named: dict[Site, Tensor] = {}
        for entry, value in wanted.items():
            anatomy.region(str(entry))
            site = entry.site
            if site not in matrices:
                matrices[site] = anatomy.view(site).read().to("cpu", copy=True)
                named[site] = torch.zeros(matrices[site].shape, dtype=torch.bool)
            matrices[site][entry.row, entry.col] = value
            named[site][entry.row, entry.col] = True
        return cls.from_matrix(anatomy, matrices, made_by, named)

    @classmethod
    def low_rank(
        cls,
        anatomy: Anatomy,
        site: Site,
        left: Float[Tensor, "out r"],
        right: Float[Tensor, "r in"],
        made_by: Mapping[str, Any] | None = None,
    ) -> Patch:
        """W + left @ right.

        Raises: BadInput if the factors do not make a matrix of the site's shape.
        """
        view = anatomy.view(site)
        left, right = (t.detach().to("cpu", wide(view.dtype)).contiguous() for t in (left, right))
        delta = LowRankDelta(anatomy.resolve(site), left, right)
        try:
            delta.check(view.shape)
        except ValueError as error:
            shapes = f"{tuple(left.shape)} and {tuple(right.shape)}"
            raise BadInput(
                f"factors of shape {shapes} were given for {site}, which has (out, in) ="
                f" {view.shape}: {error}."
            ) from error
        new = view.read().to("cpu", copy=True)
        delta.apply_(new)
        return cls((delta,), {delta.site: _base(anatomy, view, new)}, signed(made_by))

    # -- looking at it -------------------------------------------------------------------------

    @property
    def sites(self) -> list[Site]:
        return list(self.base)

    def on(self, site: Site) -> list[Delta]:
        """The deltas of one site, in the order they are applied."""
        return [d for d in self.deltas if d.site == site]

    def touched(self, site: Site) -> Bool[Tensor, "out in"]:
        """The entries whose bits the patch changes (for a low-rank term: may change)."""
        shape = self.base[site].shape
        mask = torch.zeros(shape, dtype=torch.bool)
        for delta in self.on(site):
            mask |= delta.touched(shape)
        return mask

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of the deltas, named `<number of the delta>.<part>`."""
        return {
            f"{i}.{name}": tensor
            for i, delta in enumerate(self.deltas)
            for name, tensor in delta.tensors().items()
        }

    def header(self) -> dict[str, Any]:
        """All that is not a tensor, for JSON."""
        return {
            "made_by": self.made_by,
            "deltas": [{"kind": d.kind, "site": str(d.site), **d.settings()} for d in self.deltas],
            "base": {
                str(site): {**vars(base), "shape": list(base.shape), "stored": list(base.stored)}
                for site, base in self.base.items()
            },
        }

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything in the patch."""
        total = hashlib.sha256(json.dumps(self.header(), sort_keys=True).encode())
        for name, tensor in sorted(self.tensors().items()):
            total.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}:".encode())
            total.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        return total.hexdigest()

    def __str__(self) -> str:
        where = ", ".join(map(str, self.sites[:3])) + (
            f" and {len(self.sites) - 3} more" if len(self.sites) > 3 else ""
        )
        return f"{self.made_by.get('operation', 'a change')} of {where}, digest {self.digest[:12]}"

    # -- using it ------------------------------------------------------------------------------

    def apply_(self, anatomy: Anatomy, allow_tied: bool = False) -> None:
        """Write the patch into the model. If it is refused, nothing was changed.

        A base tensor is accepted as it is, or with other applied patches on it that hold none of
        the same entries.
        Raises: WrongBase, PatchConflict, TiedWeight unless `allow_tied`, PackedWeight.
        """
        put_on_(self, views(self, anatomy, anatomy.view, allow_tied), stack_of(anatomy.model))

    def undo_(self, anatomy: Anatomy) -> None:
        """Put the original entries back, bit for bit. If that is refused, nothing was changed.

        Raises: PatchConflict if a patch applied later holds the same entries; WrongBase if the
        model does not hold what the patch writes; Refused for a low-rank patch that was not applied
        to this very model object.
        """
        take_off_(self, views(self, anatomy, anatomy.view), stack_of(anatomy.model))

    @contextmanager
    def applied(self, anatomy: Anatomy, allow_tied: bool = False) -> Iterator[None]:
        """Applied within the `with` block. On any exit the original entries are back, even if they
        were trained meanwhile.

        Raises: as `apply_`; on exit PatchConflict if a patch that was applied inside, and not
        undone, holds the same entries.
        """
        self.apply_(anatomy, allow_tied)
        try:
            yield
        finally:
            take_off_(self, views(self, anatomy, anatomy.view), stack_of(anatomy.model), force=True)


def applied_patches(anatomy: Anatomy) -> list[Patch]:
    """The patches that are applied to this model object, oldest first."""
    return [layer.patch for layer in stack_of(anatomy.model)]


def _pack(site: Site, old: Tensor, new: Tensor, mask: Tensor) -> EntriesDelta | LineDelta:
    """The entries under `mask` as the smallest delta; a line is stored whole, without indices."""
    rows, cols = mask.nonzero(as_tuple=True)
    size = old.element_size()
    for across, line in ((rows, mask[rows[0]]), (cols, mask[:, cols[0]])):
        if bool((across == across[0]).all()) and len(rows) * (8 + 2 * size) > len(line) * 2 * size:
            line[:] = True
            rows, cols = mask.nonzero(as_tuple=True)
            break
    return kept_delta(
        site, (old.shape[0], old.shape[1]), rows, cols, old[rows, cols], new[rows, cols]
    )


def _base(anatomy: Anatomy, view: WeightView, after: Tensor) -> BaseTensor:
    return BaseTensor(
        view.digest(),
        digest(after),
        anatomy.addresses[view.site].parameter,
        view.shape,
        dtype_name(view.dtype),
        tuple(view.stored.shape),
        view.packing.transposed,
    )


def signed(made_by: Mapping[str, Any] | None) -> dict[str, Any]:
    """`made_by` with the package's version, in the form it has after a round trip through a
    file.
    """
    try:
        release = version("weight-surgeon")
    except PackageNotFoundError:
        release = "not installed"
    signed: dict[str, Any] = json.loads(json.dumps({"surgeon": release, **(made_by or {})}))
    return signed


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
