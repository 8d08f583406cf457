"""Sites, injuries and measurements as text."""

from __future__ import annotations

from rich.table import Table

from ...studies.ablate import Injury
from ...studies.measure import Measurement
from ...studies.sites import SiteList
from ..console import out, print_table, shown


def print_sites(result: SiteList) -> None:
    """One line a site."""
    table = Table("site", "out", "in", "stored", "parameter", "", box=None, header_style="bold")
    for one in result.sites:
        tied = ", ".join(map(str, one.tied_to))
        note = f"tied to {tied}" if tied else one.part
        n_out, n_in = map(str, one.shape)
        cells = (str(one.site), n_out, n_in, one.stored, one.parameter, note)
        table.add_row(*map(shown, cells))
    print_table(table)
    out.print(
        f"{len(result.sites)} sites in {result.layers} layers; the map was found by"
        f" {shown(result.source)} and proved by experiment."
    )


def print_injury(result: Injury) -> None:
    """What the patch changes."""
    entries = "1 entry" if result.entries == 1 else f"{result.entries} entries"
    out.print(shown(f"{entries} of {', '.join(result.sites)} changed ({result.mode})"))


def print_measure(result: Measurement) -> None:
    """Likelihood, tasks and generations, with the patches and without."""
    about = result.provenance
    where = "" if about.corpus is None else f" on {shown(about.corpus.name)}"
    patches = f" with {shown(', '.join(result.patches))}" if result.patches else ""
    if result.at:
        patches = f" without {_weights(result)}{patches}"
    out.print(f"[bold]{shown(about.model)}[/bold]{patches}{where}, {result.tokens} tokens")
    away = ""
    if result.kl_from_base is not None and result.top1_agreement is not None:
        away = (
            f"  KL from base {result.kl_from_base:.4f}  top-1 agreement {result.top1_agreement:.3f}"
        )
    out.print(f"NLL {result.nll:.4f}  perplexity {result.ppl:.2f}{away}")
    if result.damage_nats is not None:
        out.print(f"damage {result.damage_nats:+.4f} nats per token")
    for name, accuracy in result.tasks.items():
        out.print(
            f"{shown(name)}: accuracy {accuracy.base:.3f} base, {accuracy.patched:.3f} patched"
        )
    for text in result.generations:
        out.print(f"[bold]{shown(text.prompt)}[/bold]")
        out.print(f"  base: {shown(text.base)}")
        if result.base_nll is not None:
            out.print(f"  patched: {shown(text.patched)}")


def _weights(result: Measurement) -> str:
    """Which weights were taken out before the patches."""
    first, more = result.at[0], len(result.at) - 1
    return shown(f"{first}{f' and {more} more' if more else ''} ({result.mode})")
