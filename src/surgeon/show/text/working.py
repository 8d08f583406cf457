"""Explanations as text."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from ...explain import (
    Channel,
    Curve,
    Explanation,
    Geometry,
    Influence,
    SideBySide,
    Sink,
    Stratum,
    WordGroup,
)
from ..console import out, print_table, shown

SHOWN = 5
SHOWN_POSITIONS = 8


def print_explanation(result: Explanation) -> None:
    """Geometry, the top-k curve, the channel and the attention sink, influence, behaviour."""
    about = result.provenance
    text = "" if about.corpus is None else f" on {shown(about.corpus.name)}"
    tokens = "" if about.corpus is None else f", {about.corpus.tokens} tokens"
    patches = shown(", ".join(result.patches))
    out.print(f"[bold]{shown(about.model)}[/bold] with {patches}{text}{tokens}")
    _print_geometry(result.geometry)
    if result.topk_curve is None:
        out.print(f"No top-k curve: {shown(result.no_topk_curve or '')}")
    else:
        _print_curve(result.topk_curve)
    trace = result.channel
    for channel in trace.channels or []:
        _print_channel(channel)
    if trace.no_channels is not None:
        out.print(f"No channel: {shown(trace.no_channels)}")
    if trace.attention_sink is None:
        out.print(f"No attention sink: {shown(trace.no_attention_sink or '')}")
    else:
        _print_sink(trace.attention_sink)
    _print_influence(result.influence)
    _print_behaviour(result.behaviour)


def _table(title: str, *columns: str) -> Table:
    heading = f"[bold]{title}[/bold]" if title else None
    return Table(*columns, title=heading, title_justify="left", box=None, header_style="bold")


def _print_geometry(geometry: Geometry) -> None:
    table = _table(
        "Geometry",
        "row",
        "|base|",
        "|broken|",
        "|delta|",
        "|merged|",
        "cos(delta, base)",
        "cos(merged, base)",
        "effective entries",
    )
    for line in geometry.lines:
        norms = [f"{line.norms[name]:.3f}" for name in ("base", "broken", "delta", "merged")]
        cosines = [f"{line.cosines[pair]:+.3f}" for pair in ("delta_base", "merged_base")]
        entries = f"{line.participation:.1f} of {line.changed}"
        table.add_row(escape(str(line.region)), *norms, *cosines, entries)
    print_table(table)
    if geometry.of > len(geometry.lines):
        out.print(f"and {geometry.of - len(geometry.lines)} more")
    first = geometry.lines[0]
    table = _table("Largest entries of the delta", "entry", "delta", "base")
    for one in first.top[:SHOWN]:
        table.add_row(escape(str(one.entry)), f"{one.delta:+.4f}", f"{one.base:+.4f}")
    print_table(table)
    ranks = [f"{one.entry}: {one.rank or 'untouched'}" for one in first.ablated[:SHOWN]]
    out.print(
        f"Rank in the delta of the {first.injured} injured entries of {escape(str(first.region))}:"
        f" {escape(', '.join(ranks)) or 'none there'}"
    )


def _print_curve(curve: Curve) -> None:
    title = "Damage recovered by k entries"
    table = _table(title, "k", "largest", "random", "range", "trained with k")
    for point in curve.points:
        spread = ""
        if point.random_range is not None:
            least, most = point.random_range
            spread = f"{least:+.3f} to {most:+.3f}"
        table.add_row(
            str(point.k),
            _optional(point.largest),
            _optional(point.random),
            spread,
            _optional(point.trained),
        )
    print_table(table)
    nll = curve.nll
    out.print(f"NLL: base {nll.base:.4f}, broken {nll.broken:.4f}, patched {nll.patched:.4f}")


def _optional(value: float | None, digits: str = "+.3f") -> str:
    return "" if value is None else f"{value:{digits}}"


def _print_channel(channel: Channel) -> None:
    table = _table(
        f"Channel {channel.channel}, written by {escape(str(channel.written_by))}",
        "state",
        "peak",
        "of base",
        "first position, by layer",
        "later positions, by layer",
    )
    for name, state in channel.states.items():
        by_layer = [
            " ".join(f"{value:.3g}" for value in values[-SHOWN_POSITIONS:])
            for values in (state.first, state.rest)
        ]
        table.add_row(name, f"{state.peak:.3g}", f"{state.ratio:.2f}", *by_layer)
    print_table(table)


def _print_sink(sink: Sink) -> None:
    title = f"Attention to position 0, by layer (even attention: {sink.uniform:.3f})"
    table = _table(title, "state", "share")
    for name, shares in sink.states.items():
        table.add_row(name, " ".join(f"{share:.3f}" for share in shares))
    print_table(table)


def _print_influence(influence: Influence) -> None:
    title = "Tokens that change most, by KL(base || broken)"
    table = _table(title, "nats", "context", "token", "word", "document")
    for row in influence.top[: SHOWN * 2]:
        texts = (row.context, row.token, row.word, row.title)
        table.add_row(f"{row.kl_broken:.2f}", *map(shown, texts))
    print_table(table)
    most = list(influence.top_by_document.items())[:SHOWN]
    documents = ", ".join(f"{shown(title)} {count}" for title, count in most)
    out.print(
        f"Of the {len(influence.top)} on top: {documents}  ({influence.documents_seen} documents;"
        f" {shown(influence.documents_rule)})"
    )
    _print_strata(
        "By document, beside words of equal frequency anywhere",
        "document",
        influence.documents[:SHOWN],
    )
    _print_strata(
        "By frequency of the word, beside the same documents", "count", influence.frequencies
    )
    for group in influence.groups:
        _print_group(group)


def _print_strata(title: str, name: str, strata: list[Stratum]) -> None:
    table = _table(title, name, "tokens", "KL", "expected", "p", "corrected")
    for one in strata:
        table.add_row(
            shown(one.name),
            str(one.tokens),
            f"{one.mean_kl:.3f}",
            f"{one.expected_kl:.3f}",
            _optional(one.p, ".4f"),
            _optional(one.p_corrected, ".4f"),
        )
    print_table(table)


def _print_group(group: WordGroup) -> None:
    out.print(
        f"[bold]{shown(group.name)}[/bold]: {group.tokens} tokens of {group.words} words,"
        f" {group.in_text:.1%} of the text, {group.in_top:.0%} of the top"
    )
    table = _table("", "", "KL", "beside", "p", "corrected")
    table.add_row(
        "all other tokens, as a bare ranking has it",
        f"{group.mean_kl:.3f}",
        f"{group.others_kl:.3f}",
        f"{group.p_naive:.4f}",
    )
    table.add_row(
        "words of the same documents and frequency",
        f"{group.mean_kl:.3f}",
        f"{group.same_documents_kl:.3f}",
        f"{group.p_within:.4f}",
        f"{group.p_corrected:.4f}",
    )
    if group.p_document is not None:
        table.add_row(
            "its documents beside all, at equal frequency",
            f"{group.documents_nats:+.3f}",
            "",
            f"{group.p_document:.4f}",
        )
    print_table(table)
    shown_to_be = "hit" if group.holds else "not shown to be hit"
    out.print(
        f"Verdict: these words are [bold]{shown_to_be}[/bold] harder than other words of the same"
        f" documents and frequency; {group.in_one_document:.0%} of them stand in"
        f" {shown(group.document)}"
    )


def _print_behaviour(behaviour: SideBySide) -> None:
    table = _table("Behaviour", "state", "loop rate", "distinct-1", "distinct-2", "distinct-3")
    for state, written in behaviour.summary.items():
        means = (written.loop_rate, written.distinct_1, written.distinct_2, written.distinct_3)
        table.add_row(state, *(f"{mean:.3f}" for mean in means))
    print_table(table)
    for texts in behaviour.generations:
        out.print(f"[bold]{shown(texts.prompt)}[/bold]")
        for state in behaviour.summary:
            out.print(f"  {state}: {shown(getattr(texts, state))}")
