"""Causal tracing: sites per second against one forward pass a site, in one process.

    python benchmarks/trace.py [MODEL ...]

One pass a site is the published way: all noise samples in one batch, a hook on the embedding and
one on each restored module, the whole model every time. The two are run in turn on a few known
facts, A B A B; the median ratio is printed, and how far their effects differ. A site is a kind
(state, mlp, attn), a layer and a token; the two ways answer for the same sites.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from surgeon.anatomy import Anatomy, load_model
from surgeon.facts import Fact
from surgeon.tap import Tap
from surgeon.trace import KINDS, Spread, Trace, TraceConfig, trace, trace_facts
from surgeon.trace.restore import write_module

REPEATS = 5
FACTS_GPT2 = Path(__file__).resolve().parents[2] / "shared" / "models" / "facts-gpt2"
PATIENT = [
    Fact("The capital of {} is", s, true=t)
    for s, t in (("France", "Paris"), ("Japan", "Tokyo"), ("Spain", "Madrid"))
]


def facts_of(name: str) -> list[Fact]:
    """The patient's capitals, or the facts of `facts.json` beside the weights."""
    if name == "patient":
        return PATIENT
    known = json.loads((Path(name) / "facts.json").read_text())
    first = {
        r: p[0].split("[Y]")[0].rstrip().replace("[X]", "{}")
        for r, p in known["patterns"].items()
        if "[Y]" in p[0]
    }
    return [
        Fact(first[r], s, true=o) for r, s, o in known["facts"] if first.get(r, "").count("{}") == 1
    ]


def known_facts(
    anatomy: Anatomy, tokenizer: PreTrainedTokenizerBase, facts: list[Fact], n: int
) -> list[Fact]:
    known: list[Fact] = []
    for fact in facts:
        ids = torch.tensor([tokenizer(fact.text).input_ids])
        with torch.no_grad():
            says = int(anatomy.model(ids).logits[0, -1].argmax())
        if says == tokenizer(f" {fact.true}", add_special_tokens=False).input_ids[0]:
            known.append(fact)
        if len(known) == n:
            break
    return known


@torch.no_grad()
def one_pass_a_site(anatomy: Anatomy, one: Trace) -> dict[str, Tensor]:
    """{kind: (layer, pos, sample)}, the probability of the answer."""
    prompt, config, layers = one.prompt, one.config, anatomy.layers
    embed = anatomy.model.get_input_embeddings()
    span, n = slice(prompt.start, prompt.stop), len(prompt.ids)
    noise = torch.randn(
        config.samples,
        prompt.stop - prompt.start,
        anatomy.d_model,
        generator=torch.Generator().manual_seed(config.seed),
    )
    modules = {
        "state": layers,
        **{k: [write_module(anatomy, i, k) for i in range(len(layers))] for k in ("mlp", "attn")},
    }
    clean: dict[tuple[str, int], Tensor] = {}
    with Tap() as tap:
        for kind, of_kind in modules.items():
            for i, module in enumerate(of_kind):
                tap.on_output(module, partial(_keep, clean, (kind, i)))
        answer = int(
            tap.run(anatomy.model, input_ids=torch.tensor([prompt.ids]), use_cache=False)
            .logits[0, -1]
            .argmax()
        )
    ids = torch.tensor([prompt.ids]).expand(config.samples, -1)

    def corrupt(y: Tensor) -> Tensor:
        y = y.clone()
        y[:, span] += one.sigma * noise
        return y

    def put(y: Tensor, source: Tensor, at: int) -> Tensor:
        y = y.clone()
        y[:, at] = source[0, at]
        return y

    effects = {}
    for kind in KINDS:
        effects[kind] = torch.zeros(len(layers), n, config.samples)
        for layer in range(len(layers)):
            low, high = (
                (layer, layer + 1)
                if kind == "state"
                else (layer - one.window // 2, layer + (one.window + 1) // 2)
            )
            for at in range(n):
                with Tap() as tap:
                    tap.on_output(embed, corrupt)
                    for i in range(max(0, low), min(len(layers), high)):
                        tap.on_output(modules[kind][i], partial(put, source=clean[kind, i], at=at))
                    logits = tap.run(anatomy.model, input_ids=ids, use_cache=False).logits[:, -1]
                effects[kind][layer, at] = logits.float().softmax(-1)[:, answer]
    return effects


def _keep(outputs: dict[tuple[str, int], Tensor], key: tuple[str, int], y: Tensor) -> None:
    outputs[key] = y.clone()


def shown(mean: float | None, ci95: tuple[float, float] | None) -> str:
    if mean is None or ci95 is None:
        return "none"
    return f"{mean:+.3f} ({ci95[0]:+.3f} to {ci95[1]:+.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "models",
        nargs="*",
        default=["patient", *([str(FACTS_GPT2)] if FACTS_GPT2.is_dir() else [])],
    )
    parser.add_argument("--facts", type=int, default=3, help="facts that are timed")
    parser.add_argument("--average", type=int, default=20, help="facts whose average is printed")
    arguments = parser.parse_args()
    for name in arguments.models:
        loaded = load_model(name, "float32")
        anatomy, tokenizer = Anatomy.of(loaded.model), loaded.tokenizer
        assert tokenizer is not None
        facts = known_facts(
            anatomy, tokenizer, facts_of(name), max(arguments.facts, arguments.average)
        )
        config, spread = TraceConfig(), Spread.of_vocabulary(anatomy)
        ratios, rates, gap = [], [], 0.0
        for repeat in range(REPEATS + 1):
            sites, fast, slow = 0, 0.0, 0.0
            for fact in facts[: arguments.facts]:
                start = time.perf_counter()
                one = trace(
                    anatomy,
                    tokenizer,
                    fact.prompt,
                    fact.subject,
                    replace(config, seed=repeat),
                    spread=spread,
                )
                middle = time.perf_counter()
                naive = one_pass_a_site(anatomy, one)
                fast, slow = fast + middle - start, slow + time.perf_counter() - middle
                sites += len(KINDS) * len(anatomy.layers) * len(one.prompt.ids)
                gap = max(gap, *(float((one.effects[k] - naive[k]).abs().max()) for k in KINDS))
            if repeat:  # the first round warms up
                ratios.append(slow / fast)
                rates.append((sites / fast, sites / slow))
        mine, theirs = (statistics.median(r[i] for r in rates) for i in (0, 1))
        print(
            f"{name}: {mine:.0f} sites a second against {theirs:.0f}, ratio"
            f" {statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f});"
            f" {config.samples} samples a site, {sites} sites a round, largest difference {gap:.1e}"
        )
        if len(facts) > 1:
            average = trace_facts(anatomy, tokenizer, facts[: arguments.average], config).result()
            print(
                f"  {average.facts} known facts: {average.p_clean:.4f} clean,"
                f" {average.p_corrupt:.4f} corrupted"
            )
            for place in ("last subject token", "first subject token", "last token"):
                column = average.places.index(place)
                for kind in KINDS:
                    intervals = getattr(average.ci, kind)
                    cells = [
                        shown(row[column], ci[column])
                        for row, ci in zip(average.effects[kind], intervals, strict=True)
                    ]
                    print(f"  {place}, {kind}, by layer: {'; '.join(cells)}")


if __name__ == "__main__":
    main()
