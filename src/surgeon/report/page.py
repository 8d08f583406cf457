"""The page: the headline, a section for each picture, what lies in the folder.

No script, and a policy that would stop one.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import exp, floor, log10
from pathlib import Path
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from .cells import map_pictures, screen_pictures
from .compression import quantize_pictures
from .critical import find_pictures, state_pictures, verify_pictures
from .editing import (
    average_pictures,
    conditioning_pictures,
    edit_pictures,
    edits_pictures,
    trace_pictures,
)
from .folder import Result, read_folder, reading, shown
from .healing import measure_pictures, recipe_pictures, repair_pictures
from .influence import token_pictures
from .picture import Cell, Picture, Table, many, nats, percent
from .working import explain_pictures

HERE = Path(__file__).parent
LONG = 32  # characters in a cell that may be broken into lines
SECTIONS: dict[str, Callable[[Result], Iterator[Picture]]] = {
    "find": find_pictures,
    "verify": verify_pictures,
    "states": state_pictures,
    "recipe": recipe_pictures,
    "repair": repair_pictures,
    "explain": explain_pictures,
    "edits": edits_pictures,
    "conditioning": conditioning_pictures,
    "edit": edit_pictures,
    "trace": trace_pictures,
    "average": average_pictures,
    "cells screen": screen_pictures,
    "cells map": map_pictures,
    "quantize": quantize_pictures,
    "measure": measure_pictures,
    "tokens": token_pictures,
}


@dataclass(frozen=True)
class Claim:
    """A number of the headline, and beneath it the control it stands beside. kind: its colour."""

    kind: str
    value: str
    what: str
    control: str


def render(folder: Path) -> str:
    """The page as text.

    Raises: BadInput as `read_folder`, or for a document that is not as its verb writes it.
    """
    results = read_folder(folder)
    pictures = [picture for result in results for picture in reading(result, _pictures)]
    headline, claims = "", []
    for result in results:
        said, more = reading(result, _claims)
        headline = headline or said
        claims += more
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
        headline=headline,
        claims=claims,
        pictures=pictures,
        files=_files(folder),
        style=Markup(style),
        style_hash=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
    )


def _pictures(result: Result) -> list[Picture]:
    """The sections of a result, with the command that made it, where its document records one."""
    built = SECTIONS[result.kind](result)
    made_by = result.command
    return (
        list(built)
        if made_by is None
        else [replace(picture, command=made_by, exact=True) for picture in built]
    )


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


def _claims(result: Result) -> tuple[str, list[Claim]]:
    """The sentence at the top as this result would have it, and its numbers beside their
    controls.
    """
    d, model = result.data, _name(result.model)
    if result.kind == "find":
        vital = [s for s in d["sets"] if s["vital"]]
        if not vital:
            return f"Nothing that {model} cannot live without was found", []
        n, damage, controls = len(vital[0]["entries"]), vital[0]["damage"], vital[0]["controls"]
        where = {"row": " in one row", "column": " in one column"}.get(vital[0]["geometry"], "")
        joint, worst, (low, high) = damage["joint_nats"], controls["max_nats"], damage["ci95"]
        lost = (
            f"per token lost when {'it is' if n == 1 else f'all {n:,} are'} set to zero (95%:"
            f" {nats(low)} to {nats(high)})"
        )
        return (
            (
                f"One weight is vital to {model}"
                if n == 1
                else f"{n:,} weights{where} are vital to {model}"
            ),
            [
                Claim(
                    "broken",
                    f"{nats(joint)} nats",
                    lost,
                    f"{controls['n']} matched random sets: {nats(worst)} at worst",
                ),
                Claim(
                    "broken",
                    f"× {exp(joint):.2f}",
                    "in perplexity",
                    f"matched random sets: × {exp(worst):.2f} at worst",
                ),
            ],
        )
    if result.kind == "repair":
        control = (d.get("control") or {}).get("recovered")
        beside = (
            "no control was run"
            if control is None
            else f"the same on a random row: {percent(control)}"
        )
        undone = f"of the damage undone by a patch of {d['patch_bytes'] / 1000:.1f} kB"
        return f"{model} was broken and repaired", [
            Claim("patched", percent(d["recovered"]), undone, beside)
        ]
    if result.kind in ("recipe", "edits", "conditioning"):
        return str(d.get("title", f"A recipe for {model}")), []
    if result.kind == "edit":
        p, controls = d["target_probability"], d["controls"]
        changed = sum(c["changed"] for c in controls)
        beside = (
            f"{changed} of {many(len(controls), 'control prompt')} changed"
            if controls
            else "no control prompts were given"
        )
        said = f"probability of the new answer, {p['before']:.3f} before"
        return f"{model} says something else", [Claim("patched", f"{p['after']:.3f}", said, beside)]
    titles = {
        "verify": f"What {model} loses without the given weights",
        "explain": f"How patches of {model} work",
        "trace": f"Where {model} keeps a fact",
        "average": f"Where {model} keeps facts",
        "quantize": f"{model} in fewer bits",
        "cells screen": f"Is there a weight that {model} cannot live without?",
        "cells map": f"What {model} loses: genes, cells and pathways",
    }
    return titles.get(result.kind, f"Measurements of {model}"), []


def _name(model: str) -> str:
    """A model as a headline has it: a folder by its own name, not by where it lies on some
    machine.
    """
    return Path(model).name or model if model.startswith(("/", ".", "~")) else model
