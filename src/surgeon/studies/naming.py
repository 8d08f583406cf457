"""What names weights, and what is a patch: a text, an address, a set, a result, a file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..anatomy import Anatomy, Entry, Region
from ..errors import BadInput, SurgeonError
from ..find import CriticalSet, FindConfig, FindResult, VerifyConfig, find
from ..patch import Patch, load
from .lab import Lab, TextSettings

VITAL = "vital"
AT_HELP = (
    "entry like 'L0.mlp.down[88, 165]', row [88, :] or column [:, 165]; or `vital`, the first set"
    " of mlp.down that find returns"
)


def regions_of(
    place: Lab | Anatomy,
    at: Any,
    text: TextSettings | None = None,
    seed: int = 0,
    setting: str = "at",
) -> list[Region]:
    """The regions that `at` names: texts, entries, regions, a critical set, a result, or several.

    place: the lab of the model, or its map alone. A set or a result stands for its `weights()`. The
    text `vital` stands for `vital_set` on this text, which takes a lab.
    setting: whose value `at` is.
    Raises: BadInput, UnknownSite; BadInput if two share an entry, which would be counted twice, or
    if nothing is named.
    """
    named = list(_named(place, at, text or TextSettings(), seed))
    if not named:
        raise BadInput(
            f"no weights are named; name at least one with ‹{setting}›, like L0.mlp.down[8, 5]."
        )
    _check_apart(named, setting)
    return named


def _named(place: Lab | Anatomy, at: Any, text: TextSettings, seed: int) -> Iterator[Region]:
    if at == VITAL:
        if isinstance(place, Anatomy):
            raise BadInput("‹at› vital has to run the model, which is not loaded; give addresses.")
        yield from vital_set(place, text, seed).parts
    elif isinstance(at, str | Entry | Region):
        anatomy = place if isinstance(place, Anatomy) else place.anatomy
        yield anatomy.region(str(at))
    elif hasattr(at, "weights"):  # a set, or a result that says itself which weights it is about
        yield from at.weights()
    elif isinstance(at, Sequence):
        for one in at:
            yield from _named(place, one, text, seed)
    else:
        raise BadInput(
            f"{type(at).__name__} names no weights; give an address, a set or a finding."
        )


def vital_set(lab: Lab, text: TextSettings, seed: int = 0) -> CriticalSet:
    """The first set of `mlp.down` that `find` returns on this text, since that can be repaired.

    Raises: SurgeonError if it finds none.
    """
    result = vital_sets(lab, text, seed, only="mlp.down")
    if not result.sets:
        raise SurgeonError(
            f"nothing vital was found in the mlp.down of {lab.name}, so there is nothing to name;"
            " give entries with ‹at› instead."
        )
    return result.sets[0]


def vital_sets(lab: Lab, text: TextSettings, seed: int = 0, only: str = "everything") -> FindResult:
    """What `find` finds on this text, at its defaults; found once for each lab and text."""
    corpus = lab.corpus(text)
    config = FindConfig(verify=VerifyConfig(seed=seed), only=only)
    finding = partial(find, lab.anatomy, corpus, config, lab.tell)
    return lab.once(("find", text, seed, only), finding)


def _check_apart(regions: Sequence[Region], setting: str) -> None:
    """Raises: BadInput if two regions share an entry."""
    for i, one in enumerate(regions):
        for other in regions[:i]:
            if one.site == other.site and _meet(one, other):
                shared = f"{one} is given twice"
                if one != other:
                    shared = f"{other} and {one} share an entry"
                raise BadInput(f"‹{setting}›: {shared}; name each entry once.")


def _meet(one: Region, other: Region) -> bool:
    rows, cols = {one.row, other.row}, {one.col, other.col}
    return all(None in lines or len(lines) == 1 for lines in (rows, cols))


# -- patches --------------------------------------------------------------------------------------


def patch_of(source: Any) -> Patch:
    """A patch: itself, the file of one, or what a result holds. Raises: BadInput, BadPatch."""
    if isinstance(source, Patch):
        return source
    if isinstance(source, str | Path):
        return load(source)
    patch = getattr(source, "patch", None)
    if isinstance(patch, Patch):
        return patch
    raise BadInput(f"{type(source).__name__} holds no patch; give a patch or the file of one.")


def patches_of(sources: Any) -> list[Patch]:
    """Several patches, or one."""
    return [patch_of(source) for source in several(sources)]


def several(one: Any) -> Sequence[Any]:
    """What was given where one thing may stand for a list of one."""
    return one if isinstance(one, list | tuple) else [one]


def patch_name(source: Any) -> str:
    """How a result names a patch: by its file, or by what it is."""
    return str(source if isinstance(source, str | Path) else patch_of(source))


def patch_names(sources: Any) -> list[str]:
    """Several names, or one."""
    return [patch_name(source) for source in several(sources)]
