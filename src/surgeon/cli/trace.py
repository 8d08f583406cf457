"""`surgeon trace`: which states carry a fact."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import click
from rich.markup import escape
from rich.table import Table

from ..corpus import BOS_POLICIES
from ..errors import BadInput
from ..facts import read_facts
from ..show.console import err, out, print_table
from ..trace import (
    KINDS,
    METRICS,
    AverageTrace,
    Trace,
    TraceConfig,
    suggest_prior,
    trace,
    trace_facts,
)
from .common import (
    deliver,
    folder_option,
    json_option,
    model_options,
    open_model,
    progress,
    require_finite,
    run_folder,
    seed_option,
    tokenizer_of,
)

SHADES = " ░▒▓█"
SHOWN = 3
HELP = {
    f.name: f"{f.metadata['help'][0].upper()}{f.metadata['help'][1:]}." for f in fields(TraceConfig)
}


@click.command("trace")
@model_options
@click.option("--prompt", metavar="S", help="Prompt of the fact; {} may stand for the subject.")
@click.option("--subject", metavar="S", help="The words to corrupt, as they stand in the prompt.")
@click.option(
    "--answer",
    metavar="S",
    help="The answer whose first token is followed.  [default: what the model says]",
)
@click.option(
    "--versus",
    metavar="S",
    help="Another answer, for --metric logit.  [default: what the corrupted model says]",
)
@click.option(
    "--facts",
    "facts_file",
    metavar="FILE",
    help="Average over the facts of a file that the model knows.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Use the first N facts of the file.")
@click.option(
    "--corrupt",
    default=f"noise:{TraceConfig.noise:g}",
    show_default=True,
    metavar="HOW",
    help=(
        "noise:F, Gaussian noise of F standard deviations of embeddings; or replace:WORDS, as many"
        " other tokens."
    ),
)
@click.option("--samples", default=TraceConfig.samples, show_default=True, help=HELP["samples"])
@click.option("--window", type=int, help=HELP["window"])
@click.option("--kinds", default=",".join(KINDS), show_default=True, help=HELP["kinds"])
@click.option("--sever", type=click.Choice(["mlp", "attn"]), help=HELP["sever"])
@click.option(
    "--metric",
    default=TraceConfig.metric,
    show_default=True,
    type=click.Choice(METRICS),
    help=HELP["metric"],
)
@click.option(
    "--bos",
    default="auto",
    show_default=True,
    type=click.Choice(BOS_POLICIES),
    help="Whether prompts begin with BOS.",
)
@seed_option
@folder_option
@json_option
def command(
    model: str,
    dtype: str,
    device: str,
    prompt: str | None,
    subject: str | None,
    answer: str | None,
    versus: str | None,
    facts_file: str | None,
    limit: int | None,
    corrupt: str,
    samples: int,
    window: int | None,
    kinds: str,
    sever: str | None,
    metric: str,
    bos: str,
    seed: int,
    folder: str | None,
    as_json: bool,
) -> None:
    """Corrupt the subject of a prompt, put one clean state of MODEL back at a time, and see how
    much of the answer returns.
    """
    wanted = tuple(dict.fromkeys(k.strip() for k in kinds.split(",") if k.strip()))
    config = TraceConfig(
        **_corruption(corrupt),
        samples=samples,
        window=window,
        kinds=wanted,
        sever=sever,
        metric=metric,
        seed=seed,
    )
    if facts_file is None and (prompt is None or subject is None):
        raise click.UsageError("a trace needs --prompt and --subject, or --facts FILE.")
    if facts_file is not None and any(v is not None for v in (prompt, subject, answer, versus)):
        raise click.UsageError(
            "give either --facts, or --prompt and --subject with what belongs to them."
        )
    if facts_file is not None and config.replace is not None:
        raise BadInput(
            f"--corrupt {corrupt} can take the place of one subject only; corrupt the subjects of"
            " --facts with noise."
        )
    facts = None if facts_file is None else read_facts(facts_file)[:limit]
    run = run_folder(folder)
    loaded, anatomy = open_model(model, dtype, device)
    found: Trace | AverageTrace
    with progress() as tell:
        if facts is not None:
            found = trace_facts(anatomy, tokenizer_of(loaded), facts, config, bos, tell)
        else:
            found = trace(
                anatomy,
                tokenizer_of(loaded),
                str(prompt),
                str(subject),
                config,
                answer,
                versus,
                bos,
                progress=tell,
            )
    document = found.to_json()
    require_finite(
        **{
            "the answer with the clean subject": document["p_clean"],
            "the answer with it corrupted": document["p_corrupt"],
        }
    )
    if isinstance(found, Trace):
        require_finite(
            **{
                f"the answer with a {kind} restored": float(values.sum())
                for kind, values in found.effects.items()
            }
        )
    for warning in found.warnings:
        err.print(f"surgeon: {escape(_line(warning))}")
    body = {"average": document} if isinstance(found, AverageTrace) else document

    def tell_all() -> None:
        if isinstance(found, AverageTrace):
            print_average(model, found)
        else:
            print_trace(model, found)

    deliver(
        "trace", {"model": model, "fingerprint": loaded.fingerprint, **body}, tell_all, as_json, run
    )


def _corruption(text: str) -> dict[str, Any]:
    how, _, what = text.partition(":")
    if how == "replace":
        return {"replace": what}
    try:
        if how == "noise":
            return {"noise": float(what)}
    except ValueError:
        pass
    raise BadInput(f"--corrupt {text!r} is not known; use noise:F, like noise:3, or replace:WORDS.")


def print_trace(model: str, one: Trace) -> None:
    """A map of each kind, layers to the right as in the published figures, and the sites that bring
    most back.
    """
    low, high = float(one.corrupt.mean()), one.clean
    what = (
        f"P({one.answer!r})"
        if one.config.metric == "probability"
        else f"logit of {one.answer!r} over {one.versus!r}"
    )
    out.print(
        f"[bold]{escape(_line(model))}[/bold]: {escape(what)} {high:.4f}, with the subject"
        f" corrupted [bold]{low:.4f}[/bold]"
    )
    out.print(
        f"the subject (*): {escape(', '.join(map(repr, one.prompt.subject_tokens)))}; blank is"
        " corrupted, █ is clean"
    )
    for kind in one.effects:
        mean = one.mean(kind)
        table = Table(
            title=f"[bold]{_title(kind, one.window, one.config)}[/bold] restored, by layer",
            title_justify="left",
            box=None,
        )
        table.add_column("token")
        for layer in range(len(mean)):
            table.add_column(str(layer), justify="center")
        for position, token in enumerate(one.prompt.tokens):
            star = "*" if one.prompt.start <= position < one.prompt.stop else " "
            cells = [_shade(float(mean[layer, position]), low, high) for layer in range(len(mean))]
            table.add_row(escape(star + _line(token)), *cells)
        print_table(table)
        sites = []
        for layer, p, value in one.best(kind, SHOWN):
            spread = (
                " ({:.4f} to {:.4f})".format(*one.ci95(kind, layer, p))
                if len(one.corrupt) > 1
                else ""
            )
            sites.append(f"layer {layer} at {one.prompt.tokens[p]!r} {value:.4f}{spread}")
        out.print(f"most comes back at {escape('; '.join(sites))}")


def print_average(model: str, average: AverageTrace) -> None:
    document = average.to_json()
    out.print(
        f"[bold]{escape(_line(model))}[/bold]: {document['facts']} facts ({document['skipped']}"
        f" that it does not know are left out); {document['p_clean']:.4f} clean,"
        f" {document['p_corrupt']:.4f} with the subject corrupted"
    )
    for kind in average.effects:
        title = (
            f"[bold]{_title(kind, average.window, average.config)}[/bold]: mean effect, by layer"
        )
        table = Table(
            "layer",
            *document["places"],
            title=title,
            title_justify="left",
            box=None,
            header_style="bold",
        )
        for layer, row in enumerate(document[kind]):
            table.add_row(str(layer), *("" if v is None else f"{v:+.3f}" for v in row))
        print_table(table)
    if "mlp" in average.effects:
        layers = ", ".join(
            f"{layer} ({effect:+.3f}, {ci[0]:+.3f} to {ci[1]:+.3f})"
            for layer, effect, ci in suggest_prior(average)[:5]
        )
        out.print(f"layers by the effect of their MLP at the subject's last token: {layers}")


def _title(kind: str, window: int, config: TraceConfig) -> str:
    """What was restored, in words: `mlp, 4 layers`."""
    if kind == "severed":
        return f"state, with {config.sever} above it kept corrupted,"
    return kind if kind == "state" else f"{kind}, {window} layer{'s' if window > 1 else ''}"


def _shade(value: float, low: float, high: float) -> str:
    share = (value - low) / (high - low) if high != low else 0.0
    return SHADES[max(0, min(len(SHADES) - 1, round(share * (len(SHADES) - 1))))] * 2


def _line(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
