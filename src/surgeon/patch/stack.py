"""The patches that lie on one model, and the rules for putting one on and for taking one off."""

# How this works.
#
# Each model object has a stack of applied patches. A layer of the stack keeps the original entries
# under its patch, so that taking it off restores their bits, and a digest of what it wrote, so that
# a change made since is noticed and not overwritten.
#
# * Putting on: the tensor must be the one the patch was made on, as it stands or with everything on
#   the stack undone. In the second case no applied patch may touch an entry that this one touches.
# * Taking off: no later patch may touch the same entries; apart from that the order is free.
# * A patch may be on without being on the stack: the model was saved with it and loaded again.
#   Then its own old and new values decide, and what is left must be its base.
#
# Everything is computed on copies and checked; only then are matrices written. The rules know only
# `WeightView`s, so they are the same for a model in memory and for tensors of a checkpoint.

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from jaxtyping import Float
from torch import Tensor, nn

from ..anatomy import Anatomy, Site, WeightView, digest
from ..errors import PatchConflict, TiedWeight, UnknownSite, WrongBase
from .content import Content


@dataclass(frozen=True)
class Layer:
    """One applied patch.

    For each site: the original values of the touched entries (n,), row by row, and a digest of what
    was written there.
    """

    patch: Content
    originals: dict[Site, Tensor]
    written: dict[Site, str]


Stack = list[Layer]  # oldest first
# beside the models, not on them: a stack must not be copied, saved or kept alive with one
_STACKS: WeakKeyDictionary[nn.Module, Stack] = WeakKeyDictionary()


def stack_of(model: nn.Module) -> Stack:
    """The patches applied to this model object; a copy of the model starts with none."""
    return _STACKS.setdefault(model, [])


def views(
    patch: Content, anatomy: Anatomy, view: Callable[[Site], WeightView], allow_tied: bool = True
) -> dict[Site, WeightView]:
    """Each site of the patch, opened with `view`.

    Raises: WrongBase if the model lacks it or has it in another shape; PackedWeight; TiedWeight,
    unless `allow_tied`, if another site shares its tensor.
    """
    opened = {}
    for site, base in patch.base.items():
        made_on = f"the patch was made on {site} of shape (out {base.shape[0]}, in {base.shape[1]})"
        try:
            anatomy.resolve(site)
        except UnknownSite as error:
            raise WrongBase(
                f"{made_on}, which this model does not have: {error} Apply the patch to the model"
                " it was made on."
            ) from error
        opened[site] = view(site)
        n_out, n_in = opened[site].shape
        if (n_out, n_in) != base.shape:
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
    return opened


def put_on_(patch: Content, sites: Mapping[Site, WeightView], stack: Stack) -> None:
    """Write the patch into `sites` and note it on `stack`.

    Raises: PatchConflict if it is on already, or overlaps with one that is on; WrongBase if a
    tensor is not what it was made on.
    """
    if _depth(patch, stack) is not None:
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
    patch: Content,
    sites: Mapping[Site, WeightView],
    stack: Stack,
    recorded: Mapping[Site, str] | None = None,
    force: bool = False,
) -> None:
    """Put the original entries back, bit for bit, and take the patch off `stack`.

    recorded: digests of tensors known to be made by this patch and others, which do as well as its
    base does where the patch is not on the stack. force: put the originals back also where the
    entries were changed since.
    Raises: PatchConflict if a later patch holds the same entries; WrongBase; Refused for a low-rank
    patch that is not on the stack.
    """
    depth = _depth(patch, stack)
    for later in stack if depth is None else stack[depth + 1 :]:
        if overlap(patch, later.patch):
            raise PatchConflict(
                f"a patch applied later ({later.patch}) holds some of the entries of this one"
                f" ({patch}); undo it first."
            )
    after = {}
    for site, view in sites.items():
        now = view.read()
        if depth is None:
            after[site] = _without_loaded(patch, site, now, stack, (recorded or {}).get(site))
        else:
            after[site] = _without_layer(stack[depth], site, now, force)
    for site, matrix in after.items():
        sites[site].assign_(matrix)
    if depth is not None:
        del stack[depth]


def overlap(p: Content, q: Content) -> list[Site]:
    """The sites where both patches touch an entry."""
    sites = []
    for site in p.base:
        if site not in q.base or p.base[site].shape != q.base[site].shape:
            continue
        if bool((p.touched(site) & q.touched(site)).any()):
            sites.append(site)
    return sites


def _depth(patch: Content, stack: Stack) -> int | None:
    """Where the patch lies on the stack, counted from the oldest; None if it does not."""
    digests = [layer.patch.digest for layer in stack]
    return digests.index(patch.digest) if patch.digest in digests else None


def _without_layer(
    layer: Layer, site: Site, now: Float[Tensor, "out in"], force: bool
) -> Float[Tensor, "out in"]:
    """The matrix `now` with the original entries of a layer of the stack, as a copy."""
    patch = layer.patch
    mask = patch.touched(site).to(now.device)
    if not force and digest(now[mask]) != layer.written[site]:
        raise WrongBase(
            f"the entries of {site} that this patch ({patch}) wrote hold other values now: they"
            " were trained, loaded anew or patched again. Undoing it would overwrite them; undo"
            " what came later first, or load the base model."
        )
    after = now.clone()
    after[mask] = layer.originals[site].to(now)
    return after


def _without_loaded(
    patch: Content,
    site: Site,
    now: Float[Tensor, "out in"],
    stack: Stack,
    recorded: str | None,
) -> Float[Tensor, "out in"]:
    """The matrix `now` without a patch that the model was loaded with, as a copy."""
    after = now.clone()
    for delta in reversed(patch.on(site)):
        delta.undo_(after)
    base = patch.base[site].digest
    if digest(after) == base or recorded == digest(now):
        return after
    below = _beneath(site, after, stack)
    if below is not None and digest(below) == base:
        return after
    raise WrongBase(
        f"{site} holds what this patch ({patch}) writes, but without it the tensor would not be the"
        f" one the patch was made on ({base[:12]}), so something else has changed it too. Undo that"
        " first."
    )


def _check_base(patch: Content, site: Site, now: Float[Tensor, "out in"], stack: Stack) -> None:
    """Raises: WrongBase or PatchConflict if the patch cannot go on the matrix as it is now."""
    base = patch.base[site]
    digest_now = digest(now)
    if digest_now == base.digest:
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
    if digest_now == base.result:
        raise PatchConflict(
            f"{site} is already as this patch ({patch}) makes it; undo the patch before applying it"
            " again."
        )
    raise WrongBase(
        f"{site}: the patch ({patch}) was made on {base.parameter} with digest {base.digest[:12]},"
        f" and here it has {digest_now[:12]}. Apply the patch to the model it was made on, and"
        " patches that build on each other in the order they were made."
    )


def _beneath(
    site: Site, now: Float[Tensor, "out in"], stack: Stack
) -> Float[Tensor, "out in"] | None:
    """The matrix with all applied patches undone, as a copy; None if none touches the site."""
    layers = [layer for layer in stack if site in layer.originals]
    if not layers:
        return None
    below = now.clone()
    for layer in reversed(layers):
        mask = layer.patch.touched(site).to(below.device)
        below[mask] = layer.originals[site].to(below)
    return below
