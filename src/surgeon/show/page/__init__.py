"""The report: a run folder as one self-contained HTML file."""

from __future__ import annotations

import os
from pathlib import Path

from ...errors import BadInput, MissingExtra

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
    page = render(folder)
    path = folder / NAME
    part = folder / f".{NAME}.{os.getpid()}.part"
    try:
        part.write_text(page, encoding="utf-8", newline="\n")
        os.replace(part, path)
    except OSError as error:
        raise BadInput(f"cannot write {path}: {error.strerror}; choose another place.") from error
    finally:
        part.unlink(missing_ok=True)
    return path
