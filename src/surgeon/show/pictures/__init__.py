"""The pictures that the report and notebooks have of a result, by its kind.

A kind with pictures of its own is listed here with the module of this package that draws it and a
name: its pictures are made by `NAME_pictures(result)`, its headline by `NAME_headline`. Listed in
the order in which they stand on a page; the others follow, and are shown by their fields.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ...result import Result

if TYPE_CHECKING:
    from .picture import Headline, Picture

KINDS = {
    "demo": "demo:demo",
    "find": "critical:find",
    "detect": "critical:detect",
    "verify": "critical:verify",
    "ablate": "models:injury",
    "repair": "healing:repair",
    "recipe repair": "recipes:repair_recipe",
    "explain": "working:explain",
    "edit layers": "editing:layers",
    "edit": "editing:edit",
    "edit many": "editing:edits",
    "recipe edits": "recipes:edits_recipe",
    "recipe conditioning": "recipes:conditioning",
    "trace": "editing:trace",
    "trace average": "editing:average",
    "quantize": "compression:quantize",
    "measure": "models:measure",
    "audit": "audit:audit",
    "sites": "models:sites",
    "cells train": "cells:train",
    "cells screen": "cells:screen",
    "cells map": "cell_maps:map",
    "cells sentences": "cells:sentences",
    "cells geneformer": "cells:geneformer",
}


_BY_FIELDS = "fields:field"


def pictures_of(result: Result) -> list[Picture]:
    """The pictures of a result."""
    return list(_function(result, "pictures")(result))


def place_of(kind: str) -> int:
    """Where results of this kind stand on a page."""
    order = list(KINDS)
    return order.index(kind) if kind in KINDS else len(order)


def headline_of(result: Result) -> Headline:
    """The sentence and the claims that a page about this result begins with."""
    headline: Headline = _function(result, "headline")(result)
    return headline


def _function(result: Result, what: str) -> Callable[[Any], Any]:
    module, _, name = KINDS.get(result.kind, _BY_FIELDS).partition(":")
    drawing = importlib.import_module(f".{module}", __package__)
    function: Callable[[Any], Any] = getattr(drawing, f"{name}_{what}")
    return function
