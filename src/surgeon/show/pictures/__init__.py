"""The pictures that the report and notebooks have of a result, by its kind.

A kind that has any is listed here with the module of this package that draws it and a name: its
pictures are made by `NAME_pictures(result)`, its headline, if it has one, by `NAME_headline`.
Listed in the order in which they stand on a page.
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


def pictures_of(result: Result) -> list[Picture]:
    """The pictures of a result; none for a kind that has none."""
    draw = _function(result, "pictures")
    return [] if draw is None else list(draw(result))


def headline_of(result: Result) -> Headline:
    """The sentence and the claims that a page about this result begins with."""
    from .picture import Headline, model_name

    write = _function(result, "headline")
    if write is None:
        return Headline(f"Measurements of {model_name(result.provenance.model)}")
    headline: Headline = write(result)
    return headline


def _function(result: Result, what: str) -> Callable[[Any], Any] | None:
    if result.kind not in KINDS:
        return None
    module, _, name = KINDS[result.kind].partition(":")
    found = importlib.import_module(f".{module}", __package__)
    function: Callable[[Any], Any] | None = getattr(found, f"{name}_{what}", None)
    return function
