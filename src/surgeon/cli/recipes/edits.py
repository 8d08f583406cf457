"""A recipe with edits: each on the intact model, with the prompts around it, and several together
by two methods.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from ...corpus import Corpus
from ...edit import METHODS, EditConfig, Preparation, edit
from ...errors import BadInput
from ...facts import Fact
from ...measure import Scorecard, ScoreConfig, examine
from ...patch import save
from ...show.console import out, print_table
from ...show.edit import print_controls
from ..common import open_corpus, open_model, progress, tokenizer_of
from ..edit import window_within
from .reading import known_keys, plain_settings, texts

_KEYS = {"title", "model", "dtype", "window", "windows", "edits", "together", "published"}


@dataclass(frozen=True)
class Group:
    """Facts to write at once, the methods to do it with, and the prompts that should not change."""

    name: str
    facts: tuple[Fact, ...]
    methods: tuple[str, ...]
    controls: tuple[str, ...]


def run(
    path: Path, source: dict[str, Any], text: str | None, folder: Path | None
) -> tuple[dict[str, Any], Callable[[], None]]:
    """Make every edit on the intact model and score it: the document, and what prints it.

    Patches go into the folder.
    """
    known_keys(path, source, _KEYS)
    groups = [_single(path, item) for item in _items(path, source, "edits")]
    groups += [_together(path, item) for item in _items(path, source, "together")]
    settings = plain_settings(path, source)
    published = _published(path, source.get("published") or {}, settings["model"])
    loaded, anatomy = open_model(settings["model"], settings.get("dtype", "auto"))
    window = window_within(anatomy, settings.get("window", 256), text)
    corpus = open_corpus(loaded, text, window, settings.get("windows", 20), "auto")
    rows: list[dict[str, Any]] = []
    with progress() as tell:
        preparation = Preparation(
            anatomy, tokenizer_of(loaded), weights=loaded.fingerprint, progress=tell
        )
        for group in groups:
            for method in group.methods:
                row, patch = _made(preparation, group, method, corpus)
                rows.append(row)
                if folder is not None:
                    save(patch, folder / f"edit-{len(rows)}-{method}.safetensors")
    title, model = settings["title"], settings["model"]
    document = {
        "title": title,
        "model": model,
        "fingerprint": loaded.fingerprint,
        "edits": rows,
        "published": published,
    }
    return document, lambda: _print(document)


def _made(
    preparation: Preparation, group: Group, method: str, corpus: Corpus
) -> tuple[dict[str, Any], Any]:
    model, tokenizer = preparation.anatomy.model, preparation.tokenizer
    config = ScoreConfig()
    made = edit(preparation, group.facts, EditConfig(method=method))
    before = examine(model, tokenizer, group.facts, group.controls, corpus, config)
    with made.patch.applied(preparation.anatomy):
        after = examine(model, tokenizer, group.facts, group.controls, corpus, config)
    card = Scorecard(before, after, config)
    row = {
        "name": group.name,
        "method": method,
        "preflight": made.to_json(),
        "target_probability": {
            when: sum(a.first for a in one.own) / len(one.own)
            for when, one in (("before", before), ("after", after))
        },
        "least_target_probability": min(a.first for a in after.own),
        "controls": card.controls(),
        "scorecard": card.to_json(),
        "seconds": made.seconds,
    }
    return row, made.patch


def _print(document: dict[str, Any]) -> None:
    out.print(f"[bold]{escape(document['title'])}[/bold] ({escape(document['model'])})")
    table = Table(
        "edit",
        "method",
        "P before",
        "P after",
        "update / weight",
        "relative damage",
        "forecast",
        "first",
        "controls changed",
        "perplexity",
        box=None,
        header_style="bold",
    )
    for row in document["edits"]:
        flight, ppl = row["preflight"], row["scorecard"]["ppl"]
        changed = sum(c["changed"] for c in row["controls"])
        table.add_row(
            escape(row["name"]),
            row["method"],
            f"{row['target_probability']['before']:.4f}",
            f"{row['target_probability']['after']:.4f}",
            f"{flight['update_norm_ratio']:.1%}",
            f"{flight['relative_damage']:.3f}",
            flight["verdict"],
            "yes" if flight["position_zero"] else "",
            f"{changed} of {len(row['controls'])}",
            f"{ppl['before']:.2f} → {ppl['after']:.2f}",
        )
    print_table(table)
    for line in document["published"]:
        out.print(f"published: {escape(line)}")
    for row in document["edits"]:
        out.print(f"\n[bold]{escape(row['name'])}[/bold] by {row['method']}")
        print_controls(row["controls"])


def _items(path: Path, source: dict[str, Any], key: str) -> list[dict[str, Any]]:
    items = source.get(key) or []
    if not isinstance(items, list):
        raise BadInput(f"{path}: {key} should be a list.")
    return items


def _single(path: Path, item: Any) -> Group:
    known_keys(
        path,
        item,
        {"name", "prompt", "subject", "target", "answer", "method", "controls"},
        "edits.",
    )
    fact = _fact(path, item)
    return Group(
        str(item.get("name", fact.text)),
        (fact,),
        _methods(path, [item.get("method", "rome")]),
        _controls(path, item),
    )


def _together(path: Path, item: Any) -> Group:
    known_keys(path, item, {"name", "facts", "methods", "controls"}, "together.")
    facts = item.get("facts")
    if not isinstance(facts, list) or not facts:
        raise BadInput(f"{path}: together needs a list of facts.")
    for fact in facts:
        known_keys(path, fact, {"prompt", "subject", "target", "answer"}, "together.facts.")
    methods = _methods(path, item.get("methods", ["rome", "memit"]))
    return Group(
        str(item.get("name", "together")),
        tuple(_fact(path, f) for f in facts),
        methods,
        _controls(path, item),
    )


def _fact(path: Path, item: dict[str, Any]) -> Fact:
    missing = [
        k
        for k in ("prompt", "subject", "target")
        if not isinstance(item.get(k), str) or not item[k].strip()
    ]
    if missing:
        raise BadInput(f"{path}: an edit lacks {', '.join(missing)}.")
    return Fact(item["prompt"], item["subject"], item["target"], item.get("answer"))


def _methods(path: Path, methods: Any) -> tuple[str, ...]:
    for method in texts(path, methods, "the methods"):
        if method not in METHODS:
            raise BadInput(f"{path}: {method} is no method of an edit; use {', '.join(METHODS)}.")
    return tuple(methods)


def _controls(path: Path, item: dict[str, Any]) -> tuple[str, ...]:
    return tuple(texts(path, item.get("controls") or [], "the controls"))


def _published(path: Path, source: Any, model: str) -> Sequence[str]:
    """Sentences about published figures, for the models they were measured on."""
    if not isinstance(source, dict):
        raise BadInput(f"{path}: published should map a model to sentences.")
    return texts(path, source.get(model, []), "published")
