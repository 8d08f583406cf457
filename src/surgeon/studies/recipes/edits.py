"""A recipe with edits: each on the intact model, with the prompts around it, and several together
by several methods.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ...errors import BadInput
from ...facts import facts_of
from ...patch import Patch
from ...result import Result, derived, record, result
from ..desk import Desk
from ..edit import EditResult
from .reading import Recipe

FACT = ("prompt", "subject", "target")
ANSWER = "answer"  # the setting `true` of an edit, which YAML reads as a truth value


@record
class NamedEdit:
    """One edit of a recipe."""

    name: str
    edit: EditResult

    @derived
    def least_target_probability(self) -> float:
        """Of all its facts, after the edit."""
        return min(fact.target_probability.after for fact in self.edit.scorecard.facts)


@result("recipe edits")
class EditsRecipe(Result):
    """Edits as a recipe says, each on the intact model.

    published: sentences on figures published for this model.
    """

    title: str
    edits: list[NamedEdit]
    published: list[str]

    def attachments(self) -> dict[str, Patch]:
        """The patch of each edit, by the name of its file."""
        return {
            f"edit-{number}-{one.edit.method}.safetensors": one.edit.patch
            for number, one in enumerate(self.edits, 1)
            if one.edit.patch is not None
        }

    def rows(self) -> list[dict[str, object]]:
        """One row for each edit and fact."""
        return [
            {"name": one.name, "method": one.edit.method, **row}
            for one in self.edits
            for row in one.edit.rows()
        ]


def run(desk: Desk, recipe: Recipe) -> EditsRecipe:
    """Make every edit on the intact model and score it: an item has settings of edit."""
    body = recipe.known(recipe.body, ("edits", "together", "published"))
    steps = [*_single(recipe, body.get("edits")), *_together(recipe, body.get("together"))]
    if not steps:
        raise BadInput(f"{recipe.path} names no edits; give at least one.")
    published = published_for(recipe, body.get("published"))
    lab = recipe.open(desk)
    edits = [NamedEdit(name, lab.edit(**settings)) for name, settings in steps]
    corpus = edits[0].edit.provenance.corpus
    about = lab.provenance(recipe.head, corpus)
    return EditsRecipe(recipe.head.title, edits, published, provenance=about)


def published_for(recipe: Recipe, source: Any) -> list[str]:
    """Sentences about published figures: those for the recipe's model, or for any.

    Raises: BadInput.
    """
    known = {} if source is None else source
    if not isinstance(known, dict):
        raise BadInput(f"{recipe.path}: published should map a model to sentences.")
    sentences = known.get(recipe.head.model, known.get("any", []))
    return recipe.texts(sentences, "published")


Step = tuple[str, dict[str, Any]]


def _single(recipe: Recipe, source: Any) -> Iterator[Step]:
    """The edits of one fact each."""
    for item in _items(recipe, source, "edits"):
        fact = fact_of(recipe, item, "edits")
        given = {key: value for key, value in item.items() if key not in ("name", ANSWER)}
        name = str(item.get("name") or facts_of(fact)[0].text)
        yield name, edit_settings(recipe, "edits", {**given, **fact})


def _together(recipe: Recipe, source: Any) -> Iterator[Step]:
    """The edits of several facts, by each of its methods."""
    for item in _items(recipe, source, "together"):
        if not isinstance(item.get("facts"), list) or not item["facts"]:
            raise BadInput(f"{recipe.path}: together needs a list of facts.")
        facts = []
        for one in item["facts"]:
            recipe.known(one, (*FACT, ANSWER), "together.facts")
            facts.append(fact_of(recipe, one, "together.facts"))
        methods = recipe.texts(item.get("methods", ["rome", "memit"]), "the methods")
        own = ("name", "facts", "methods")
        given = {key: value for key, value in item.items() if key not in own}
        for method in methods:
            settings = {**given, "facts": facts, "method": method}
            yield str(item.get("name", "together")), edit_settings(recipe, "together", settings)


def _items(recipe: Recipe, source: Any, key: str) -> list[dict[str, Any]]:
    items = [] if source is None else source
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise BadInput(f"{recipe.path}: {key} should be a list of mappings; it is {items!r}.")
    return items


def fact_of(recipe: Recipe, item: dict[str, Any], where: str) -> dict[str, Any]:
    """The settings of one fact. Raises: BadInput for one that lacks something, or is none."""
    missing = [key for key in FACT if not isinstance(item.get(key), str) or not item[key].strip()]
    if missing:
        raise BadInput(f"{recipe.path}: an edit of {where} lacks {', '.join(missing)}.")
    fact = {key: item[key] for key in FACT}
    if item.get(ANSWER) is not None:
        fact["true"] = item[ANSWER]
    try:
        facts_of([fact])
    except BadInput as error:
        raise BadInput(f"{recipe.path}: {where}: {error}") from error
    return fact


def edit_settings(recipe: Recipe, where: str, given: dict[str, Any]) -> dict[str, Any]:
    """What edit is called with: whatever the forecast says, and with no covariance kept on disk."""
    if isinstance(given.get("controls"), list):
        recipe.texts(given["controls"], f"{where}.controls")
    return recipe.step(where, "edit", {"force": True, "no_cache": True, **given})
