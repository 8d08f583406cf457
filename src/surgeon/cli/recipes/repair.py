"""A recipe with an injury and its repair."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from ...anatomy import Anatomy, Region
from ...corpus import DEFAULT_WINDOW, Corpus
from ...errors import BadInput, SurgeonError
from ...find import find
from ...patch import ablate, save
from ...repair import DistilConfig, RepairConfig, repair
from ...show.console import out, print_table
from ..common import open_corpus, open_model, progress, require_finite
from .reading import known_keys, plain_settings


@dataclass(frozen=True)
class Recipe:
    """What a recipe file says. `at` lists entries, or is "vital": the set that `find` returns."""

    title: str
    model: str
    at: tuple[str, ...] | str
    mode: str = "zero"
    dtype: str = "auto"
    window: int = DEFAULT_WINDOW
    windows: int | None = None
    repair: RepairConfig = field(default_factory=RepairConfig)
    published: dict[str, float] = field(default_factory=dict)


def run(
    path: Path, source: dict[str, Any], text: str | None, folder: Path | None
) -> tuple[dict[str, Any], Callable[[], None]]:
    """Injure, repair and measure as the recipe says: the document, and what prints it.

    Patches go into the folder.
    """
    steps = read_recipe(path, source)
    loaded, anatomy = open_model(steps.model, steps.dtype)
    corpus = open_corpus(loaded, text, steps.window, steps.windows, "auto")
    with progress() as tell:
        injury = ablate(anatomy, _regions(anatomy, steps, corpus), steps.mode)
        result = repair(anatomy, injury, corpus, steps.repair, progress=tell)
    require_finite(**{"the NLL of the repaired model": result.nll["patched"]})
    measured = result.to_json()
    figures = [
        {"figure": name, "published": value, "measured": _at(measured, name)}
        for name, value in steps.published.items()
    ]
    document = {
        "title": steps.title,
        "model": steps.model,
        "fingerprint": loaded.fingerprint,
        "figures": figures,
        "repair": measured,
    }
    if folder is not None:
        save(injury, folder / "injury.safetensors")
        save(result.patch, folder / "repair.safetensors")

    def tell_all() -> None:
        out.print(
            f"[bold]{escape(steps.title)}[/bold] ({escape(steps.model)} on {escape(corpus.name)})"
        )
        table = Table("figure", "published", "measured", box=None, header_style="bold")
        for name in steps.published or SHOWN:
            published = steps.published.get(name)
            table.add_row(
                name, "" if published is None else f"{published:g}", f"{_at(measured, name):.4g}"
            )
        print_table(table)
        control = (result.control or {}).get("recovered")
        out.print(
            "control: the same on a random row recovers"
            f" {'nothing to compare with' if control is None else f'{control:.3f}'}"
        )

    return document, tell_all


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
_KEYS = {"title", "model", "dtype", "window", "windows", "injury", "repair", "published"}


def read_recipe(path: Path, source: dict[str, Any]) -> Recipe:
    """Read a recipe.

    Raises: BadInput naming the key that is missing, unknown or of the wrong kind.
    """
    known_keys(path, source, _KEYS)
    injury = source.get("injury")
    if not isinstance(injury, dict):
        raise BadInput(f"{path} needs an injury with `at`.")
    known_keys(path, injury, {"at", "mode"}, "injury.")
    at = injury.get("at")
    if at != "vital" and not (isinstance(at, list) and at and all(isinstance(a, str) for a in at)):
        raise BadInput(
            f"{path}: injury.at is {at!r}; it should be a list of entries like 'L0.mlp.down[88,"
            " 165]', or vital."
        )
    published = source.get("published") or {}
    if not isinstance(published, dict) or not all(
        isinstance(v, int | float) for v in published.values()
    ):
        raise BadInput(
            f"{path}: published should map the names of figures, like nll.base, to numbers."
        )
    return Recipe(
        at=at if isinstance(at, str) else tuple(at),
        mode=injury.get("mode", "zero"),
        repair=_repair_config(path, source.get("repair") or {}),
        published={str(k): float(v) for k, v in published.items()},
        **plain_settings(path, source),
    )


def _repair_config(path: Path, source: Any) -> RepairConfig:
    """`reference: true`, settings of the repair, and `distil:` with settings of the training."""
    if not isinstance(source, dict):
        raise BadInput(f"{path}: repair should be a mapping of settings.")
    own = {f.name for f in fields(RepairConfig)} - {"graft", "distil"}
    training = source.get("distil") or {}
    known_keys(path, source, {*own, "distil", "reference"}, "repair.")
    known_keys(path, training, {f.name for f in fields(DistilConfig)}, "repair.distil.")
    base = RepairConfig.reference() if source.get("reference") else RepairConfig()
    settings: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in source.items() if k in own
    }
    try:
        return replace(base, **settings, distil=replace(base.distil, **training))
    except TypeError as error:
        raise BadInput(
            f"{path}: a setting of the repair is of the wrong kind ({error})."
        ) from error


def _regions(anatomy: Anatomy, steps: Recipe, corpus: Corpus) -> list[Region]:
    if not isinstance(steps.at, str):
        return [anatomy.region(a) for a in steps.at]
    result = find(anatomy, Corpus(corpus.name, corpus.windows[:40], corpus.bos))
    if not result.sets:
        raise SurgeonError(
            f"nothing vital was found in {steps.model} on {corpus.name}, so there is nothing to"
            " injure; name entries instead."
        )
    return [Region(c.entry.site, c.entry.row, c.entry.col) for c in result.sets[0].entries]


def _at(measured: dict[str, Any], name: str) -> float:
    """The figure `nll.base` of the measured ones. Raises: BadInput for one that is not measured."""
    value: Any = measured
    for key in name.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    if not isinstance(value, int | float):
        raise BadInput(
            f"a recipe cannot compare {name}: it is not among what a repair measures, like"
            f" {', '.join(SHOWN)}."
        )
    return float(value)
