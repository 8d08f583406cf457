"""A recipe with an injury and its repair; published figures beside the measured ones."""

from __future__ import annotations

from typing import Any

from ...anatomy import Region
from ...errors import BadInput
from ...repair import RepairResult
from ...result import Result, record, result
from ..desk import Desk
from ..naming import VITAL, several
from .reading import Recipe

# figures that a repair measures, for whoever wonders
SHOWN = (
    "nll.base",
    "nll.broken",
    "nll.patched",
    "kl.broken",
    "kl.patched",
    "recovered",
    "cosine_to_row",
    "row_norm",
    "delta_norm",
)


@record
class Figure:
    """A published figure, by its name in the repair's document, and what was measured here."""

    figure: str
    published: float
    measured: float


@result("recipe repair")
class RepairRecipe(Result):
    """A model broken and repaired as a recipe says."""

    title: str
    figures: list[Figure]
    repair: RepairResult


def run(desk: Desk, recipe: Recipe) -> RepairRecipe:
    """Injure and repair: the recipe's `injury` has settings of ablate, its `repair` of repair."""
    body = recipe.known(recipe.body, ("injury", "repair", "published"))
    injury = recipe.step("injury", "ablate", _mapping(recipe, body, "injury"))
    healing = recipe.step("repair", "repair", _mapping(recipe, body, "repair"))
    published = _published(recipe, body.get("published"))
    for one in several(injury["at"]):
        if one != VITAL:
            Region.parse(one)  # what is no address is said before the model is opened
    lab = recipe.open(desk)
    repaired: RepairResult = lab.repair(lab.ablate(**injury), **healing)
    document = repaired.to_json()
    figures = [Figure(name, value, _measured(document, name)) for name, value in published.items()]
    return RepairRecipe(recipe.head.title, figures, repaired, provenance=repaired.provenance)


def _mapping(recipe: Recipe, body: dict[str, Any], key: str) -> dict[str, Any]:
    """The settings of a step. Raises: BadInput if they are no mapping."""
    given = body.get(key) or {}
    if not isinstance(given, dict):
        raise BadInput(f"{recipe.path}: {key} should be a mapping of settings; it is {given!r}.")
    return given


def _published(recipe: Recipe, source: Any) -> dict[str, float]:
    published = {} if source is None else source
    numbers = isinstance(published, dict) and all(
        type(value) in (int, float) for value in published.values()
    )
    if not numbers:
        raise BadInput(
            f"{recipe.path}: published should map the names of figures, like nll.base, to numbers;"
            f" it is {published!r}."
        )
    return {name: float(value) for name, value in published.items()}


def _measured(document: dict[str, Any], name: str) -> float:
    """The figure `nll.base` of a repair. Raises: BadInput for one that is not measured."""
    value: Any = document
    for key in name.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    if type(value) not in (int, float):
        raise BadInput(
            f"a recipe cannot compare {name}: it is not among what a repair measures, like"
            f" {', '.join(SHOWN)}."
        )
    return float(value)
