"""Every study by its name: where it lies, what it needs, and how it is called.

The table is light: names and sentences, so that a list of verbs costs no import. A study's module
has `Settings`, a frozen dataclass; `run(lab, settings)`, which gives a Result; it is imported when
the study is looked into. It may have `failed(result, settings)`, see `Study.failure`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import BadInput
from ..result import Result
from ..settings import configured, nearest
from .desk import Desk


@dataclass(frozen=True)
class Study:
    """One verb.

    name: as it is typed. summary: its line in the help. opens: whether it works on a model, on one
    that may be streamed, or on none. model: the one that it opens where none is named, if any.
    leading: the setting that a method's first argument gives. positional: settings that are
    arguments on the command line, in order. output: what `-o` names there: the file of a patch, the
    run folder, or nothing. csv: whether it can be printed as CSV. seeded: whether its seed changes
    anything.
    """

    name: str
    summary: str
    opens: str = "model"
    model: str = ""
    leading: str = "at"
    positional: tuple[str, ...] = ()
    output: str = ""
    csv: bool = False
    seeded: bool = True

    @property
    def module(self) -> Any:
        name = self.name.replace(" ", "_").replace("-", "_")
        return importlib.import_module(f".{name}", __package__)

    @property
    def settings(self) -> type[Any]:
        kind: type[Any] = self.module.Settings
        return kind

    def configured(self, given: Mapping[str, Any]) -> Any:
        """Its settings: what is given by name, and else the defaults. Raises: BadInput."""
        return configured(self.settings, given, self.name)

    def run(self, lab: Any, given: Mapping[str, Any]) -> Any:
        """The study's result, with the call in Python that makes it again.

        given: settings by name. Raises: BadInput for settings that it does not have, or that cannot
        be.
        """
        result = self.module.run(lab, self.configured(given))
        return result.made(command=self._call(lab, result.provenance.settings, given))

    def failure(self, result: Any, settings: Any) -> str | None:
        """A sentence about a result that is a failure to the command line, which then ends with
        status 1: that of the module's `failed(result, settings)`, where it has one.
        """
        failed = getattr(self.module, "failed", None)
        sentence: str | None = None if failed is None else failed(result, settings)
        return sentence

    def _call(self, lab: Any, settings: Mapping[str, Any], given: Mapping[str, Any]) -> str:
        """The call that makes the result again; its settings as the result records them."""
        words = [f"{name}={settings.get(name, given[name])!r}" for name in given]
        if lab.name:
            return f"lab.{self.name.replace(' ', '_')}({', '.join(words)})"
        return f"surgeon.run({', '.join([repr(self.name), *words])})"


_ALL = (
    Study(
        "demo",
        "Find, break, repair, edit and put back: the whole story.",
        model="patient",
        leading="prompt",
        output="folder",
    ),
    Study("sites", "List every addressable weight matrix.", seeded=False),
    Study("find", "Find critical weights, verified against matched controls.", opens="stream"),
    Study("verify", "Measure what the model loses without given weights."),
    Study("ablate", "Write an injury as a patch.", output="patch"),
    Study(
        "repair",
        "Heal an injury with a patch, beside a control.",
        leading="injury",
        output="patch",
    ),
    Study(
        "measure",
        "Measure likelihood and behaviour, with patches or without.",
        leading="patches",
        seeded=False,
    ),
    Study(
        "audit",
        "Compare the critical weights of two checkpoints.",
        opens="",
        leading="other",
        positional=("base", "other"),
        seeded=False,
    ),
    Study("trace", "Find which states carry a fact.", leading="prompt"),
    Study("edit", "Rewrite a fact, as a patch.", leading="prompt", output="patch"),
    Study("edit layers", "Find the best layer to edit, by trial edits.", leading="facts"),
    Study(
        "edit many",
        "Rewrite facts one after the other, with guard rails.",
        leading="facts",
        output="patch",
    ),
    Study(
        "quantize",
        "Round to few bits with the critical weights held out.",
        opens="stream",
        leading="bits",
        seeded=False,
    ),
    Study("explain", "Say how a patch works.", leading="patches"),
    Study(
        "cells train",
        "Train a small model of gene expression.",
        opens="",
        positional=("data",),
    ),
    Study(
        "cells screen",
        "Screen a model of cells for weights it cannot live without.",
        opens="",
        positional=("folder", "data"),
    ),
    Study(
        "cells map",
        "Map what falls with given weights: genes, cells, pathways.",
        opens="",
        positional=("folder", "data"),
    ),
    Study(
        "cells sentences",
        "Write cells as text for a language model of cells.",
        opens="",
        positional=("data",),
    ),
    Study(
        "cells geneformer",
        "Measure what a Geneformer loses without given weights.",
        leading="data",
        positional=("data",),
    ),
    Study(
        "sweep",
        "Run many models, verbs and seeds; resumable.",
        opens="",
        positional=("plan",),
    ),
    Study(
        "sweep table",
        "The results of a sweep as a table.",
        opens="",
        positional=("directory",),
        csv=True,
    ),
    Study(
        "run",
        "Run a recipe: published figures beside the measured ones.",
        opens="",
        positional=("recipe",),
        output="folder",
    ),
    Study(
        "apply",
        "Write a checkpoint with patches applied.",
        opens="",
        positional=("model",),
    ),
    Study(
        "undo",
        "Write a checkpoint with a patch taken off.",
        opens="",
        positional=("model",),
    ),
    Study(
        "export",
        "Write a patch as a PEFT LoRA adapter.",
        opens="",
        positional=("patch",),
    ),
    Study("index", "List the published super weights.", opens=""),
    Study(
        "index verify",
        "Compare the published super weights with a model.",
        opens="",
        positional=("model",),
    ),
)
STUDIES = {study.name: study for study in _ALL}
# first words of names that are no studies themselves
FAMILIES = {"cells": "The same for models of gene expression."}


def branches_of(word: str) -> dict[str, str]:
    """The studies whose names begin with that word, with their summaries: `edit layers` of
    `edit`.
    """
    return {one.name: one.summary for one in _ALL if one.name.startswith(f"{word} ")}


def study_named(name: str) -> Study:
    """The study of this name. Raises: BadInput, with the nearest."""
    if name not in STUDIES:
        raise BadInput(f"{name} is no verb{nearest(name, STUDIES)}")
    return STUDIES[name]


def run(verb: str, /, **settings: Any) -> Any:
    """The result of a verb that opens no model, like `surgeon.run("index")`.

    Raises: BadInput for a verb that there is not, or a setting it does not have.
    """
    study = study_named(verb)
    if study.opens:
        method = verb.replace(" ", "_")
        raise BadInput(f"{verb} works on a model; use surgeon.open(MODEL).{method}(...).")
    return study.run(Desk(), settings)


# where the class of each kind of result is, from the package's root
RESULTS = {
    "sites": "studies.sites:SiteList",
    "find": "find:FindResult",
    "detect": "find:Detection",
    "verify": "find:Verification",
    "ablate": "studies.ablate:Injury",
    "repair": "repair:RepairResult",
    "measure": "studies.measure:Measurement",
    "audit": "audit:Audit",
    "trace": "trace:TraceResult",
    "trace average": "trace:TraceAverage",
    "edit": "studies.edit:EditResult",
    "edit layers": "studies.edit_layers:LayerRanking",
    "edit many": "studies.edit_many:EditsResult",
    "quantize": "studies.quantize:QuantizeResult",
    "explain": "explain:Explanation",
    "cells train": "cells:CellTraining",
    "cells screen": "studies.cells_screen:CellScreen",
    "cells map": "cells:CellMap",
    "cells sentences": "studies.cells_sentences:CellSentences",
    "cells geneformer": "studies.cells_geneformer:GeneformerDamage",
    "demo": "studies.demo:Demo",
    "sweep": "studies.sweep:SweepResult",
    "sweep table": "studies.sweep_table:SweepTable",
    "recipe repair": "studies.recipes.repair:RepairRecipe",
    "recipe edits": "studies.recipes.edits:EditsRecipe",
    "recipe conditioning": "studies.recipes.conditioning:Conditioning",
    "apply": "studies.apply:Applied",
    "undo": "studies.undo:Undone",
    "export": "studies.export:Exported",
    "index": "studies.index:Index",
    "index verify": "studies.index_verify:IndexCheck",
}


def result_class(kind: str) -> type[Result]:
    """The class of the results of a kind."""
    module, _, name = RESULTS[kind].partition(":")
    found: type[Result] = getattr(importlib.import_module(f"...{module}", __name__), name)
    return found


def read_result(document: Mapping[str, Any]) -> Result:
    """The result that a JSON document holds. Raises: BadInput if it holds none, or is damaged."""
    kind = document.get("kind")
    if not isinstance(kind, str) or kind not in RESULTS:
        raise BadInput(f"this document is no result of Surgeon: its kind is {kind!r}.")
    return result_class(kind).from_json(document)
