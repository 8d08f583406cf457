"""A result in a notebook: the pictures that the report has of it, in a frame of its own.

The page is the report's, with its policy against scripts; the frame is sandboxed, so that nothing a
model wrote can reach the notebook.
"""

from __future__ import annotations

from dataclasses import replace
from html import escape
from typing import Any

from ..errors import MissingExtra
from ..result import Result, attached_files

HEIGHT = 640  # pixels of the frame


def html(result: Result) -> str:
    """The result as HTML: its pictures; its fields as text where an extra is missing."""
    plain = f"<pre>{escape(repr(result))}</pre>"
    try:
        page = _page(result)
    except MissingExtra:
        return plain
    return (
        f'<iframe sandbox srcdoc="{escape(page)}" width="100%" height="{HEIGHT}"'
        ' style="border: 0"></iframe>'
    )


def _page(result: Result) -> str:
    try:
        from .page.page import page
        from .pictures import headline_of, pictures_of
    except ImportError as error:
        raise MissingExtra("a picture", "report") from error
    from .page.folder import visible

    shown = type(result).from_json(visible(result.to_json()))
    tables: dict[str, Any] = {
        name: visible(getattr(result, name))
        for name, file in attached_files(type(result)).items()
        if file.endswith(".parquet")
    }
    shown = replace(shown, **tables)
    command = shown.provenance.command or ""
    pictures = [replace(one, command=command) for one in pictures_of(shown)]
    return page([headline_of(shown)], pictures)
