"""Every editor on the same facts: single edits, one batch, and what they cost; one process.

    python benchmarks/edits.py MODEL --pararel FACTS.json [--count 200] [--methods rome,memit,...]
    [--out FILE.json]

FACTS.json holds {"facts": [[relation, subject, object]], "patterns": {relation: ["... [X] ...
[Y]"]}}. Facts that the model says under its first three patterns are edited, each to another object
of its relation; the other patterns are the paraphrases, other known subjects of the relation the
neighbours. Each single edit is made on the intact model. Beside the editors stands in-context
editing: the new fact is written before the prompt, and no weight changes.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from surgeon import Anatomy, load_corpus, load_model, prove
from surgeon.corpus import Corpus
from surgeon.edit import (
    METHODS,
    EditConfig,
    Preparation,
    Request,
    ValueConfig,
    Values,
    dense_down,
    edit,
    key_moments,
    optimise,
)
from surgeon.facts import Fact
from surgeon.measure import (
    Examination,
    Scorecard,
    ScoreConfig,
    continuations,
    examine,
    scorecard,
)
from surgeon.measure.likelihood import batches
from surgeon.patch import applied_patches
from surgeon.patients import heldout_text

EDIT = sys.modules["surgeon.edit.editors"]
LIGHT = ScoreConfig(new_tokens=1, confabulation=())
NEIGHBOURS, PARAPHRASES = 8, 4


def known_facts(anatomy: Anatomy, tokenizer: Any, path: Path, count: int) -> list[Fact]:
    """Facts that the model says, each with a new target, paraphrases and neighbours."""
    source = json.loads(path.read_text())
    patterns = {
        r: [p.split("[Y]")[0].rstrip() for p in ps if "[X]" in p.split("[Y]")[0]]
        for r, ps in source["patterns"].items()
    }
    draw = random.Random(0)
    listed = [tuple(f) for f in source["facts"] if len(patterns[f[0]]) >= 5]
    draw.shuffle(listed)
    asked = [(p.replace("[X]", s), o) for r, s, o in listed for p in patterns[r][:3]]
    says = [ok for _, ok in continuations(anatomy.model, tokenizer, asked)]
    known = [f for i, f in enumerate(listed) if all(says[3 * i : 3 * i + 3])]
    facts = []
    for r, s, o in known[:count]:
        objects = sorted({other for q, _, other in known if q == r and other != o})
        beside = [
            (patterns[r][0].replace("[X]", t), other) for q, t, other in known if q == r and t != s
        ]
        facts.append(
            Fact(
                patterns[r][0].replace("[X]", "{}"),
                s,
                draw.choice(objects),
                o,
                r,
                tuple(p.replace("[X]", s) for p in patterns[r][1 : 1 + PARAPHRASES]),
                tuple(draw.sample(beside, min(NEIGHBOURS, len(beside)))),
            )
        )
    return facts


@dataclass(frozen=True)
class Scored:
    """An edit's scorecard, and the edited model's answers."""

    card: Scorecard
    after: Examination

    @property
    def nll_change(self) -> float:
        return 0.0 if self.card.nll is None else self.card.nll.after - self.card.nll.before


def scored(before: Examination, after: Examination) -> Scored:
    return Scored(scorecard(before, after), after)


def summary(
    edited: Sequence[Scored], seconds: float, edits: int, extra: dict[str, Any]
) -> dict[str, Any]:
    """Means over edits, each weighted by its prompts."""
    cards = [one.card for one in edited]
    own = [answer for one in edited for answer in one.after.own]

    def mean(name: str, field: str) -> float:
        shares = [getattr(c, name) for c in cards]
        return sum(getattr(s, field) * s.prompts for s in shares) / sum(s.prompts for s in shares)

    known = sum(card.neighbours_known_before for card in cards)
    kept = sum(card.neighbours_kept for card in cards)
    return {
        "edits": edits,
        "efficacy": mean("efficacy", "after"),
        "p_target": sum(answer.target for answer in own) / len(own),
        "paraphrase": mean("paraphrase", "after"),
        "neighbourhood": mean("neighbourhood", "after"),
        "neighbours_kept": kept / known,
        "nll_change": sum(one.nll_change for one in edited) / len(edited),
        "seconds_per_edit": seconds / edits,
        **extra,
    }


class Remembered:
    """The optimisation of values, done once for methods that want the same one on the intact model;
    its seconds count for each.
    """

    def __init__(self) -> None:
        self.real, self.values = EDIT.optimise, {}
        self.saved = 0.0

    def __call__(
        self,
        anatomy: Anatomy,
        requests: Sequence[Request],
        layer: int,
        config: ValueConfig,
        where: str = "mlp",
        progress: Any = None,
    ) -> Values:
        if applied_patches(anatomy):  # one edit after the other: every model is another one
            return self.real(anatomy, requests, layer, config, where, progress)
        for request in requests:
            key = (request.bare.ids, tuple(request.targets[0]), layer, config, where)
            if key not in self.values:
                start = time.perf_counter()
                self.values[key] = (
                    self.real(anatomy, [request], layer, config, where, progress),
                    time.perf_counter() - start,
                )
            else:
                self.saved += self.values[key][1]
        known = [
            self.values[r.bare.ids, tuple(r.targets[0]), layer, config, where][0] for r in requests
        ]
        return Values(
            *(
                torch.cat([getattr(v, n) for v in known])
                for n in ("delta", "norm", "probability", "steps")
            )
        )


def in_context(
    anatomy: Anatomy, tokenizer: Any, facts: Sequence[Fact], corpus: Corpus
) -> dict[str, Any]:
    """The new fact as a sentence before every prompt."""
    edited = []
    for fact in facts:
        said = f"{fact.text} {fact.target}. "
        told = Fact(
            said + fact.prompt,
            fact.subject,
            fact.target,
            fact.true,
            fact.relation,
            tuple(said + p for p in fact.paraphrases),
            tuple((said + p, a) for p, a in fact.neighbours),
        )
        before, after = (
            examine(anatomy.model, tokenizer, [f], corpus=corpus, config=LIGHT)
            for f in (fact, told)
        )
        edited.append(scored(before, after))
    return summary(edited, 0.0, len(facts), {})


def single(
    preparation: Preparation, facts: Sequence[Fact], method: str, corpus: Corpus
) -> tuple[dict[str, Any], list[list[float]]]:
    """Each fact on the intact model; and for each edit its relative damage beside the share of
    neighbours it lost.
    """
    anatomy, tokenizer = preparation.anatomy, preparation.tokenizer
    edited, points, seconds = [], [], 0.0
    EDIT.optimise.saved = 0.0
    for fact in facts:
        before = examine(anatomy.model, tokenizer, [fact], corpus=corpus, config=LIGHT)
        one_edit = edit(preparation, [fact], EditConfig(method=method))
        seconds += one_edit.seconds
        with one_edit.patch.applied(anatomy):
            after = examine(anatomy.model, tokenizer, [fact], corpus=corpus, config=LIGHT)
        edited.append(scored(before, after))
        flight, card = one_edit.preflight, edited[-1].card
        known, kept = float(card.neighbours_known_before), float(card.neighbours_kept)
        nll = edited[-1].nll_change
        points.append([flight.relative_damage, flight.update_norm_ratio, known, kept, nll])
    damage = sorted(p[0] for p in points)
    ratios = sorted(p[1] for p in points)
    middle = len(points) // 2
    extra = {
        "relative_damage_median": damage[middle],
        "relative_damage_max": damage[-1],
        "update_norm_ratio_median": ratios[middle],
    }
    return summary(edited, seconds + EDIT.optimise.saved, len(facts), extra), points


def batch(
    preparation: Preparation, facts: Sequence[Fact], method: str, corpus: Corpus
) -> dict[str, Any]:
    anatomy, tokenizer = preparation.anatomy, preparation.tokenizer
    before = examine(anatomy.model, tokenizer, facts, corpus=corpus, config=LIGHT)
    EDIT.optimise.saved = 0.0
    edits = edit(preparation, facts, EditConfig(method=method))
    with edits.patch.applied(anatomy):
        after = examine(anatomy.model, tokenizer, facts, corpus=corpus, config=LIGHT)
    damage = [one.relative_damage for one in edits.preflight.layers]
    seconds = edits.seconds + EDIT.optimise.saved
    return summary([scored(before, after)], seconds, len(facts), {"relative_damage": damage})


def value_costs(preparation: Preparation, facts: Sequence[Fact], layer: int) -> dict[str, float]:
    """Seconds for the values of these facts: together, one by one, and one by one from the bottom
    of the model at every step.
    """
    from surgeon.edit import value as module

    anatomy = preparation.anatomy
    requests = [
        Request.of(preparation.tokenizer, f.prompt, f.subject, str(f.target), preparation.prefixes)
        for f in facts
    ]
    config = ValueConfig(steps=20, stop=0.999)

    def timed(one_by_one: bool) -> float:
        start = time.perf_counter()
        for group in [[r] for r in requests] if one_by_one else [requests]:
            optimise(anatomy, group, layer, config)
        return time.perf_counter() - start

    timed(True)
    together, alone = timed(False), timed(True)
    capture = module.capture
    module.capture = lambda *_, **__: None  # type: ignore[assignment]
    try:
        bottom = timed(True)
    finally:
        module.capture = capture
    return {"together": together, "one_by_one": alone, "one_by_one_from_the_bottom": bottom}


def covariance_cost(anatomy: Anatomy, windows: torch.Tensor, layer: int) -> dict[str, float]:
    """Tokens per second of the covariance of one layer, and of a plain forward pass of the whole
    model.
    """
    rates: dict[str, list[float]] = {"covariance": [], "plain": []}
    for _ in range(3):
        start = time.perf_counter()
        key_moments(anatomy, windows, [layer])
        rates["covariance"].append(windows.numel() / (time.perf_counter() - start))
        start = time.perf_counter()
        with torch.no_grad():
            for ids in batches(windows):
                anatomy.model(input_ids=ids, use_cache=False)
        rates["plain"].append(windows.numel() / (time.perf_counter() - start))
    return {name: sorted(values)[1] for name, values in rates.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--pararel", type=Path, required=True)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--no-batch", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    loaded = load_model(options.model)
    anatomy = Anatomy.of(loaded.model)
    prove(anatomy)
    tokenizer = loaded.tokenizer
    assert tokenizer is not None
    facts = known_facts(anatomy, tokenizer, options.pararel, options.count)
    preparation = Preparation(anatomy, tokenizer)
    corpus = load_corpus(tokenizer, heldout_text(), "heldout", 128, 8)
    layer = 1 if len(anatomy.layers) > 2 else 0
    start = time.perf_counter()
    preparation.gather([layer])
    measured: dict[str, Any] = {
        "model": options.model,
        "facts": len(facts),
        "single": {},
        "batch": {},
        "points": {},
    }
    measured["covariance_seconds"] = time.perf_counter() - start
    measured["value_seconds"] = value_costs(preparation, facts[:8], layer)
    measured["tokens_per_second"] = covariance_cost(
        anatomy, preparation._windows(20 * anatomy.view(dense_down(anatomy, layer)).shape[1]), layer
    )
    measured["single"]["in context"] = in_context(anatomy, tokenizer, facts, corpus)
    print(json.dumps(measured, indent=1), flush=True)
    EDIT.optimise = Remembered()
    for method in options.methods.split(","):
        measured["single"][method], measured["points"][method] = single(
            preparation, facts, method, corpus
        )
        print("single", method, json.dumps(measured["single"][method]), flush=True)
    for method in [] if options.no_batch else options.methods.split(","):
        if method in ("rome", "emmet", "memit", "alphaedit", "ft"):
            measured["batch"][method] = batch(preparation, facts, method, corpus)
            print("batch", method, json.dumps(measured["batch"][method]), flush=True)
    if options.out is not None:
        options.out.write_text(json.dumps(measured) + "\n")


if __name__ == "__main__":
    main()
