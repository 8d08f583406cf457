"""A result as text for a terminal, by its kind."""

from __future__ import annotations

import importlib

from ...result import Result
from ..console import out

# the module of this package that shows each kind, and the function in it
KINDS = {
    "demo": "demo:print_demo",
    "find": "critical:print_find",
    "detect": "critical:print_detection",
    "verify": "critical:print_verify",
    "ablate": "models:print_injury",
    "sites": "models:print_sites",
    "repair": "healing:print_repair",
    "measure": "models:print_measure",
    "audit": "audit:print_audit",
    "edit": "editing:print_edit",
    "edit many": "editing:print_edits",
    "edit layers": "editing:print_layers",
    "trace": "editing:print_trace",
    "trace average": "editing:print_average",
    "explain": "working:print_explanation",
    "cells train": "cells:print_train",
    "cells screen": "cells:print_screen",
    "cells map": "cells:print_map",
    "cells sentences": "cells:print_sentences",
    "cells geneformer": "cells:print_geneformer",
    "sweep": "sweeps:print_sweep",
    "sweep table": "sweeps:print_sweep_table",
    "recipe repair": "recipes:print_repair_recipe",
    "recipe edits": "recipes:print_edits_recipe",
    "recipe conditioning": "recipes:print_conditioning",
    "apply": "files:print_applied",
    "undo": "files:print_undone",
    "export": "files:print_exported",
    "index": "index:print_index",
    "index verify": "index:print_index_check",
    "quantize": "quantize:print_quantize",
}


def print_result(result: Result) -> None:
    """Print a result; one of a kind that has no text of its own by its fields."""
    if result.kind not in KINDS:
        out.print(repr(result), markup=False)
        return
    module, _, function = KINDS[result.kind].partition(":")
    getattr(importlib.import_module(f".{module}", __package__), function)(result)
