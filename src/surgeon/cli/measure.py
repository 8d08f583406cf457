"""`surgeon measure`: likelihood, divergence and behaviour, with patches or without."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from math import exp
from typing import Any

import click
from rich.markup import escape

from ..measure import divergence, generate, mean_nll, require_causal, task_accuracy
from ..patch import load
from ..show.console import out
from .common import (
    deliver,
    folder_option,
    json_option,
    model_options,
    open_corpus,
    open_model,
    patch_option,
    require_finite,
    run_folder,
    text_options,
    tokenizer_of,
)


@click.command("measure")
@model_options
@patch_option
@text_options(windows=None)
@click.option(
    "--generate",
    "prompts",
    multiple=True,
    metavar="PROMPT",
    help="Also continue this prompt greedily; several are allowed.",
)
@click.option(
    "--new-tokens",
    default=40,
    type=click.IntRange(min=1),
    show_default=True,
    help="Tokens per generation.",
)
@click.option(
    "--task",
    "tasks",
    multiple=True,
    help="Also: accuracy on an lm-eval task, by name or YAML file (needs weight-surgeon[eval]).",
)
@click.option("--limit", type=click.IntRange(min=1), help="Examples per task; default: all.")
@folder_option
@json_option
def command(
    model: str,
    dtype: str,
    device: str,
    patches: tuple[str, ...],
    text: str | None,
    window: int,
    windows: int | None,
    bos: str,
    prompts: tuple[str, ...],
    new_tokens: int,
    tasks: tuple[str, ...],
    limit: int | None,
    folder: str | None,
    as_json: bool,
) -> None:
    """NLL and perplexity of MODEL; with patches also KL to the unpatched model and both generations
    side by side.
    """
    run = run_folder(folder)
    loaded, anatomy = open_model(model, dtype, device)
    require_causal(loaded.model)
    tokenizer = tokenizer_of(loaded)
    corpus = open_corpus(loaded, text, window, windows, bos)
    stack = [load(p) for p in patches]

    @contextmanager
    def patched() -> Iterator[None]:
        with ExitStack() as applied:
            for patch in stack:
                applied.enter_context(patch.applied(anatomy))
            yield

    with patched():
        nll = mean_nll(loaded.model, corpus.windows)
        changed = generate(loaded.model, tokenizer, prompts, new_tokens, bos)
        after = task_accuracy(loaded.model, tokenizer, tasks, limit) if tasks else {}
    far = divergence(loaded.model, corpus.windows, patched) if stack else None
    require_finite(**{"the NLL": nll, "the KL to the base": far.kl if far else None})
    base = generate(loaded.model, tokenizer, prompts, new_tokens, bos) if stack else changed
    document: dict[str, Any] = {
        "model": model,
        "fingerprint": loaded.fingerprint,
        "patches": list(patches),
        "corpus": corpus.to_json(),
        "nll": nll,
        "ppl": exp(min(nll, 700.0)),
        "tokens": corpus.predicted,
        "kl_from_base": far.kl if far else None,
        "top1_agreement": far.top1_agreement if far else None,
        "generations": [
            {"prompt": b.prompt, "base": b.text, "patched": c.text}
            for b, c in zip(base, changed, strict=True)
        ],
        "loop_rate": sum(c.loop for c in changed) / len(changed) if changed else 0.0,
    }
    if tasks:
        before = task_accuracy(loaded.model, tokenizer, tasks, limit) if stack else after
        document["tasks"] = {name: {"base": before[name], "patched": after[name]} for name in after}
    deliver("measure", document, lambda: print_measure(document), as_json, run)


def print_measure(document: dict[str, Any]) -> None:
    d, patches = document, document["patches"]
    with_patches = f" with {escape(', '.join(patches))}" if patches else ""
    out.print(
        f"[bold]{escape(d['model'])}[/bold]{with_patches} on {escape(d['corpus']['name'])},"
        f" {d['tokens']} tokens"
    )
    distance = (
        f"  KL from base {d['kl_from_base']:.4f}  top-1 agreement {d['top1_agreement']:.3f}"
        if patches
        else ""
    )
    out.print(f"NLL {d['nll']:.4f}  perplexity {d['ppl']:.2f}{distance}")
    for name, scores in d.get("tasks", {}).items():
        out.print(
            f"{escape(name)}: accuracy {scores['base']:.3f} base, {scores['patched']:.3f} patched"
        )
    for g in d["generations"]:
        out.print(f"[bold]{escape(g['prompt'])}[/bold]")
        for name in ("base", "patched") if patches else ("base",):
            out.print(f"  {name}: {escape(g[name])}")
