"""The states of a model that an explanation compares: base, broken and patched."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from ..anatomy import Anatomy
from ..errors import BadInput
from ..patch import Patch, applied_patches

Progress = Callable[[str, int, int], None]


def states(patches: Sequence[Patch]) -> dict[str, tuple[Patch, ...]]:
    """The patches of each state: none in "base", the first, the injury, in "broken".

    Where others follow, all of them together are "patched".
    Raises: BadInput if there is no patch.
    """
    if not patches:
        raise BadInput(
            "there is nothing to explain without a patch; give at least one, the injury first."
        )
    named: dict[str, tuple[Patch, ...]] = {"base": (), "broken": tuple(patches[:1])}
    if len(patches) > 1:
        named["patched"] = tuple(patches)
    return named


@contextmanager
def stacked(anatomy: Anatomy, patches: Sequence[Patch]) -> Iterator[None]:
    """The patches applied in order within the block.

    Raises: as `Patch.apply_`, with nothing changed.
    """
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch.applied(anatomy))
        yield


def require_stack(anatomy: Anatomy, patches: Sequence[Patch]) -> None:
    """Check that the model is a base, and that the patches stack on it.

    Raises: BadInput if the model carries patches already, so that its base cannot be seen; as
    `Patch.apply_` if these do not stack.
    """
    if applied := applied_patches(anatomy):
        raise BadInput(
            f"{applied[-1]} is applied to this model; undo it, so that the base is seen as well."
        )
    with stacked(anatomy, patches):
        pass
