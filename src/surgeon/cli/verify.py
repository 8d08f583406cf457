"""`surgeon verify`: the damage of given entries."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import click
from rich.markup import escape
from rich.table import Table

from ..find import Verification, VerifyConfig, verify
from ..measure import STOP_WORDS, divergence, generate, stop_word_ids, stop_word_share
from ..patch import ablate
from ..show.console import out, print_table
from .common import (
    at_option,
    deliver,
    folder_option,
    json_option,
    model_options,
    open_corpus,
    open_model,
    progress,
    regions,
    require_finite,
    run_folder,
    seed_option,
    text_options,
    tokenizer_of,
)


@click.command("verify")
@model_options
@at_option
@text_options(windows=40)
@click.option(
    "--controls",
    default=VerifyConfig.controls,
    show_default=True,
    help="Matched control sets, at least 20.",
)
@click.option(
    "--min-nats",
    default=VerifyConfig.min_nats,
    show_default=True,
    help="Least joint damage to be called vital.",
)
@click.option(
    "--behaviour",
    is_flag=True,
    help="Also: KL and top-1 agreement, stop-word probability, loop rate of greedy generations.",
)
@click.option(
    "--prompt",
    "prompts",
    multiple=True,
    help="Prompt to generate from, with --behaviour; several are allowed.",
)
@click.option(
    "--stop-word",
    "stop_words",
    multiple=True,
    help="Word counted as a stop word, with --behaviour; default: a list of frequent ones.",
)
@seed_option
@folder_option
@json_option
def command(
    model: str,
    dtype: str,
    device: str,
    at: tuple[str, ...],
    text: str | None,
    window: int,
    windows: int | None,
    bos: str,
    controls: int,
    min_nats: float,
    behaviour: bool,
    prompts: tuple[str, ...],
    stop_words: tuple[str, ...],
    seed: int,
    folder: str | None,
    as_json: bool,
) -> None:
    """Measure what MODEL loses without the given entries: alone, together, all but one, and matched
    controls.
    """
    config = VerifyConfig(controls=controls, min_nats=min_nats, seed=seed)
    run = run_folder(folder)
    loaded, anatomy = open_model(model, dtype, device)
    parts = regions(anatomy, at)
    corpus = open_corpus(loaded, text, window, windows, bos)
    with progress() as tell:
        result = verify(anatomy, parts, corpus, config, tell)
    require_finite(**{"the NLL": result.base_nll, "the damage": result.joint})
    document: dict[str, Any] = {
        "model": model,
        "fingerprint": loaded.fingerprint,
        "corpus": corpus.to_json(),
        "at": [str(p) for p in parts],
        **result.to_json(),
    }
    if behaviour:
        tokenizer, injury = tokenizer_of(loaded), ablate(anatomy, parts)
        far = divergence(loaded.model, corpus.windows, lambda: injury.applied(anatomy))
        ids = stop_word_ids(tokenizer, stop_words or STOP_WORDS)
        document |= {"kl_from_base": far.kl, "top1_agreement": far.top1_agreement}
        for name, change in (("base", nullcontext()), ("ablated", injury.applied(anatomy))):
            with change:
                texts = generate(loaded.model, tokenizer, prompts or PROMPTS, bos=bos)
                document[name] = {
                    "stop_word_probability": stop_word_share(loaded.model, corpus.windows, ids),
                    "loop_rate": sum(t.loop for t in texts) / len(texts),
                    "generations": [{"prompt": t.prompt, "text": t.text} for t in texts],
                }
    deliver("verify", document, lambda: print_verify(model, result, document), as_json, run)


def print_verify(model: str, result: Verification, document: dict[str, Any]) -> None:
    where = escape(document["corpus"]["name"])
    out.print(
        f"[bold]{escape(model)}[/bold]: NLL {result.base_nll:.4f} on {result.tokens} tokens of"
        f" {where}"
    )
    table = Table("zeroed", "alone", "all but this", box=None, header_style="bold")
    for part, single, rest in zip(document["at"], result.single, result.leave_one_out, strict=True):
        table.add_row(escape(part), f"{single:+.4f}", f"{rest:+.4f}")
    print_table(table)
    out.print(
        f"together  [bold]{result.joint:+.4f} nats[/bold]  (95% {result.ci95[0]:+.4f} to"
        f" {result.ci95[1]:+.4f})"
    )
    if result.restored is not None:
        out.print(
            f"stays     {result.restored:+.4f} nats when the super activation alone is put back"
        )
    out.print(f"controls  {result.controls}")
    out.print(f"[bold]{'vital' if result.vital else 'not vital'}[/bold] ({result.criteria})")
    if "kl_from_base" in document:
        out.print(
            f"KL from base {document['kl_from_base']:.4f} nats, top-1 agreement"
            f" {document['top1_agreement']:.3f}"
        )
        for name in ("base", "ablated"):
            d = document[name]
            out.print(
                f"{name}: stop-word probability {d['stop_word_probability']:.3f}, loop rate"
                f" {d['loop_rate']:.3f}"
            )
            for g in d["generations"]:
                out.print(f"  {escape(g['prompt'])}|{escape(g['text'])}")


PROMPTS = (
    "Once upon a time, there was a little",
    "The capital of France is",
    "My favorite food is",
)
