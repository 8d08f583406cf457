"""Which layer to edit: causal tracing as a prior, trial edits to decide."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table

from ..edit import SEVERAL_LAYERS, EditConfig, Preparation, edit
from ..errors import BadInput, SurgeonError
from ..facts import Fact
from ..measure import Scorecard, ScoreConfig, examine, interval
from ..show.console import out, print_table
from ..trace import TraceConfig, suggest_prior, trace_facts

TRIALS = 6  # facts to try on
CANDIDATES = 8  # layers to try, those with the strongest prior
LIGHT = ScoreConfig(new_tokens=1, confabulation=())


def suggested(
    preparation: Preparation,
    facts: Sequence[Fact],
    config: EditConfig,
    progress: Callable[[str, int, int], None],
) -> dict[str, Any]:
    """Every candidate layer with its prior, and the score of trial edits there with its 95%
    interval over facts, best first.

    The score of one edit is the mean of what there is of P(target), the share of paraphrases that
    prefer the target and the share of neighbours that keep their answer. Raises: BadInput for a
    method that changes several layers.
    """
    if config.method in SEVERAL_LAYERS:
        raise BadInput(
            f"--suggest-layer tries one layer at a time, and {config.method} changes several; ask"
            " it for --method rome."
        )
    anatomy, tokenizer, bos = preparation.anatomy, preparation.tokenizer, preparation.config.bos
    some = list(facts[:TRIALS])
    last = max(1, len(anatomy.layers) - 1)
    prior: dict[int, tuple[float, tuple[float, float]]] = {}
    try:
        average = trace_facts(anatomy, tokenizer, some, TraceConfig(kinds=("mlp",)), bos, progress)
        prior = {
            layer: (effect, ci) for layer, effect, ci in suggest_prior(average) if layer < last
        }
    except (
        SurgeonError
    ):  # no fact says what is true, or the model knows none: the trials decide alone
        pass
    order = sorted(range(last), key=lambda layer: -prior[layer][0] if layer in prior else 0.0)[
        :CANDIDATES
    ]
    preparation.gather(order)
    before = [examine(anatomy.model, tokenizer, [fact], config=LIGHT, bos=bos) for fact in some]
    rows = []
    for done, layer in enumerate(sorted(order)):
        scores, damage = [], []
        for fact, intact in zip(some, before, strict=True):
            try:
                made = edit(preparation, [fact], replace(config, layers=(layer,)))
            except BadInput:
                raise
            except SurgeonError:  # the key cannot be used there
                scores.append(0.0)
                continue
            with made.patch.applied(anatomy):
                scores.append(
                    _score(
                        Scorecard(
                            intact,
                            examine(anatomy.model, tokenizer, [fact], config=LIGHT, bos=bos),
                            LIGHT,
                        )
                    )
                )
            damage.append(max(f.relative_damage for f in made.layers))
        values = torch.tensor(scores, dtype=torch.float64)
        rows.append(
            {
                "layer": layer,
                "score": float(values.mean()),
                "ci95": list(interval(values, preparation.config.seed)),
                "relative_damage": sum(damage) / len(damage) if damage else None,
                "prior": None if layer not in prior else prior[layer][0],
                "prior_ci95": None if layer not in prior else list(prior[layer][1]),
            }
        )
        progress("layers", done + 1, len(order))
    return {"facts": len(some), "layers": sorted(rows, key=lambda row: -float(str(row["score"])))}


def _score(card: Scorecard) -> float:
    parts = [card.after.own[0].target]
    if card.paraphrase.after is not None:
        parts.append(card.paraphrase.after)
    known, kept = card.kept
    if known:
        parts.append(kept / known)
    return sum(parts) / len(parts)


def print_suggested(model: str, document: dict[str, Any]) -> None:
    out.print(
        f"[bold]{escape(model)}[/bold]: trial edits of {document['facts']} fact(s) by"
        f" {document['method']} in each layer, best first"
    )
    table = Table(
        "layer",
        "score",
        "95%",
        "relative damage",
        "effect of its MLP in the trace",
        box=None,
        header_style="bold",
    )
    for row in document["layers"]:
        low, high = row["ci95"]
        damage = "" if row["relative_damage"] is None else f"{row['relative_damage']:.3f}"
        prior = (
            "not traced"
            if row["prior"] is None
            else f"{row['prior']:+.3f} ({row['prior_ci95'][0]:+.3f} to {row['prior_ci95'][1]:+.3f})"
        )
        table.add_row(
            str(row["layer"]), f"{row['score']:.3f}", f"{low:.3f} to {high:.3f}", damage, prior
        )
    print_table(table)
    best, rest = document["layers"][0], document["layers"][1:]
    close = [str(r["layer"]) for r in rest if r["ci95"][1] >= best["ci95"][0]]
    out.print(
        f"layer {best['layer']} is best"
        + (f"; {', '.join(close)} cannot be told from it on so few facts" if close else "")
    )
