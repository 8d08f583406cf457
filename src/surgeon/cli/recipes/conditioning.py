"""A recipe that asks what conditions an edit: tokens in the covariance x ridge x words before the
subject.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from ...edit import EditConfig, Preparation, PrepareConfig, dense_down, edit, layers_by_depth
from ...errors import BadInput
from ...facts import Fact
from ...measure import Scorecard, ScoreConfig, examine
from ...show.console import out, print_table
from ..common import open_corpus, open_model, progress, tokenizer_of
from ..edit import window_within
from .reading import known_keys, numbers, plain_settings, texts

_KEYS = {"title", "model", "dtype", "window", "windows", "conditioning", "published"}
_OWN = {
    "prompts",
    "subject",
    "target",
    "answer",
    "tokens_per_dimension",
    "ridges",
    "method",
    "controls",
}
LIGHT = ScoreConfig(new_tokens=1, confabulation=())


def run(
    path: Path, source: dict[str, Any], text: str | None, folder: Path | None
) -> tuple[dict[str, Any], Callable[[], None]]:
    """The same fact with every prompt, ridge and number of tokens: the document, and what prints
    it. No patch is kept.

    text: for the covariance too; without it, the covariance is of text that the model writes.
    """
    known_keys(path, source, _KEYS)
    own = source["conditioning"]
    known_keys(path, own, _OWN, "conditioning.")
    if any(not isinstance(own.get(k), str) for k in ("subject", "target")):
        raise BadInput(f"{path}: conditioning needs a subject and a target.")
    prompts = texts(path, own.get("prompts"), "conditioning.prompts")
    per_dimension = numbers(
        path, own.get("tokens_per_dimension"), "conditioning.tokens_per_dimension"
    )
    ridges = numbers(path, own.get("ridges"), "conditioning.ridges")
    controls = texts(path, own.get("controls") or [], "conditioning.controls")
    published = source.get("published") or {}
    settings = plain_settings(path, source)
    loaded, anatomy = open_model(settings["model"], settings.get("dtype", "auto"))
    tokenizer = tokenizer_of(loaded)
    config = EditConfig(method=own.get("method", "rome"))
    d_mlp = anatomy.view(
        dense_down(anatomy, layers_by_depth(len(anatomy.layers), config.method)[0])
    ).shape[1]
    corpus = open_corpus(
        loaded,
        text,
        window_within(anatomy, settings.get("window", 256), text),
        settings.get("windows", 20),
        "auto",
    )
    rows = []
    with progress() as tell:
        for many in per_dimension:
            for ridge in ridges:
                prepare = PrepareConfig(tokens=max(2, round(many * d_mlp)), ridge=ridge)
                preparation = Preparation(
                    anatomy,
                    tokenizer,
                    prepare,
                    None if text is None else corpus,
                    None,
                    loaded.fingerprint,
                    tell,
                )
                for prompt in prompts:
                    fact = Fact(prompt, own["subject"], own["target"], own.get("answer"))
                    made = edit(preparation, [fact], config)
                    before = examine(loaded.model, tokenizer, [fact], controls, corpus, LIGHT)
                    with made.patch.applied(anatomy):
                        after = examine(loaded.model, tokenizer, [fact], controls, corpus, LIGHT)
                    flight, card = made.to_json(), Scorecard(before, after, LIGHT)
                    rows.append(
                        {
                            "tokens_per_dimension": flight["layers"][0]["tokens_per_dimension"],
                            "ridge": ridge,
                            "prompt": prompt,
                            "position_zero": flight["position_zero"],
                            "update_norm_ratio": flight["update_norm_ratio"],
                            "relative_damage": flight["relative_damage"],
                            "condition": flight["layers"][0]["condition"],
                            "direction_stability": flight["facts"][0]["direction_stability"],
                            "target_probability": after.own[0].first,
                            "controls_changed": sum(c["changed"] for c in card.controls()),
                            "nll_rise": (after.nll or 0.0) - (before.nll or 0.0),
                        }
                    )
    title, model = settings["title"], settings["model"]
    lines = (
        texts(path, published.get(model, published.get("any", [])), "published")
        if isinstance(published, dict)
        else []
    )
    document = {
        "title": title,
        "model": model,
        "fingerprint": loaded.fingerprint,
        "conditioning": rows,
        "controls": len(controls),
        "published": lines,
    }
    return document, lambda: _print(document)


def _print(document: dict[str, Any]) -> None:
    out.print(f"[bold]{escape(document['title'])}[/bold] ({escape(document['model'])})")
    table = Table(
        "tokens / d_mlp",
        "ridge",
        "prompt",
        "update / weight",
        "relative damage",
        "half to all (cosine)",
        "P(target)",
        "controls changed",
        "NLL",
        box=None,
        header_style="bold",
    )
    for row in document["conditioning"]:
        table.add_row(
            f"{row['tokens_per_dimension']:.1f}",
            f"{row['ridge']:g}",
            escape(row["prompt"]),
            f"{row['update_norm_ratio']:.1%}",
            f"{row['relative_damage']:.3f}",
            f"{row['direction_stability']:.3f}",
            f"{row['target_probability']:.3f}",
            f"{row['controls_changed']} of {document['controls']}",
            f"{row['nll_rise']:+.4f}",
        )
    print_table(table)
    for line in document["published"]:
        out.print(f"published: {escape(line)}")
