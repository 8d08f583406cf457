"""The patches that lie on one model: the rules for putting one on and for taking one off, and
nothing changed if they refuse.

The rules know only `WeightView`s, so they are the same for a model in memory and for tensors of a
checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from ..anatomy import Anatomy, Site, WeightView, digest
from ..errors import PatchConflict, TiedWeight, UnknownSite, WrongBase

if TYPE_CHECKING:
    from .patch import Patch


@dataclass(frozen=True)
class Layer:
    """One applied patch.

    For each site: the original values of the touched entries (n,), row by row, and a digest of what
    was written.
    """

    patch: Patch
    originals: dict[Site, Tensor]
    written: dict[Site, str]


Stack = list[Layer]  # oldest first
_STACKS: WeakKeyDictionary[nn.Module, Stack] = WeakKeyDictionary()


def stack_of(model: nn.Module) -> Stack:
    """The patches applied to this model object; a copy of the model starts with none."""
    return _STACKS.setdefault(model, [])


def views(
    patch: Patch, anatomy: Anatomy, view: Callable[[Site], WeightView], allow_tied: bool = True
) -> dict[Site, WeightView]:
    """Each site of the patch, opened with `view`.

    Raises: WrongBase if the model lacks it or has it in another shape; PackedWeight; TiedWeight,
    unless `allow_tied`, if another site shares its tensor.
    """
    found = {}
    for site, base in patch.base.items():
        made_on = f"the patch was made on {site} of shape (out {base.shape[0]}, in {base.shape[1]})"
        try:
            anatomy.resolve(site)
        except UnknownSite as error:
            raise WrongBase(
                f"{made_on}, which this model does not have: {error} Apply the patch to the model"
                " it was made on."
            ) from error
        found[site] = view(site)
        if found[site].shape != base.shape:
            n_out, n_in = found[site].shape
            raise WrongBase(
                f"{made_on}, but here it has shape (out {n_out}, in {n_in}). Apply the patch to the"
                " model it was made on."
            )
        tied = anatomy.tied_to(site)
        if tied and not allow_tied:
            raise TiedWeight(
                f"{site} shares its weights with {', '.join(map(str, tied))}, which the patch would"
                " change as well. Pass allow_tied=True if that is what you want."
            )
    return found


def put_on_(patch: Patch, sites: Mapping[Site, WeightView], stack: Stack) -> None:
    """Write the patch into `sites` and note it on `stack`.

    Raises: PatchConflict if it is on already, or overlaps with one that is on; WrongBase if a
    tensor is not what it was made on.
    """
    if any(layer.patch.digest == patch.digest for layer in stack):
        raise PatchConflict(
            f"this patch ({patch}) is applied already; undo it before applying it again."
        )
    after = {}
    layer = Layer(patch, {}, {})
    for site, view in sites.items():
        before = view.read()
        _check_base(patch, site, before, stack)
        after[site] = before.clone()
        for delta in patch.on(site):
            delta.apply_(after[site])
        mask = patch.touched(site).to(before.device)
        layer.originals[site] = before[mask]
        layer.written[site] = digest(after[site][mask])
    for site, matrix in after.items():
        sites[site].assign_(matrix)
    stack.append(layer)


def take_off_(
    patch: Patch,
    sites: Mapping[Site, WeightView],
    stack: Stack,
    recorded: Mapping[Site, str] | None = None,
    force: bool = False,
) -> None:
    """Put the original entries back, bit for bit, and take the patch off `stack`.

    A patch that is not on the stack (the model was loaded with it) goes off if the tensor holds
    what it writes and what is left is its base; `recorded` holds digests of tensors known to be
    made by this patch and others, which do as well. force: do not mind if the entries were changed
    since, put the originals back all the same.
    Raises: PatchConflict if a later patch holds the same entries; WrongBase; Refused for a low-rank
    patch that is not on the stack.
    """
    depth = next((i for i, layer in enumerate(stack) if layer.patch.digest == patch.digest), None)
    for later in stack if depth is None else stack[depth + 1 :]:
        if overlap(patch, later.patch):
            raise PatchConflict(
                f"a patch applied later ({later.patch}) holds some of the entries of this one"
                f" ({patch}); undo it first."
            )
    after = {}
    for site, view in sites.items():
        now = view.read()
        after[site] = now.clone()
        if depth is None:
            for delta in reversed(patch.on(site)):
                delta.undo_(after[site])
            left = (after[site], _beneath(site, after[site], stack))
            is_base = any(digest(m) == patch.base[site].digest for m in left if m is not None)
            if not is_base and (recorded or {}).get(site) != digest(now):
                raise WrongBase(
                    f"{site} holds what this patch ({patch}) writes, but without it the tensor"
                    f" would not be the one the patch was made on ({patch.base[site].digest[:12]}),"
                    " so something else has changed it too. Undo that first."
                )
        else:
            mask = patch.touched(site).to(now.device)
            if not force and digest(now[mask]) != stack[depth].written[site]:
                raise WrongBase(
                    f"the entries of {site} that this patch ({patch}) wrote hold other values now:"
                    " they were trained, loaded anew or patched again. Undoing it would overwrite"
                    " them; undo what came later first, or load the base model."
                )
            after[site][mask] = stack[depth].originals[site].to(now)
    for site, matrix in after.items():
        sites[site].assign_(matrix)
    if depth is not None:
        del stack[depth]


def overlap(p: Patch, q: Patch) -> list[Site]:
    """The sites where both patches touch an entry."""
    return [
        s
        for s in p.base
        if s in q.base
        and p.base[s].shape == q.base[s].shape
        and bool((p.touched(s) & q.touched(s)).any())
    ]


def _check_base(patch: Patch, site: Site, now: Tensor, stack: Stack) -> None:
    base, found = patch.base[site], digest(now)
    if found == base.digest:
        return
    below = _beneath(site, now, stack)
    if below is not None and digest(below) == base.digest:
        for layer in stack:
            if site in overlap(patch, layer.patch):
                raise PatchConflict(
                    f"{site}: an applied patch ({layer.patch}) holds some of the entries of this"
                    f" one ({patch}); undo it first."
                )
        return
    if found == base.result:
        raise PatchConflict(
            f"{site} is already as this patch ({patch}) makes it; undo the patch before applying it"
            " again."
        )
    raise WrongBase(
        f"{site}: the patch ({patch}) was made on {base.parameter} with digest {base.digest[:12]},"
        f" and here it has {found[:12]}. Apply the patch to the model it was made on, and patches"
        " that build on each other in the order they were made."
    )


def _beneath(site: Site, now: Tensor, stack: Stack) -> Tensor | None:
    """The matrix with all applied patches undone, as a copy; None if none touches the site."""
    layers = [layer for layer in stack if site in layer.originals]
    if not layers:
        return None
    below = now.clone()
    for layer in reversed(layers):
        below[layer.patch.touched(site).to(below.device)] = layer.originals[site].to(below)
    return below
