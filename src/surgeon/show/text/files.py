"""What was written in the formats of the ecosystem, as text."""

from __future__ import annotations

from ...studies.apply import Applied
from ...studies.export import Exported
from ...studies.undo import Undone
from ..console import out, shown


def print_applied(result: Applied) -> None:
    """Which checkpoint was written."""
    patches = "1 patch" if len(result.patches) == 1 else f"{len(result.patches)} patches"
    out.print(shown(f"{patches} applied to {result.provenance.model}: {result.output}"))


def print_undone(result: Undone) -> None:
    """Which checkpoint was written."""
    out.print(shown(f"{result.patch} taken off {result.provenance.model}: {result.output}"))


def print_exported(result: Exported) -> None:
    """Which adapter was written."""
    targets = ", ".join(result.targets)
    out.print(
        shown(f"{result.patch} as an adapter of rank {result.rank} on {targets}: {result.output}")
    )
