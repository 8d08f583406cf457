"""`surgeon trace`: which states carry a fact."""

from __future__ import annotations

from typing import Any

import click
from rich.markup import escape
from rich.table import Table

from ..errors import BadInput
from ..facts import read_facts
from ..trace import KINDS, METRICS, AverageTrace, Trace, TraceConfig, suggest_prior, trace, trace_facts
from .common import (
    err,
    json_option,
    model_options,
    open_model,
    out,
    print_json,
    print_table,
    progress,
    require_finite,
    seed_option,
    tokenizer_of,
)

SHADES = " ░▒▓█"


@click.command("trace")
@model_options
@click.option("--prompt", help="Prompt of the fact; {} may stand for the subject.")
@click.option("--subject", help="The words to corrupt, as they stand in the prompt.")
@click.option("--answer", help="The answer to follow; default: what the model says.")
@click.option("--versus", help="Another answer, for --metric logit; default: what the corrupted model says.")
@click.option("--facts", "facts_file", metavar="FILE", help="Average over the facts of a file that the model knows.")
@click.option("--limit", type=click.IntRange(min=1), help="Use the first N facts of the file.")
@click.option("--kind", "kinds", multiple=True, type=click.Choice(KINDS), help="What is restored; default: all three.")
@click.option("--noise", default=TraceConfig.noise, show_default=True, help="Standard deviations of the subject's embeddings.")
@click.option("--replace", metavar="WORDS", help="Put these words in the subject's place instead of noise; as many tokens.")
@click.option("--samples", default=TraceConfig.samples, show_default=True, help="Draws of the noise.")
@click.option("--window", default=TraceConfig.window, show_default=True, help="Layers of MLP or attention restored together.")
@click.option("--sever", type=click.Choice(["mlp", "attn"]), help="Keep these corrupted above a restored state.")
@click.option("--metric", default=TraceConfig.metric, show_default=True, type=click.Choice(METRICS), help="What is measured of the answer.")
@click.option("--bos", default="auto", show_default=True, type=click.Choice(["auto", "yes", "no"]), help="Whether prompts begin with BOS.")
@seed_option
@json_option
def command(
    model: str, dtype: str, device: str, prompt: str | None, subject: str | None, answer: str | None, versus: str | None,
    facts_file: str | None, limit: int | None, kinds: tuple[str, ...], noise: float, replace: str | None, samples: int, window: int,
    sever: str | None, metric: str, bos: str, seed: int, as_json: bool,
) -> None:  # fmt: skip
    """Corrupt the subject of a prompt, put one clean state of MODEL back at a time, and see how much of the answer returns."""
    config = TraceConfig(noise, replace, samples, window, kinds or KINDS, sever, metric, seed)
    if facts_file is None and (prompt is None or subject is None):
        raise click.UsageError("a trace needs --prompt and --subject, or --facts FILE.")
    facts = None if facts_file is None else read_facts(facts_file)[:limit]
    if facts is not None and replace is not None:
        raise BadInput("--replace puts one set of words in place of one subject; use noise with --facts.")
    loaded, anatomy = open_model(model, dtype, device)
    document: dict[str, Any] = {"model": model, "fingerprint": loaded.fingerprint}
    with progress() as tell:
        if facts is not None:
            average = trace_facts(anatomy, tokenizer_of(loaded), facts, config, bos, tell)
            document["average"] = average.to_json()
        else:
            one = trace(anatomy, tokenizer_of(loaded), str(prompt), str(subject), config, answer, versus, bos, progress=tell)
            require_finite(**{"the answer's probability": one.clean, "the same with the subject corrupted": float(one.corrupt.mean())})
            for warning in one.prompt.warnings:
                err.print(f"surgeon: {escape(warning)}")
            document |= one.to_json()
    if as_json:
        print_json(document)
    elif facts is not None:
        print_average(model, average)
    else:
        print_trace(model, one)


def print_trace(model: str, one: Trace) -> None:
    """A map of each kind, layers downwards as in the published figures, and the best sites."""
    low, high = float(one.corrupt.mean()), one.clean
    what = f"P({one.answer!r})" if one.config.metric == "probability" else f"logit of {one.answer!r} over {one.versus!r}"
    out.print(f"[bold]{escape(model)}[/bold]: {escape(what)} {high:.4f}, with the subject corrupted [bold]{low:.4f}[/bold]")
    for kind in one.effects:
        mean = one.mean(kind)
        table = Table(title=f"[bold]{kind}[/bold] restored", title_justify="left", box=None, header_style="bold")
        table.add_column("token")
        for layer in range(len(mean)):
            table.add_column(str(layer), justify="center")
        for position, token in enumerate(one.prompt.tokens):
            star = "*" if one.prompt.start <= position < one.prompt.stop else " "
            cells = [_shade(float(mean[layer, position]), low, high) for layer in range(len(mean))]
            table.add_row(escape(star + _line(token)), *cells)
        print_table(table)
        layer, position, value = one.best(kind)
        out.print(f"most comes back at layer {layer}, {escape(repr(one.prompt.tokens[position]))}: {value:.4f}")


def print_average(model: str, average: AverageTrace) -> None:
    document = average.to_json()
    out.print(
        f"[bold]{escape(model)}[/bold]: {document['facts']} facts ({document['skipped']} that it does not know are left out); "
        f"{document['p_clean']:.4f} clean, {document['p_corrupt']:.4f} with the subject corrupted"
    )
    for kind in average.effects:
        table = Table("layer", *document["places"], title=f"[bold]{kind}[/bold]: mean effect", title_justify="left", box=None)
        for layer, row in enumerate(document[kind]):
            table.add_row(str(layer), *("" if v is None else f"{v:+.3f}" for v in row))
        print_table(table)
    if "mlp" in average.effects:
        layers = ", ".join(f"{layer} ({effect:+.3f}, {ci[0]:+.3f} to {ci[1]:+.3f})" for layer, effect, ci in suggest_prior(average)[:5])
        out.print(f"layers by the effect of their MLP at the subject's last token: {layers}")


def _shade(value: float, low: float, high: float) -> str:
    share = (value - low) / (high - low) if high != low else 0.0
    return SHADES[max(0, min(len(SHADES) - 1, round(share * (len(SHADES) - 1))))] * 2


def _line(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
