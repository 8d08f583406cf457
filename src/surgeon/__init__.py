"""Weight surgery for transformer language models: find what a model cannot live without, prove it,
take it out, repair it, rewrite facts in it, compress it, and put all back.

    >>> import surgeon
    >>> lab = surgeon.open("patient")
    >>> injury = lab.ablate("L0.mlp.down[24, :]")

Every name here is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import Any

# the module that each name comes from
_FACE = {
    "Anatomy": "anatomy",
    "Applied": "studies.apply",
    "Audit": "audit",
    "AuditConfig": "audit",
    "BadInput": "errors",
    "CellMap": "cells",
    "CellScreen": "studies.cells_screen",
    "CellSentences": "studies.cells_sentences",
    "CellTraining": "cells",
    "Conditioning": "studies.recipes.conditioning",
    "Corpus": "corpus",
    "CriticalSet": "find",
    "CriticalWeights": "audit",
    "Demo": "studies.demo",
    "Detection": "find",
    "EditConfig": "edit",
    "EditResult": "studies.edit",
    "EditsResult": "studies.edit_many",
    "EditsRecipe": "studies.recipes.edits",
    "Entry": "anatomy",
    "Explanation": "explain",
    "Exported": "studies.export",
    "Fact": "facts",
    "FindConfig": "find",
    "FindResult": "find",
    "GeneformerDamage": "studies.cells_geneformer",
    "Index": "studies.index",
    "IndexCheck": "studies.index_verify",
    "Injury": "studies.ablate",
    "Lab": "studies.lab",
    "LayerRanking": "studies.edit_layers",
    "Layout": "anatomy",
    "Loaded": "anatomy",
    "Measurement": "studies.measure",
    "Patch": "patch",
    "QuantizeConfig": "quantize",
    "QuantizeResult": "studies.quantize",
    "Refused": "errors",
    "Region": "anatomy",
    "RepairConfig": "repair",
    "RepairRecipe": "studies.recipes.repair",
    "RepairResult": "repair",
    "Result": "result",
    "Site": "anatomy",
    "SiteList": "studies.sites",
    "SurgeonError": "errors",
    "SweepResult": "studies.sweep",
    "SweepTable": "studies.sweep_table",
    "Tap": "tap",
    "TraceAverage": "trace",
    "TraceConfig": "trace",
    "TraceResult": "trace",
    "Undone": "studies.undo",
    "Verification": "find",
    "VerifyConfig": "find",
    "WeightView": "anatomy",
    "ablate": "patch",
    "apply_to_checkpoint": "patch",
    "capture": "tap",
    "detect": "find",
    "generate": "measure",
    "injured": "patch",
    "load": "patch",
    "load_corpus": "corpus",
    "load_model": "anatomy",
    "mean_nll": "measure",
    "open": "studies.lab:open_lab",
    "prove": "anatomy",
    "quantize_": "quantize",
    "read_facts": "facts",
    "read_text": "corpus",
    "resume": "tap",
    "run": "studies.registry",
    "save": "patch",
    "undo_on_checkpoint": "patch",
    "verify": "find",
}

__all__ = sorted(_FACE)


def __getattr__(name: str) -> Any:
    if name not in _FACE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, own = _FACE[name].partition(":")
    value = getattr(importlib.import_module(f"{__name__}.{module}"), own or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
