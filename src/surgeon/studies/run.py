"""`run`: a recipe, that is an experiment written down, with published figures beside the measured
ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import BadInput
from ..settings import setting
from .desk import Desk
from .recipes import conditioning, edits, repair
from .recipes.conditioning import Conditioning
from .recipes.edits import EditsRecipe
from .recipes.reading import read_recipe
from .recipes.repair import RepairRecipe

# the keys that only this kind of recipe has
KINDS = {
    "injury": repair.run,
    "edits": edits.run,
    "together": edits.run,
    "conditioning": conditioning.run,
}


@dataclass(frozen=True)
class Settings:
    """Run a RECIPE (YAML): an injury and its repair, edits and their controls, or what conditions
    an edit; published figures stand beside the measured ones.

    A step of a recipe has the settings of the verb that takes it.
    """

    recipe: str = setting(help="the recipe", metavar="RECIPE", is_file=True)
    model: str | None = setting(None, "another model than the recipe's")
    text: str | None = setting(
        None,
        "UTF-8 text to work and judge on; not given: the recipe's, or the patient's held-out text",
        metavar="FILE",
        is_file=True,
    )


def run(desk: Desk, settings: Settings) -> RepairRecipe | EditsRecipe | Conditioning:
    recipe = read_recipe(Path(settings.recipe), settings.model, settings.text)
    kinds = list(dict.fromkeys(work for key, work in KINDS.items() if key in recipe.body))
    if len(kinds) != 1:
        there = [key for key in KINDS if key in recipe.body]
        raise BadInput(
            f"{recipe.path} should hold one of {', '.join(KINDS)}, and it holds"
            f" {' and '.join(there) or 'none of them'}."
        )
    result: Any = kinds[0](desk, recipe)
    about = result.provenance
    own = desk.provenance(settings).settings
    finished: RepairRecipe | EditsRecipe | Conditioning
    finished = replace(result, provenance=replace(about, settings=own))
    return finished
