"""Critical sets, detection and verification as text."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from ...find import (
    CriticalSet,
    Detection,
    ExpertProfile,
    FindResult,
    Link,
    Rejection,
    Verification,
)
from ...measure import GRADES, Behaviours, Controls
from ...result import Provenance
from ..console import out, print_table, shown

MOST_EXPERTS = 8
MOST_REJECTED = 12
MOST_ENTRIES = 3


def print_find(result: FindResult) -> None:
    """Sets with their damage beside the controls, then what was rejected and why."""
    searched = result.detection
    model, text = model_shown(result.provenance), _text(result.provenance)
    out.print(f"{model}: NLL {searched.base_nll:.3f} on {text}")
    if result.verdict == "none":
        tallest = max(range(len(searched.heights)), key=lambda i: searched.heights[i])
        out.print(
            f"None found: the tallest channel is {searched.heights[tallest]:.1f} times the median"
            f" (layer {tallest}; the bar is {searched.bar:.1f})."
        )
    for number, one in enumerate(result.sets, 1):
        _print_set(number, one)
    if result.sets:
        _print_rule(result.sets[0].criteria)
    for link in result.chained:
        _print_link(link)
    _print_rejected(result.rejected)
    _print_experts(result.experts)


def _print_set(number: int, one: CriticalSet) -> None:
    names = [str(part) for part in one.parts]
    more = f" and {len(names) - MOST_ENTRIES} more" if len(names) > MOST_ENTRIES else ""
    listed = ", ".join(names[:MOST_ENTRIES]) + more
    damage, (low, high) = one.damage, one.damage.ci95
    grade = one.severity or "not vital"
    shape = one.geometry if len(names) == 1 else f"{one.geometry} of {len(names)}"
    out.print(f"set {number}: [bold]{grade}[/bold], {shape}: {shown(listed)}")
    out.print(
        f"  zeroed together     [bold]{damage.joint_nats:+.3f} nats[/bold] per token  (95%"
        f" {low:+.3f} to {high:+.3f}, {damage.tokens} tokens)"
    )
    if len(damage.single_nats) > 1:
        out.print(f"  strongest alone     {max(damage.single_nats):+.3f} nats")
    if damage.restored_nats is not None:
        out.print(
            f"  peak restored       {damage.restored_nats:+.3f} nats are left, on a few windows,"
            " after restoring the super activation alone"
        )
    out.print(f"  controls            {controls_shown(one.controls)}")
    if one.channels:
        channels = ", ".join(map(str, one.channels))
        out.print(
            f"  the whole channel   {damage.full_nats:+.3f} nats for all {damage.full_size} entries"
            f" that write channel {channels}, on a sample of the probe windows"
        )
    _print_verdict(one.vital, one.severity, one.close)


def _print_link(link: Link) -> None:
    alone = " and ".join(f"{nats:+.3f}" for nats in link.nats)
    left = ""
    if link.restored_nats is not None:
        left = (
            f"; {link.restored_nats:+.3f} nats are left of set {link.first}'s with what set"
            f" {link.then} writes put back"
        )
    out.print(
        f"sets {link.first} and {link.then} are links of one chain, by channel {link.channel}:"
        f" {alone} nats alone, {link.together_nats:+.3f} together{left}"
    )


def print_detection(result: Detection) -> None:
    """What detection alone saw."""
    out.print(
        f"{model_shown(result.provenance)}: {len(result.candidates)} candidates; no damage was"
        f" measured (the bar is {result.detection.bar:.1f})"
    )
    for candidate in result.candidates:
        strongest = candidate.contributions[0]
        out.print(
            f"  L{candidate.layer} channel {candidate.channel}, {candidate.height:.1f} times the"
            f" median: strongest {shown(str(strongest.entry))}, {strongest.share:.0%} of its write"
        )
    _print_rejected(result.rejected)
    _print_experts(result.experts)


def print_verify(result: Verification) -> None:
    """Damage of each part, of all together, and of the controls."""
    out.print(
        f"{model_shown(result.provenance)}: NLL {result.base_nll:.4f} on {_text(result.provenance)}"
    )
    table = Table("zeroed", "alone", "all but this", box=None, header_style="bold")
    each = zip(result.at, result.single_nats, result.leave_one_out_nats, strict=False)
    for part, alone, rest in each:
        table.add_row(shown(str(part)), f"{alone:+.4f}", f"{rest:+.4f}")
    unlisted = len(result.at) - len(result.single_nats)
    if unlisted > 0:
        table.add_row(f"and {unlisted} more")
    print_table(table)
    low, high = result.ci95
    out.print(
        f"together       [bold]{result.joint_nats:+.4f} nats[/bold] per token  (95% {low:+.4f} to"
        f" {high:+.4f})"
    )
    if result.restored_nats is not None:
        out.print(
            f"peak restored  {result.restored_nats:+.4f} nats are left after restoring the super"
            " activation alone"
        )
    out.print(f"controls       {controls_shown(result.controls)}")
    print_verdict(result.vital, result.criteria, result.severity, result.close)
    if result.behaviour is not None:
        _print_behaviours(result.behaviour)


def _print_behaviours(behaviours: Behaviours) -> None:
    out.print(
        f"KL from base {behaviours.kl_from_base:.4f} nats, top-1 agreement"
        f" {behaviours.top1_agreement:.3f}"
    )
    for name, state in (("base", behaviours.base), ("ablated", behaviours.ablated)):
        out.print(
            f"{name}: stop-word probability {state.stop_word_probability:.3f}, loop rate"
            f" {state.loop_rate:.3f}"
        )
        for text in state.generations:
            out.print(f"  {shown(text.prompt)}|{shown(text.text)}")


def _print_experts(profile: Sequence[ExpertProfile]) -> None:
    """The experts with the highest peaks."""
    for one in profile[:MOST_EXPERTS]:
        what = "[bold]super expert[/bold]" if one.is_super else "expert"
        out.print(
            f"{what} L{one.layer} e{one.expert}: peak {one.peak:.1f} at channel {one.channel},"
            f" {one.share:.0%} of what its layer's experts write, {one.routed:.0%} of the tokens"
        )
    if len(profile) > MOST_EXPERTS:
        out.print(f"and {len(profile) - MOST_EXPERTS} more experts, none with a higher peak")


def _print_rejected(rejected: Sequence[Rejection]) -> None:
    """The first of them; the document names all."""
    for one in rejected[:MOST_REJECTED]:
        numbers = {
            "height": one.height,
            "persistence": one.persistence,
            "entries": one.entries,
            "damage in nats": one.joint_nats,
            "worst control in nats": one.control_max_nats,
        }
        known = [f"{name} {value:.3g}" for name, value in numbers.items() if value is not None]
        out.print(f"rejected {shown(f'{one.entry}: {one.reason}')} ({', '.join(known)})")
    if len(rejected) > MOST_REJECTED:
        out.print(f"and {len(rejected) - MOST_REJECTED} more were rejected")


def print_verdict(
    vital: bool, criteria: str, severity: str | None = None, close: bool = False
) -> None:
    _print_verdict(vital, severity, close)
    _print_rule(criteria)


def _print_verdict(vital: bool, severity: str | None, close: bool) -> None:
    verdict = "vital" if vital else "not vital"
    grade = f", {severity}" if severity else ""
    near = " A number that decides is within a tenth of its threshold." if close else ""
    out.print(f"Verdict: [bold]{verdict}[/bold]{grade}.{near}")


def _print_rule(criteria: str) -> None:
    out.print(f"The rule: {shown(criteria)}. By the lower end of that interval it is {GRADES}.")


def controls_shown(controls: Controls) -> str:
    return (
        f"{controls.median_nats:+.4f} median, {controls.max_nats:+.4f} worst of {controls.n}"
        f" ({shown(controls.matched)})"
    )


def model_shown(about: Provenance) -> str:
    return f"[bold]{shown(about.model)}[/bold]"


def _text(about: Provenance) -> str:
    if about.corpus is None:
        return "no text"
    corpus = about.corpus
    bos = "with" if corpus.bos else "without"
    return f"{shown(corpus.name)}, {corpus.windows} windows, {bos} BOS, {corpus.tokens} tokens"
