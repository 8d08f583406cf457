"""Several patches on one model at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from ..anatomy import Anatomy
from .patch import Patch


@contextmanager
def stacked(anatomy: Anatomy, patches: Sequence[Patch]) -> Iterator[None]:
    """Within the block all of `patches` are applied, in order.

    Raises: as `Patch.apply_`, with nothing changed.
    """
    with ExitStack() as on:
        for patch in patches:
            on.enter_context(patch.applied(anatomy))
        yield
