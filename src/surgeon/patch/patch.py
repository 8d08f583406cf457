"""A patch: a small exact change to a few weights of a frozen base."""

# How this works.
#
# A patch is made by holding the matrices that are wanted against those that the model has, bit by
# bit: what differs is kept, old value and new, in the delta that takes fewest bytes (deltas.py); a
# low-rank patch keeps its two factors instead. Beside them stands a digest of each matrix before
# and after (content.py), by which the patch knows its base again, whatever the model is called.
#
# Putting on and taking off is stack.py's, which works on views: those of a model in memory here,
# those of a checkpoint's tensors in checkpoint.py. Both check everything first and write last, so a
# patch that is refused has changed nothing.

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ..anatomy import Anatomy, Entry, Site, WeightView, digest
from ..errors import BadInput
from .content import BaseTensor, Content, dtype_name
from .deltas import EntriesDelta, LineDelta, LowRankDelta, differ, kept_delta, wide
from .stack import put_on_, stack_of, take_off_, views

__all__ = ["BaseTensor", "Patch", "applied_patches", "dtype_name", "signed"]


class Patch(Content):
    """A change of a few weights: made on a model, put on, taken off again bit for bit.

    deltas, base, made_by: what it holds, see `Content`.

    >>> import tempfile, surgeon
    >>> anatomy = Anatomy.of(surgeon.load_model("patient").model)
    >>> entry = Entry.parse("L0.mlp.down[88, 165]")
    >>> patch = Patch.from_entries(anatomy, [entry], [0.5], {"operation": "example"})
    >>> with patch.applied(anatomy):
    ...     anatomy.view("L0.mlp.down").read()[88, 165]
    tensor(0.5000)
    >>> with tempfile.NamedTemporaryFile() as file:
    ...     surgeon.save(patch, file.name)
    ...     surgeon.load(file.name).digest == patch.digest
    True
    """

    # -- making one ----------------------------------------------------------------------------

    @classmethod
    def from_matrix(
        cls,
        anatomy: Anatomy,
        matrices: Mapping[Site, Float[Tensor, "out in"]],
        made_by: Mapping[str, Any] | None = None,
        named: Mapping[Site, Bool[Tensor, "out in"]] | None = None,
    ) -> Patch:
        """What turns the model's matrices into `matrices`, stored the smallest way.

        matrices: new values, rounded to the model's dtypes. named: entries to keep in the patch
        even where they do not change.
        Raises: BadInput for a wrong shape, or if nothing changes and nothing is named.
        """
        deltas: list[EntriesDelta | LineDelta] = []
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
                deltas.append(_smallest(site, old, new, mask))
                base[site] = _base_tensor(anatomy, view, new)
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

        Raises: BadInput if one entry is given two values or lies outside its matrix; UnknownSite.
        """
        # float64 holds the values of every dtype exactly
        numbers = torch.as_tensor(values, dtype=torch.float64).tolist()
        wanted: dict[Entry, float] = {}
        for entry, number in zip(entries, numbers, strict=True):
            if wanted.setdefault(entry, number) != number:
                raise BadInput(
                    f"{entry} is given twice, once as {wanted[entry]} and once as {number};"
                    " give it once."
                )
        matrices: dict[Site, Tensor] = {}
        named: dict[Site, Tensor] = {}
        for entry, number in wanted.items():
            anatomy.region(str(entry))
            site = entry.site
            if site not in matrices:
                matrices[site] = anatomy.view(site).read().to("cpu", copy=True)
                named[site] = torch.zeros(matrices[site].shape, dtype=torch.bool)
            matrices[site][entry.row, entry.col] = number
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
        dtype = wide(view.dtype)
        left, right = (t.detach().to("cpu", dtype).contiguous() for t in (left, right))
        delta = LowRankDelta(anatomy.resolve(site), left, right)
        try:
            delta.check(view.shape)
        except ValueError as error:
            raise BadInput(
                f"factors of shape {tuple(left.shape)} and {tuple(right.shape)} were given for"
                f" {site}, which has (out, in) = {view.shape}: {error}."
            ) from error
        new = view.read().to("cpu", copy=True)
        delta.apply_(new)
        return cls((delta,), {delta.site: _base_tensor(anatomy, view, new)}, signed(made_by))

    # -- using it ------------------------------------------------------------------------------

    def apply_(self, model: Anatomy | nn.Module, allow_tied: bool = False) -> None:
        """Write the patch into the model, or that of a map. If it is refused, nothing was changed.

        A base tensor is accepted as it is, or with other applied patches on it that hold none of
        the same entries.
        Raises: WrongBase, PatchConflict, TiedWeight unless `allow_tied`, PackedWeight.
        """
        anatomy = _map_of(model)
        put_on_(self, views(self, anatomy, anatomy.view, allow_tied), stack_of(anatomy.model))

    def undo_(self, model: Anatomy | nn.Module) -> None:
        """Put the original entries back, bit for bit. If that is refused, nothing was changed.

        Raises: PatchConflict if a patch applied later holds the same entries; WrongBase if the
        model does not hold what the patch writes; Refused for a low-rank patch that was not applied
        to this very model object.
        """
        anatomy = _map_of(model)
        take_off_(self, views(self, anatomy, anatomy.view), stack_of(anatomy.model))

    @contextmanager
    def applied(self, model: Anatomy | nn.Module, allow_tied: bool = False) -> Iterator[None]:
        """Applied within the block. On any exit the original entries are back.

        They are back even if they were trained inside the block.
        Raises: as `apply_`; on exit PatchConflict if a patch that was applied inside, and not
        undone, holds the same entries.
        """
        anatomy = _map_of(model)
        self.apply_(anatomy, allow_tied)
        try:
            yield
        finally:
            take_off_(self, views(self, anatomy, anatomy.view), stack_of(anatomy.model), force=True)


def _map_of(model: Anatomy | nn.Module) -> Anatomy:
    return model if isinstance(model, Anatomy) else Anatomy.of(model)


def applied_patches(anatomy: Anatomy) -> list[Patch]:
    """The patches that are applied to this model object, oldest first."""
    # nothing but `Patch.apply_` puts something on the stack of a model
    return [cast(Patch, layer.patch) for layer in stack_of(anatomy.model)]


def signed(made_by: Mapping[str, Any] | None) -> dict[str, Any]:
    """`made_by` with the package's version, as it is after a round trip through a file."""
    try:
        release = version("weight-surgeon")
    except PackageNotFoundError:
        release = "not installed"
    text = json.dumps({"surgeon": release, **(made_by or {})})
    as_in_a_file: dict[str, Any] = json.loads(text)
    return as_in_a_file


