"""Edits, the layers to edit, and traces as text."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from ...edit import PUBLISHED_RATIOS, REFUSE, WARN, Preflight, Radar, Step
from ...measure import BeforeAfter, Control, FreeText, Scorecard
from ...studies.edit import EditResult
from ...studies.edit_layers import LayerRanking
from ...studies.edit_many import EditsResult
from ...trace import TraceAverage, TraceResult
from ..console import out, print_table, shown

SHADES = " ░▒▓█"
MOST_FACTS = 5
MOST_LAYERS = 5
MAGNITUDE = (
    "Success: the target is likelier than the true answer; where that is not known, it is said."
    " Magnitude: the mean of P(target) - P(true). For the neighbourhood both are the other way"
    " round."
)


# -- edits ----------------------------------------------------------------------------------------


def print_edit(result: EditResult) -> None:
    """The forecast, the scorecard, what is written freely, and the control prompts."""
    card = result.scorecard
    sites = ", ".join(str(one.site) for one in result.preflight.layers)
    facts = "1 fact" if len(card.facts) == 1 else f"{len(card.facts)} facts"
    out.print(f"{_model(result.provenance.model)}: {facts} by {shown(result.method)} in {sites}")
    print_forecast(result.preflight)
    _print_shares(card)
    p = result.target_probability
    perplexity = "" if card.ppl is None else f";  perplexity {_both(card.ppl)}"
    target = f"P(target) {p.before:.4f} → [bold]{p.after:.4f}[/bold]"
    out.print(f"{target}{perplexity};  {result.seconds:.1f} s")
    _print_facts(result)
    print_controls(result.controls)
    if result.radar is not None:
        _print_radar(result.radar)


def print_edits(result: EditsResult) -> None:
    """The same of edits made one after the other, and each step."""
    print_edit(result)
    _print_steps(result.steps)
    if result.stopped is None:
        out.print("Every edit stayed.")
    else:
        out.print(
            f"Stopped: {shown(result.stopped)}. The patch holds the {result.kept_edits} before."
        )


def print_forecast(preflight: Preflight) -> None:
    """The verdict and what it is about; warnings about subjects."""
    low, high = PUBLISHED_RATIOS
    out.print(
        f"Forecast: [bold]{preflight.verdict}[/bold]. The layer's output changes by"
        f" {preflight.relative_damage:.1%} on ordinary text (ok under {WARN:.0%}, refused from"
        f" {REFUSE:.0%}). The update's norm is {preflight.update_norm_ratio:.1%} of the weight's"
        f" (published for wide models: clean under {low:.0%}, broken over {high:.0%})."
    )
    _print_notes([warning for fact in preflight.facts for warning in fact.warnings])


def _print_shares(card: Scorecard) -> None:
    columns = ("", "prompts", "success before", "after", "95%", "magnitude before", "after")
    table = Table(*columns, box=None, header_style="bold")
    for name in ("efficacy", "paraphrase", "neighbourhood"):
        share = getattr(card, name)
        if share.ci95 is None:
            continue
        low, high = share.ci95
        table.add_row(
            name,
            str(share.prompts),
            f"{share.before:.3f}",
            f"{share.after:.3f}",
            f"{low:.2f} to {high:.2f}",
            f"{share.magnitude_before:+.3f}",
            f"{share.magnitude_after:+.3f}",
        )
    print_table(table)
    out.print(MAGNITUDE)
    if card.neighbours_known_before:
        out.print(
            f"Neighbours that keep their answer: {card.neighbours_kept} of"
            f" {card.neighbours_known_before}."
        )


def _print_facts(result: EditResult) -> None:
    pairs = zip(result.scorecard.facts, result.preflight.facts, strict=True)
    for fact, known in list(pairs)[:MOST_FACTS]:
        tokens = shown(str(known.subject_tokens))
        out.print(f"\n[bold]{shown(fact.prompt)}[/bold]  subject tokens {tokens}")
        for text in fact.free:
            _print_free(text)
    more = len(result.scorecard.facts) - MOST_FACTS
    if more > 0:
        out.print(f"\nand {more} more")


def _print_free(text: FreeText) -> None:
    out.print(f"  {shown(text.prompt)}")
    out.print(f"    before: {shown(text.before)}")
    out.print(f"    after:  {shown(text.after)}")


def _print_steps(steps: Sequence[Step]) -> None:
    columns = ("edit", "holds", "earlier that hold", "NLL", "norm", "layer's output")
    table = Table(*columns, box=None, header_style="bold")
    for number, step in enumerate(steps):
        table.add_row(
            shown(f"{step.prompt} {step.target}"),
            "yes" if step.holds else "no",
            f"{step.earlier_kept} of {number}",
            f"{step.nll:.4f}",
            f"{step.norm:.2f}",
            f"{step.relative_damage:.1%}",
        )
    print_table(table)


def _print_radar(radar: Radar) -> None:
    title = "Most changed places of the text"
    columns = ("place", "change", "KL")
    table = Table(*columns, box=None, header_style="bold", title=title, title_justify="left")
    for place in radar.touched:
        context, token = shown(place.context), shown(place.token)
        table.add_row(f"{context}[bold]{token}[/bold]", f"{place.change:.1%}", f"{place.kl:.4f}")
    print_table(table)
    out.print(
        f"Of {radar.keys} tokens the median one changes by {radar.median:.1%}, with a KL of"
        f" {radar.median_kl:.5f} nats."
    )


def print_controls(controls: Sequence[Control]) -> None:
    """Each control prompt with its likeliest next token, before and after."""
    if not controls:
        return
    columns = ("control prompt", "before", "p", "after", "p", "")
    table = Table(*columns, box=None, header_style="bold")
    for one in controls:
        (token, p), (token_after, p_after) = one.before, one.after
        table.add_row(
            shown(one.prompt),
            shown(token),
            f"{p:.3f}",
            shown(token_after),
            f"{p_after:.3f}",
            "changed" if one.changed else "",
        )
    print_table(table)


def print_layers(result: LayerRanking) -> None:
    """The layers by their trial edits, and which cannot be told apart."""
    facts = "1 fact" if result.facts == 1 else f"{result.facts} facts"
    out.print(
        f"{_model(result.provenance.model)}: trial edits of {facts} by"
        f" {shown(result.method)} in each"
        " layer, best first"
    )
    columns = ("layer", "score", "95%", "layer's output", "effect of its MLP in the trace")
    table = Table(*columns, box=None, header_style="bold")
    for one in result.layers:
        low, high = one.ci95
        prior = "not traced"
        if one.prior is not None and one.prior_ci95 is not None:
            prior = f"{one.prior:+.3f} ({one.prior_ci95[0]:+.3f} to {one.prior_ci95[1]:+.3f})"
        damage = "" if one.relative_damage is None else f"{one.relative_damage:.1%}"
        interval = f"{low:.3f} to {high:.3f}"
        table.add_row(str(one.layer), f"{one.score:.3f}", interval, damage, prior)
    print_table(table)
    close = ", ".join(str(one.layer) for one in result.as_good)
    beside = f"; {close} cannot be told from it on so few facts" if close else ""
    out.print(f"Layer {result.layers[0].layer} is best{beside}.")


# -- traces ---------------------------------------------------------------------------------------


def print_trace(result: TraceResult) -> None:
    """A map of each kind, layers to the right as in the published figures, and the sites that bring
    most back.
    """
    start, stop = result.subject_range
    what = f"P({result.answer!r})"
    if result.metric == "logit":
        what = f"logit of {result.answer!r} over {result.versus!r}"
    out.print(
        f"{_model(result.provenance.model)}: {shown(what)} {result.p_clean:.4f}, with"
        f" the subject corrupted [bold]{result.p_corrupt:.4f}[/bold]"
    )
    subject = ", ".join(map(repr, result.tokens[start:stop]))
    out.print(f"the subject (*): {shown(subject)}; blank is corrupted, █ is clean")
    for kind in result.effects:
        _print_map(result, kind)
        sites = []
        for site in result.best[kind]:
            spread = _spread(result, kind, site.layer, site.position)
            sites.append(f"layer {site.layer} at {site.token!r} {site.value:.4f}{spread}")
        out.print(f"most comes back at {shown('; '.join(sites))}")
    _print_notes(result.warnings)


def _print_map(result: TraceResult, kind: str) -> None:
    grid = result.effects[kind]
    title = f"[bold]{_title(kind, result)}[/bold] restored, by layer"
    table = Table(title=title, title_justify="left", box=None)
    table.add_column("token")
    for layer in range(len(grid)):
        table.add_column(str(layer), justify="center")
    start, stop = result.subject_range
    for position, token in enumerate(result.tokens):
        star = "*" if start <= position < stop else " "
        cells = [_shade(row[position], result.p_corrupt, result.p_clean) for row in grid]
        table.add_row(shown(star + token), *cells)
    print_table(table)


def _spread(result: TraceResult, kind: str, layer: int, position: int) -> str:
    intervals = getattr(result.ci, kind)
    if intervals is None:
        return ""
    low, high = intervals[layer][position]
    return f" ({low:.4f} to {high:.4f})"


def print_average(result: TraceAverage) -> None:
    """Mean effects by layer and place, and the layers by that of their MLPs."""
    out.print(
        f"{_model(result.provenance.model)}: {result.facts} facts ({result.skipped} that it does"
        f" not know are left out); {result.p_clean:.4f} clean, {result.p_corrupt:.4f} with the"
        " subject corrupted"
    )
    for kind, grid in result.effects.items():
        title = f"[bold]{_title(kind, result)}[/bold]: mean effect, by layer"
        columns = ("layer", *map(shown, result.places))
        table = Table(*columns, title=title, title_justify="left", box=None, header_style="bold")
        for layer, row in enumerate(grid):
            table.add_row(str(layer), *("" if v is None else f"{v:+.3f}" for v in row))
        print_table(table)
    if result.layers_by_mlp is not None:
        layers = ", ".join(
            f"{one.layer} ({one.effect:+.3f}, {one.ci95[0]:+.3f} to {one.ci95[1]:+.3f})"
            for one in result.layers_by_mlp[:MOST_LAYERS]
        )
        out.print(f"layers by the effect of their MLP at the subject's last token: {layers}")
    _print_notes(result.warnings)


def _title(kind: str, result: TraceResult | TraceAverage) -> str:
    """What was restored, in words: `mlp, 4 layers`."""
    if kind == "severed":
        return f"state, with {result.sever} above it kept corrupted,"
    if kind == "state":
        return kind
    return f"{kind}, {result.window} layer{'s' if result.window > 1 else ''}"


def _shade(value: float, low: float, high: float) -> str:
    share = (value - low) / (high - low) if high != low else 0.0
    return SHADES[max(0, min(len(SHADES) - 1, round(share * (len(SHADES) - 1))))] * 2


# -- both -----------------------------------------------------------------------------------------


def _print_notes(warnings: Sequence[str]) -> None:
    for warning in warnings:
        out.print(f"Note: {shown(warning)}")


def _model(name: str) -> str:
    return f"[bold]{shown(name)}[/bold]"


def _both(values: BeforeAfter) -> str:
    return f"{values.before:.2f} → {values.after:.2f}"
