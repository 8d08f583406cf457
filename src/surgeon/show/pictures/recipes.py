"""Sections on recipes: published figures beside the measured ones, then what was measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ...studies.recipes.conditioning import Conditioning
from ...studies.recipes.edits import EditsRecipe
from ...studies.recipes.repair import RepairRecipe
from .editing import beside_one_another, conditioning_picture, edit_sections
from .healing import repair_headline, repair_pictures
from .picture import Headline, Picture, Table, many, model_name


def repair_recipe_headline(result: RepairRecipe) -> Headline:
    return replace(repair_headline(result.repair), sentence=result.title)


def repair_recipe_pictures(result: RepairRecipe) -> Iterator[Picture]:
    """The figures, if any were published, and the repair."""
    if result.figures:
        rows = [(one.figure, one.published, one.measured) for one in result.figures]
        yield Picture(
            "Published and measured",
            f"{many(len(rows), 'published figure')} beside the same, measured here",
            "Published figures belong to the text they were measured on; the measured ones to the"
            " text used here. In nats per token where they are losses.",
            shown=Table(("figure", "published", "measured"), rows),
        )
    yield from repair_pictures(result.repair)


def edits_recipe_headline(result: EditsRecipe) -> Headline:
    return Headline(result.title)


def edits_recipe_pictures(result: EditsRecipe) -> Iterator[Picture]:
    """All edits beside one another, then each."""
    yield beside_one_another([(one.name, one.edit) for one in result.edits], result.published)
    for one in result.edits:
        yield from edit_sections(one.edit, f"{one.name} by {one.edit.method}")


def conditioning_headline(result: Conditioning) -> Headline:
    return Headline(f"What conditions an edit of {model_name(result.provenance.model)}")


def conditioning_pictures(result: Conditioning) -> Iterator[Picture]:
    """How the update depends on the sample, the ridge, and words before the subject."""
    yield conditioning_picture(result.conditioning, result.published)
