"""The states of a model that an explanation compares: base, broken by the injury, patched with the
repair.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..anatomy import Anatomy
from ..errors import BadInput
from ..patch import Patch, applied_patches, stacked


def states(patches: Sequence[Patch]) -> dict[str, tuple[Patch, ...]]:
    """The patches of each state. The first patch is the injury; where others follow, all of them
    together are "patched".

    Raises: BadInput if there is no patch.
    """
    if not patches:
        raise BadInput(
            "there is nothing to explain without a patch; give at least one, the injury first."
        )
    both = {"base": (), "broken": tuple(patches[:1])}
    return both | ({"patched": tuple(patches)} if len(patches) > 1 else {})


def require_stack(anatomy: Anatomy, patches: Sequence[Patch]) -> None:
    """Raises: BadInput if the model carries patches already, so that its base cannot be seen; as
    `Patch.apply_` if these do not stack.
    """
    if on := applied_patches(anatomy):
        raise BadInput(
            f"{on[-1]} is applied to this model; undo it, so that the base is seen as well."
        )
    with stacked(anatomy, patches):
        pass
