"""Edits as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from ...edit.preflight import PUBLISHED_RATIOS, REFUSE, WARN
from ..console import one_line, out, print_table


def print_edit(model: str, document: dict[str, Any]) -> None:
    preflight, card = document["preflight"], document["scorecard"]
    out.print(
        f"[bold]{escape(model)}[/bold]: {len(card['facts'])} fact(s) by {document['method']} in"
        f" {_sites(preflight)}"
    )
    low, high = PUBLISHED_RATIOS
    out.print(
        f"forecast [bold]{preflight['verdict']}[/bold]: what is written changes by"
        f" {preflight['relative_damage']:.3f} of its usual size (ok under {WARN:g}, refused from"
        f" {REFUSE:g}); update norm {preflight['update_norm_ratio']:.1%} of the weight's (published"
        f" for wide models: clean under {low:.0%}, broken over {high:.0%})"
    )
    table = Table(
        "",
        "prompts",
        "before",
        "after",
        "95%",
        "P before",
        "P after",
        box=None,
        header_style="bold",
    )
    for name in ("efficacy", "paraphrase", "neighbourhood"):
        share = card[name]
        if share["prompts"]:
            low_ci, high_ci = share["ci95"]
            table.add_row(
                name,
                str(share["prompts"]),
                f"{share['before']:.3f}",
                f"{share['after']:.3f}",
                f"{low_ci:.2f} to {high_ci:.2f}",
                f"{share['magnitude_before']:+.3f}",
                f"{share['magnitude_after']:+.3f}",
            )
    print_table(table)
    if card["neighbours_known_before"]:
        out.print(
            f"neighbours that keep their answer: {card['neighbours_kept']} of"
            f" {card['neighbours_known_before']}"
        )
    p = document["target_probability"]
    out.print(
        f"P(target) {p['before']:.4f} → [bold]{p['after']:.4f}[/bold];  perplexity"
        f" {_both(card['ppl'])};  {document['seconds']:.1f} s"
    )
    for fact, known in list(zip(card["facts"], preflight["facts"], strict=True))[:5]:
        tokens = known.get("subject_tokens")
        out.print(
            f"\n[bold]{escape(fact['prompt'])}[/bold]"
            + (f"  subject tokens {escape(str(tokens))}" if tokens else "")
        )
        for text in fact["free"]:
            out.print(
                f"  {escape(text['prompt'])}\n    before: {escape(one_line(text['before']))}\n   "
                f" after:  {escape(one_line(text['after']))}"
            )
    if document["controls"]:
        print_controls(document["controls"])
    if "session" in document:
        print_session(document["session"])
    if "radar" in document:
        print_radar(document["radar"])
    out.print(f"\n{escape(document['patch'])}")


def print_session(ran: dict[str, Any]) -> None:
    table = Table(
        "edit",
        "holds",
        "earlier that hold",
        "NLL",
        "norm",
        "relative damage",
        box=None,
        header_style="bold",
    )
    for number, step in enumerate(ran["steps"]):
        name = escape(f"{step['prompt']} {step['target']}")
        table.add_row(
            name,
            "yes" if step["holds"] else "no",
            f"{step['earlier_kept']} of {number}",
            f"{step['nll']:.4f}",
            f"{step['norm']:.2f}",
            f"{step['relative_damage']:.3f}",
        )
    print_table(table)
    out.print(
        escape(ran["stopped"] + "; it was taken back, and the session ended")
        if ran["stopped"]
        else "every edit stayed"
    )


def print_radar(seen: dict[str, Any]) -> None:
    table = Table(
        "place",
        "change",
        "KL",
        box=None,
        header_style="bold",
        title="most changed places of the text",
        title_justify="left",
    )
    for place in seen["touched"]:
        table.add_row(
            f"{escape(one_line(place['context']))}[bold]{escape(one_line(place['token']))}[/bold]",
            f"{place['change']:.3f}",
            f"{place['kl']:.4f}",
        )
    print_table(table)
    out.print(
        f"of {seen['keys']} tokens; the median one changes by {seen['median']:.3f}, with a KL of"
        f" {seen['median_kl']:.5f} nats"
    )


def print_controls(controls: Sequence[dict[str, Any]]) -> None:
    table = Table("control prompt", "before", "p", "after", "p", "", box=None, header_style="bold")
    for c in controls:
        (token, p), (token_after, p_after) = c["before"], c["after"]
        table.add_row(
            escape(c["prompt"]),
            escape(one_line(token)),
            f"{p:.3f}",
            escape(one_line(token_after)),
            f"{p_after:.3f}",
            "changed" if c["changed"] else "",
        )
    print_table(table)


def _sites(preflight: dict[str, Any]) -> str:
    return ", ".join(layer["site"] for layer in preflight["layers"])


def _both(values: dict[str, float | None]) -> str:
    before, after = values["before"], values["after"]
    return "not measured" if before is None or after is None else f"{before:.2f} → {after:.2f}"