def _smallest(
    site: Site,
    old: Float[Tensor, "out in"],
    new: Float[Tensor, "out in"],
    mask: Bool[Tensor, "out in"],
) -> EntriesDelta | LineDelta:
    """The entries under `mask` as the delta that takes fewest bytes."""
    rows, cols = mask.nonzero(as_tuple=True)
    value_bytes = 2 * old.element_size()  # the old and the new value
    index_bytes = 8  # row and column, as int32
    for across, line in ((rows, mask[rows[0]]), (cols, mask[:, cols[0]])):
        one_line = bool((across == across[0]).all())
        # a line is stored whole, the entries that do not change among them, but without indices
        if one_line and len(rows) * (index_bytes + value_bytes) > len(line) * value_bytes:
            line[:] = True
            rows, cols = mask.nonzero(as_tuple=True)
            break
    shape = (old.shape[0], old.shape[1])
    return kept_delta(site, shape, rows, cols, old[rows, cols], new[rows, cols])


def _base_tensor(anatomy: Anatomy, view: WeightView, after: Float[Tensor, "out in"]) -> BaseTensor:
    return BaseTensor(
        view.digest(),
        digest(after),
        anatomy.addresses[view.site].parameter,
        view.shape,
        dtype_name(view.dtype),
        tuple(view.stored.shape),
        view.packing.transposed,
    )
