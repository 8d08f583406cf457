"""The report: a run folder as one self-contained HTML file."""

from __future__ import annotations

from pathlib import Path

from ... import files
from ...errors import MissingExtra

NAME = "report.html"

__all__ = ["NAME", "write_report"]


def write_report(folder: Path) -> Path:
    """Write `report.html` beside the results in `folder`, from what they hold; the same folder
    gives the same bytes.

    Raises: MissingExtra without `weight-surgeon[report]`; BadInput for a folder without results, a
    damaged one, or one that cannot be written to.
    """
    try:
        from .page import render
    except ImportError as error:
        raise MissingExtra("a report", "report") from error
    path = folder / NAME
    files.write_text(path, render(folder))
    return path
