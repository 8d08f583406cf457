"""What all kinds of recipes share: the file, what stands at its top, and the settings of a step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...documents import beside, read_yaml
from ...errors import BadInput
from ...settings import configured, nearest, setting, settings_of
from ..desk import Desk
from ..lab import Lab, ModelSettings, TextSettings, open_lab
from ..registry import study_named


@dataclass(frozen=True)
class Head(ModelSettings):
    """What stands at the top of every recipe."""

    title: str = setting("", "what it is about")
    model: str = setting("", "the model that it works on")


_HEAD = tuple(one.name for one in settings_of(Head))
_TEXT = tuple(one.name for one in settings_of(TextSettings))


@dataclass(frozen=True)
class Recipe:
    """A recipe as it was read.

    body: all that does not stand at the top of every one. text: the settings of the text, for each
    step that reads one and does not say its own.
    """

    path: Path
    head: Head
    text: dict[str, Any]
    body: dict[str, Any]

    def open(self, desk: Desk) -> Lab:
        """The model, opened."""
        lab = open_lab(self.head.model, dtype=self.head.dtype, device=self.head.device)
        lab.listen(desk.tell)
        return lab

    def known(self, source: Any, keys: Iterable[str], where: str = "") -> dict[str, Any]:
        """A mapping with no other keys than these. Raises: BadInput."""
        names = sorted(keys)
        if not isinstance(source, dict):
            raise BadInput(
                f"{self.path}: {where or 'the recipe'} should be a mapping with the keys"
                f" {', '.join(names)}; it is {source!r}."
            )
        for key in source:
            if key not in names:
                inside = f"{where}.{key}" if where else key
                raise BadInput(
                    f"{self.path}: {inside} is not a key of a recipe{nearest(key, names)}"
                )
        return source

    def step(self, where: str, verb: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """What the study of this name is called with, checked; files by their whole paths.

        Raises: BadInput for a setting that it does not have, or that cannot be.
        """
        study = study_named(verb)
        known = {one.name: one for one in settings_of(study.settings)}
        for name in given:
            if name not in known:
                raise BadInput(
                    f"{self.path}: {where}.{name} is not a setting of {verb}{nearest(name, known)}"
                )
        shared = self.text if "text" in known else {}
        settings = {**{n: v for n, v in shared.items() if n in known}, **given}
        for name, value in settings.items():
            if known[name].declaration.is_file and isinstance(value, str):
                settings[name] = beside(self.path, value)
        try:
            study.configured(settings)
        except BadInput as error:
            raise BadInput(f"{self.path}: {where}: {error}") from error
        return settings

    def texts(self, source: Any, where: str) -> list[str]:
        """A list of texts. Raises: BadInput."""
        if not isinstance(source, list) or not all(isinstance(text, str) for text in source):
            raise BadInput(f"{self.path}: {where} should be a list of texts; it is {source!r}.")
        return source

    def numbers(self, source: Any, where: str) -> list[float]:
        """A list of numbers. Raises: BadInput."""
        fits = isinstance(source, list) and all(type(n) in (int, float) for n in source)
        if not fits or not source:
            raise BadInput(f"{self.path}: {where} should be a list of numbers; it is {source!r}.")
        return [float(number) for number in source]


def read_recipe(path: Path, model: str | None = None, text: str | None = None) -> Recipe:
    """A recipe. model, text: others than it says.

    Raises: BadText; BadInput for a file that is no recipe.
    """
    source = read_yaml(path)
    if not isinstance(source, dict) or not {"title", "model"} <= set(source):
        raise BadInput(f"{path} is not a recipe: it should be a mapping with a title and a model.")
    top = {name: source[name] for name in _HEAD if name in source}
    if model is not None:
        top["model"] = model
    of_text = {name: source[name] for name in _TEXT if name in source}
    if text is not None:
        of_text["text"] = str(Path(text).resolve())
    try:
        head = configured(Head, top)
        configured(TextSettings, of_text)
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from error
    body = {name: value for name, value in source.items() if name not in (*_HEAD, *_TEXT)}
    return Recipe(path, head, of_text, body)
