"""`explain`: how a patch works."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..corpus import read_text
from ..errors import BadInput
from ..explain import ExplainConfig, Explanation, explain
from ..settings import nested, setting
from .lab import Lab, TextSettings
from .naming import patch_name, patch_names, patch_of, patches_of


@dataclass(frozen=True)
class Settings:
    """Say how patches of MODEL work: geometry, top-k curve, the channel they write, the tokens they
    change, behaviour.

    The first patch is the injury, those after it are its repair. A group of words is tested against
    words of the same documents and frequency, since a ranking on a few lines is about what these
    lines are about.
    """

    patches: Any = setting(
        help="patch; the first is the injury, those after it are its repair",
        metavar="P",
        many=True,
        spelled="patch",
        is_file=True,
    )
    explain: ExplainConfig = nested(ExplainConfig)
    text: TextSettings = nested(partial(TextSettings, windows=40))
    prompts: tuple[str, ...] = setting((), "also continue this prompt", spelled="prompt")
    groups: dict[str, tuple[str, ...]] | tuple[str, ...] = setting(
        (), "words to test as a group", metavar="NAME=WORD,WORD", spelled="group"
    )
    words: tuple[str, ...] = setting(
        (), "the same from a file, words apart by white space", metavar="FILE", is_file=True
    )
    trained: Any = setting(
        (),
        "a repair trained with K entries, for the top-k curve",
        metavar="K=P",
        many=True,
        group="Geometry",
    )


def run(lab: Lab, settings: Settings) -> Explanation:
    groups = _groups(settings)
    patches = patches_of(settings.patches)
    trained = [(k, patch_of(source)) for k, source in _trained(settings.trained)]
    source, _ = lab.source(settings.text)
    corpus = lab.corpus(settings.text)
    result = explain(
        lab.anatomy,
        lab.tokenizer,
        source,
        corpus,
        patches,
        groups,
        settings.prompts,
        trained,
        settings.text.bos,
        settings.explain,
        lab.tell,
    )
    names = patch_names(settings.patches)
    others = [f"{k}={patch_name(patch)}" for k, patch in _trained(settings.trained)]
    settings = replace(settings, patches=names, trained=others)
    return replace(result, patches=names, provenance=lab.provenance(settings, corpus.record()))


def _groups(settings: Settings) -> dict[str, list[str]]:
    """Words by the name of their group. Raises: BadInput."""
    named = [*_named_words(settings.groups)]
    named += [(Path(file).stem, read_text(file).split()) for file in settings.words]
    groups = dict(named)
    if len(groups) < len(named):
        raise BadInput(
            "two groups of words have one name; give each of ‹groups› and each file of ‹words› a"
            " name of its own."
        )
    return groups


def _named_words(
    groups: Mapping[str, tuple[str, ...]] | tuple[str, ...],
) -> Iterator[tuple[str, list[str]]]:
    if isinstance(groups, Mapping):
        yield from ((name, list(words)) for name, words in groups.items())
        return
    for text in groups:
        name, _, words = text.partition("=")
        several = [word.strip() for word in words.split(",") if word.strip()]
        if not name.strip() or not several:
            raise BadInput(
                f"‹groups› {text!r} is not a group of words; write it like 'marine=lobster,crab'."
            )
        yield name.strip(), several


def _trained(sources: Any) -> list[tuple[int, Any]]:
    """The number of entries and the patch of each: a mapping, or texts like 16=P.

    Raises: BadInput.
    """
    if isinstance(sources, Mapping):
        return [(int(k), patch) for k, patch in sources.items()]
    pairs: list[tuple[int, Any]] = []
    for text in sources:
        k, _, path = text.partition("=")
        if not k.isdigit() or int(k) < 1 or not path:
            raise BadInput(
                f"‹trained› {text!r} is not a number of entries and a patch; write it like"
                " 16=repair-16.safetensors."
            )
        pairs.append((int(k), path))
    return pairs
