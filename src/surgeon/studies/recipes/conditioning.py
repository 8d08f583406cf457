"""A recipe that asks what conditions an edit: tokens in the covariance x ridge x words before the
subject.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from ...edit import EditConfig, dense_down, layers_by_depth
from ...errors import BadInput
from ...result import Result, record, result
from ..desk import Desk
from ..edit import EditResult
from ..lab import Lab
from .edits import ANSWER, edit_settings, fact_of, published_for
from .reading import Recipe

GRID = ("prompts", "tokens_per_dimension", "ridges")
# of the scorecard only what a row holds
LIGHT = {"new_tokens": 1, "confabulation": []}


@record
class Conditioned:
    """One edit of the grid.

    direction_stability: the cosine of its direction from half of the sample and from all of it.
    target_probability: after the edit. nll_rise: of unrelated text, in nats per token.
    """

    tokens_per_dimension: float
    ridge: float
    prompt: str
    position_zero: bool
    update_norm_ratio: float
    relative_damage: float
    condition: float
    direction_stability: float
    target_probability: float
    controls_changed: int
    nll_rise: float


@result("recipe conditioning")
class Conditioning(Result):
    """The same fact with every prompt, ridge and number of tokens.

    controls: how many prompts there are that should not change. published: sentences on figures
    published for this model, or any.
    """

    title: str
    conditioning: list[Conditioned]
    controls: int
    published: list[str]

    def rows(self) -> list[dict[str, object]]:
        return [vars(one) for one in self.conditioning]


@dataclass(frozen=True)
class _Grid:
    """What is multiplied out, and the settings that all edits share."""

    prompts: list[str]
    per_dimension: list[float]
    ridges: list[float]
    settings: dict[str, Any]


def run(desk: Desk, recipe: Recipe) -> Conditioning:
    """Make the edit with every choice; besides the grid, `conditioning` has settings of edit."""
    body = recipe.known(recipe.body, ("conditioning", "published"))
    grid = _read(recipe, body["conditioning"])
    published = published_for(recipe, body.get("published"))
    lab = recipe.open(desk)
    rows = list(_rows(lab, grid))
    controls = len(grid.settings.get("controls") or [])
    about = lab.provenance(recipe.head)
    return Conditioning(recipe.head.title, rows, controls, published, provenance=about)


def _read(recipe: Recipe, source: Any) -> _Grid:
    """Raises: BadInput."""
    if not isinstance(source, dict):
        raise BadInput(f"{recipe.path}: conditioning should be a mapping; it is {source!r}.")
    prompts = recipe.texts(source.get("prompts"), "conditioning.prompts")
    per_dimension, ridges = (
        recipe.numbers(source.get(key), f"conditioning.{key}")
        for key in ("tokens_per_dimension", "ridges")
    )
    own = {key: value for key, value in source.items() if key not in (*GRID, ANSWER)}
    settings: dict[str, Any] = {}
    for prompt in prompts:
        fact = fact_of(recipe, {**source, "prompt": prompt}, "conditioning")
        given = {**LIGHT, **own, **fact}
        if "text" in recipe.text:
            given["covariance_text"] = recipe.text["text"]
        settings = edit_settings(recipe, "conditioning", given)
    if not settings:
        raise BadInput(f"{recipe.path}: conditioning.prompts should have at least one prompt.")
    return _Grid(prompts, per_dimension, ridges, settings)


def _rows(lab: Lab, grid: _Grid) -> Iterator[Conditioned]:
    first = layers_by_depth(len(lab.anatomy.layers), grid.settings.get("method", EditConfig.method))
    d_mlp = lab.anatomy.view(dense_down(lab.anatomy, first[0])).shape[1]
    for many, ridge, prompt in product(grid.per_dimension, grid.ridges, grid.prompts):
        sample = {"tokens": max(2, round(many * d_mlp)), "ridge": ridge}
        edit = lab.edit(**{**grid.settings, **sample, "prompt": prompt})
        yield _row(edit, ridge, prompt)


def _row(edit: EditResult, ridge: float, prompt: str) -> Conditioned:
    layer, fact = edit.preflight.layers[0], edit.preflight.facts[0]
    nll = edit.scorecard.nll
    return Conditioned(
        tokens_per_dimension=layer.tokens_per_dimension,
        ridge=ridge,
        prompt=prompt,
        position_zero=fact.position_zero,
        update_norm_ratio=edit.preflight.update_norm_ratio,
        relative_damage=edit.preflight.relative_damage,
        condition=layer.condition,
        direction_stability=1.0 if fact.key is None else fact.key.direction_stability,
        target_probability=edit.target_probability.after,
        controls_changed=sum(control.changed for control in edit.controls),
        nll_rise=0.0 if nll is None else nll.after - nll.before,
    )
