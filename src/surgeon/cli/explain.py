"""`surgeon explain`: how a patch works."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.markup import escape
from rich.table import Table

from ..corpus import read_text
from ..errors import BadInput
from ..explain import (
    Curve,
    ExplainConfig,
    Explanation,
    GeometryConfig,
    Influence,
    InfluenceConfig,
    WordGroup,
    explain,
)
from ..patch import Patch, load
from ..patients import heldout_text
from ..show.console import out, print_table
from .common import (
    Writer,
    deliver,
    folder_option,
    json_option,
    model_options,
    open_corpus,
    open_model,
    patch_option,
    progress,
    require_finite,
    run_folder,
    seed_option,
    text_options,
    tokenizer_of,
    write_columns,
)

SHOWN = 5
SHOWN_POSITIONS = 8


@click.command("explain")
@model_options
@patch_option
@text_options(windows=40)
@click.option(
    "--prompt", "prompts", multiple=True, help="Also continue this prompt; several are allowed."
)
@click.option(
    "--new-tokens",
    default=ExplainConfig.new_tokens,
    type=click.IntRange(min=1),
    show_default=True,
    help="Tokens a prompt.",
)
@click.option(
    "--group",
    "groups",
    multiple=True,
    metavar="NAME=WORD,WORD",
    help="Words to test as a group; several are allowed.",
)
@click.option(
    "--words",
    "files",
    multiple=True,
    metavar="FILE",
    help="The same from a file, words apart by white space.",
)
@click.option(
    "--trained",
    "trained",
    multiple=True,
    metavar="K=P",
    help="A repair trained with K entries, for the top-k curve.",
)
@click.option(
    "--permutations",
    default=InfluenceConfig.permutations,
    type=click.IntRange(min=99),
    show_default=True,
    help="Of each test.",
)
@click.option(
    "--draws",
    default=GeometryConfig.draws,
    type=click.IntRange(min=1),
    show_default=True,
    help="Random choices of k entries.",
)
@seed_option
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
    groups: tuple[str, ...],
    files: tuple[str, ...],
    trained: tuple[str, ...],
    permutations: int,
    draws: int,
    seed: int,
    folder: str | None,
    as_json: bool,
) -> None:
    """Say how patches of MODEL work: geometry, top-k curve, the channel they write, the tokens they
    change, behaviour.

    The first --patch is the injury, those after it are its repair. A group of words is tested
    against words of the same documents and frequency, since a ranking on a few lines is about what
    these lines are about.
    """
    if not patches:
        raise click.UsageError(
            "Missing option '--patch'; the first is the injury, those after it are its repair."
        )
    words = _groups(groups, files)
    stack = [load(p) for p in patches]
    extra = [_trained(item) for item in trained]
    run = run_folder(folder)
    loaded, anatomy = open_model(model, dtype, device)
    corpus = open_corpus(loaded, text, window, windows, bos)
    config = ExplainConfig(
        geometry=GeometryConfig(draws=draws, seed=seed),
        influence=InfluenceConfig(permutations=permutations, seed=seed),
        new_tokens=new_tokens,
    )
    with progress() as tell:
        result = explain(
            anatomy,
            tokenizer_of(loaded),
            heldout_text() if text is None else read_text(text),
            corpus,
            stack,
            words,
            prompts,
            extra,
            bos,
            config,
            tell,
        )
    require_finite(
        **{
            f"the KL of the {state} model": float(kl.mean())
            for state, kl in result.influence.kl.items()
        }
    )
    document = {
        "model": model,
        "fingerprint": loaded.fingerprint,
        "patches": list(patches),
        "corpus": corpus.to_json(),
        **result.to_json(),
    }
    data: dict[str, Writer] = {
        "tokens.parquet": lambda path: write_columns(result.influence.columns(), path)
    }
    deliver("explain", document, lambda: print_explanation(document, result), as_json, run, data)


def print_explanation(document: dict[str, Any], result: Explanation) -> None:
    corpus = document["corpus"]
    out.print(
        f"[bold]{shown(document['model'])}[/bold] with {shown(', '.join(document['patches']))} on"
        f" {shown(corpus['name'])}, {len(result.influence.tokens.ids)} tokens"
    )
    _print_geometry(result)
    if result.curve:
        _print_curve(result.curve)
    else:
        out.print(f"no top-k curve: {shown(result.no_curve or '')}")
    _print_channel(result)
    _print_influence(result.influence)
    _print_behaviour(result)


def shown(text: str) -> str:
    """Text of a model or a user as it may be printed: no markup, and nothing that a terminal would
    obey.
    """
    return escape(
        "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    )


def _groups(groups: tuple[str, ...], files: tuple[str, ...]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for item in groups:
        name, _, words = item.partition("=")
        found[name.strip()] = [w for word in words.split(",") if (w := word.strip())]
        if not name.strip() or not found[name.strip()]:
            raise BadInput(
                f"--group {item!r} is not a group of words; write it like --group"
                " 'marine=lobster,crab'."
            )
    found |= {Path(file).stem: read_text(file).split() for file in files}
    if len(found) < len(groups) + len(files):
        raise BadInput(
            "two groups of words have one name; give each --group and each file of --words a name"
            " of its own."
        )
    return found


def _trained(item: str) -> tuple[int, Patch]:
    k, _, path = item.partition("=")
    if not k.isdigit() or int(k) < 1 or not path:
        raise BadInput(
            f"--trained {item!r} is not a number of entries and a patch; write it like --trained"
            " 16=repair-16.safetensors."
        )
    return int(k), load(path)


def _table(title: str, *columns: str) -> Table:
    return Table(
        *columns,
        title=f"[bold]{title}[/bold]" if title else None,
        title_justify="left",
        box=None,
        header_style="bold",
    )


def _print_geometry(result: Explanation) -> None:
    lines = result.geometry.lines
    table = _table(
        "geometry",
        "row",
        "|base|",
        "|broken|",
        "|delta|",
        "|merged|",
        "cos(delta, base)",
        "cos(merged, base)",
        "effective entries",
    )
    for line in lines:
        norms = (f"{line.norms[name]:.3f}" for name in ("base", "broken", "delta", "merged"))
        cosines = (f"{line.cosines[pair]:+.3f}" for pair in ("delta_base", "merged_base"))
        table.add_row(
            escape(str(line.region)),
            *norms,
            *cosines,
            f"{line.participation:.1f} of {line.changed}",
        )
    print_table(table)
    if result.geometry.of > len(lines):
        out.print(f"and {result.geometry.of - len(lines)} more")
    table = _table("largest entries of the delta", "entry", "delta", "base")
    for entry in lines[0].top[:SHOWN]:
        table.add_row(escape(entry["entry"]), f"{entry['delta']:+.4f}", f"{entry['base']:+.4f}")
    print_table(table)
    ranks = ", ".join(
        f"{escape(e['entry'])}: {e['rank'] or 'untouched'}" for e in lines[0].ablated[:SHOWN]
    )
    out.print(
        f"rank in the delta of the {lines[0].injured} injured entries of"
        f" {escape(str(lines[0].region))}: {ranks or 'none there'}"
    )


def _print_curve(curve: Curve) -> None:
    table = _table(
        "damage recovered by k entries", "k", "largest", "random", "range", "trained with k"
    )
    for p in curve.points:
        spread = f"{p.random_range[0]:+.3f} to {p.random_range[1]:+.3f}" if p.random_range else ""
        table.add_row(
            str(p.k),
            *("" if v is None else f"{v:+.3f}" for v in (p.largest, p.random)),
            spread,
            _optional(p.trained),
        )
    print_table(table)
    out.print("NLL " + ", ".join(f"{state} {value:.4f}" for state, value in curve.nll.items()))


def _optional(value: float | None) -> str:
    return "" if value is None else f"{value:+.3f}"


def _print_channel(result: Explanation) -> None:
    trace = result.channel
    for channel in trace.channels or []:
        table = _table(
            f"channel {channel.channel}, written by {escape(str(channel.written_by))}",
            "state",
            "peak",
            "of base",
            "first position, by layer",
            "later positions, by layer",
        )
        for name, state in channel.states.items():
            first, rest = (
                " ".join(f"{v:.3g}" for v in values[-SHOWN_POSITIONS:])
                for values in (state.first, state.rest)
            )
            table.add_row(name, f"{state.peak:.3g}", f"{state.ratio:.2f}", first, rest)
        print_table(table)
    if trace.no_channels:
        out.print(f"no channel: {shown(trace.no_channels)}")
    if trace.sink:
        table = _table(
            f"attention to position 0, by layer (even attention: {trace.sink.uniform:.3f})",
            "state",
            "share",
        )
        for name, shares in trace.sink.states.items():
            table.add_row(name, " ".join(f"{share:.3f}" for share in shares))
        print_table(table)
    else:
        out.print(f"no attention sink: {shown(trace.no_sink or '')}")


def _print_influence(influence: Influence) -> None:
    document = influence.to_json()
    table = _table(
        "tokens that change most, by KL(base || broken)",
        "nats",
        "context",
        "token",
        "word",
        "document",
    )
    for row in document["top"][: SHOWN * 2]:
        table.add_row(
            f"{row['kl_broken']:.2f}",
            *(shown(row[column]) for column in ("context", "token", "word", "title")),
        )
    print_table(table)
    seen = ", ".join(
        f"{shown(title)} {n}" for title, n in list(document["top_by_document"].items())[:SHOWN]
    )
    out.print(
        f"of the top {influence.config.top}: {seen}  ({document['documents_seen']} documents;"
        f" {document['documents_rule']})"
    )
    table = _table(
        "by document, beside words of equal frequency anywhere",
        "document",
        "tokens",
        "KL",
        "expected",
        "p",
        "corrected",
    )
    for stratum in influence.documents[:SHOWN]:
        table.add_row(
            shown(stratum.name),
            *_stratum(
                stratum.tokens, stratum.mean_kl, stratum.expected_kl, stratum.p, stratum.p_corrected
            ),
        )
    print_table(table)
    table = _table(
        "by frequency of the word, beside the same documents",
        "count",
        "tokens",
        "KL",
        "expected",
        "p",
        "corrected",
    )
    for c in influence.frequencies:
        table.add_row(c.name, *_stratum(c.tokens, c.mean_kl, c.expected_kl, c.p, c.p_corrected))
    print_table(table)
    for group in influence.words:
        _print_group(group)


def _print_group(g: WordGroup) -> None:
    out.print(
        f"[bold]{shown(g.name)}[/bold]: {g.tokens} tokens of {g.words} words, {g.in_text:.1%} of"
        f" the text, {g.in_top:.0%} of the top"
    )
    table = _table("", "", "KL", "beside", "p", "corrected")
    table.add_row(
        "all other tokens, as a bare ranking has it",
        f"{g.mean_kl:.3f}",
        f"{g.others_kl:.3f}",
        f"{g.p_naive:.4f}",
    )
    within = (f"{v:.4f}" for v in (g.p_within, g.p_corrected))
    table.add_row(
        "words of the same documents and frequency",
        f"{g.mean_kl:.3f}",
        f"{g.same_documents_kl:.3f}",
        *within,
    )
    if g.p_document is not None:
        table.add_row(
            "its documents beside all, at equal frequency",
            f"{g.documents_nats:+.3f}",
            "",
            f"{g.p_document:.4f}",
        )
    print_table(table)
    verdict = (
        "these words are hit harder than other"
        if g.holds
        else "not shown to be hit harder than other"
    )
    out.print(
        f"[bold]{verdict}[/bold] words of the same documents and frequency; {g.in_one_document:.0%}"
        f" stand in {shown(g.document)}"
    )


def _stratum(
    tokens: int, mean: float, expected: float, p: float | None, corrected: float | None
) -> list[str]:
    return [
        str(tokens),
        f"{mean:.3f}",
        f"{expected:.3f}",
        *("" if v is None else f"{v:.4f}" for v in (p, corrected)),
    ]


def _print_behaviour(result: Explanation) -> None:
    written = result.behaviour
    table = _table("behaviour", "state", "loop rate", "distinct-1", "distinct-2", "distinct-3")
    for state in written.states:
        table.add_row(
            state,
            f"{written.loop_rate(state):.3f}",
            *(f"{written.distinct(state, n):.3f}" for n in (1, 2, 3)),
        )
    print_table(table)
    for i, prompt in enumerate(written.prompts):
        out.print(f"[bold]{shown(prompt)}[/bold]")
        for state, texts in written.states.items():
            out.print(f"  {state}: {shown(texts[i].text)}")
