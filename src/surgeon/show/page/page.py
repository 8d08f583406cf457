"""The page: the headline, a section for each picture, what lies in the folder.

No script, and a policy that would stop one.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace
from math import floor, log10
from pathlib import Path
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ..pictures import headline_of, pictures_of
from ..pictures.picture import Cell, Headline, Picture, Table
from .folder import Filed, read_folder, shown

HERE = Path(__file__).parent
LONG = 32  # characters in a cell that may be broken into lines


def render(folder: Path) -> str:
    """The page of a run folder as text. Raises: BadInput as `read_folder`."""
    filed = read_folder(folder)
    headlines = [headline_of(one.result) for one in filed]
    pictures = [picture for one in filed for picture in _pictures(one)]
    return page(headlines, pictures, _files(folder))


def page(
    headlines: Sequence[Headline],
    pictures: Sequence[Picture],
    files: Sequence[tuple[str, int]] = (),
) -> str:
    """A page of these pictures, under the first headline and the claims of all."""
    style = (HERE / "page.css").read_text(encoding="utf-8")
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"cells": cells, "link": link, "shown": shown}
    return environment.get_template("page.html.j2").render(
        headline=headlines[0].sentence,
        claims=[claim for headline in headlines for claim in headline.claims],
        pictures=pictures,
        files=files,
        style=Markup(style),
        style_hash=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
    )


def _pictures(filed: Filed) -> list[Picture]:
    """The sections of a result, each with its file and the command that measures it again."""
    command = filed.result.provenance.command or ""
    drawn = pictures_of(filed.result)
    return [replace(picture, file=filed.file, command=command) for picture in drawn]


def cells(table: Table) -> list[list[tuple[str, str]]]:
    """The cells of a table as text, each with the class it is shown in; the numbers of a column
    have as many decimals as one another.
    """
    columns = [
        [_cell(value, _decimals(column)) for value in column]
        for column in zip(*table.rows, strict=True)
    ]
    return [list(row) for row in zip(*columns, strict=True)]


def _decimals(column: Sequence[Cell]) -> int:
    """As many as give the largest number four figures."""
    largest = max((abs(v) for v in column if isinstance(v, float)), default=0.0)
    return min(6, max(0, 3 - floor(log10(largest)))) if largest else 1


def _cell(value: Cell, decimals: int) -> tuple[str, str]:
    if value is None:
        return "–", "number"
    if isinstance(value, float):
        small = 0 < abs(value) < 10**-decimals  # a p-value of 0.0005 is not 0.000
        return (f"{value:.1g}" if small else f"{value:,.{decimals}f}"), "number"
    if isinstance(value, int):
        return f"{value:,}", "number"
    return value, "long" if len(value) > LONG else ""


def link(name: str) -> str:
    """A file of the folder as a relative address.

    The dot keeps a name like `javascript:...` from being read as a scheme.
    """
    return "./" + quote(os.fsencode(name))


def _files(folder: Path) -> list[tuple[str, int]]:
    """Everything in the folder that is not the report: name, bytes."""
    return [
        (p.name, p.stat().st_size)
        for p in sorted(folder.iterdir())
        if p.is_file() and p.name != "report.html" and not p.name.startswith(".")
    ]
