"""Recipes as text: published figures beside the measured ones."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from ...result import Provenance
from ...studies.recipes.conditioning import Conditioned, Conditioning
from ...studies.recipes.edits import EditsRecipe, NamedEdit
from ...studies.recipes.repair import RepairRecipe
from ..console import out, print_table, shown
from .editing import print_controls
from .healing import print_repair


def print_repair_recipe(result: RepairRecipe) -> None:
    """The figures, if any were published, and the repair."""
    _print_title(result.title, result.provenance)
    if result.figures:
        table = Table("figure", "published", "measured", box=None, header_style="bold")
        for one in result.figures:
            table.add_row(shown(one.figure), f"{one.published:g}", f"{one.measured:.4g}")
        print_table(table)
    print_repair(result.repair)


def print_edits_recipe(result: EditsRecipe) -> None:
    """One line an edit, then the control prompts of each."""
    _print_title(result.title, result.provenance)
    columns = (
        *("edit", "method", "P before", "P after", "update / weight", "layer's output"),
        *("forecast", "first", "controls changed", "perplexity"),
    )
    table = Table(*columns, box=None, header_style="bold")
    for one in result.edits:
        table.add_row(*_cells(one))
    print_table(table)
    _print_published(result.published)
    for one in result.edits:
        out.print(f"\n[bold]{shown(one.name)}[/bold] by {shown(one.edit.method)}")
        print_controls(one.edit.controls)


def _cells(one: NamedEdit) -> list[str]:
    flight, p, ppl = one.edit.preflight, one.edit.target_probability, one.edit.scorecard.ppl
    changed = sum(control.changed for control in one.edit.controls)
    return [
        shown(one.name),
        shown(one.edit.method),
        f"{p.before:.4f}",
        f"{p.after:.4f}",
        f"{flight.update_norm_ratio:.1%}",
        f"{flight.relative_damage:.1%}",
        flight.verdict,
        "yes" if flight.position_zero else "",
        f"{changed} of {len(one.edit.controls)}",
        "" if ppl is None else f"{ppl.before:.2f} → {ppl.after:.2f}",
    ]


def print_conditioning(result: Conditioning) -> None:
    """One line an edit of the grid."""
    _print_title(result.title, result.provenance)
    columns = (
        *("tokens / d_mlp", "ridge", "prompt", "update / weight", "layer's output"),
        *("half to all (cosine)", "P(target)", "controls changed", "NLL"),
    )
    table = Table(*columns, box=None, header_style="bold")
    for row in result.conditioning:
        table.add_row(*_row(row, result.controls))
    print_table(table)
    _print_published(result.published)


def _row(row: Conditioned, controls: int) -> list[str]:
    return [
        f"{row.tokens_per_dimension:.1f}",
        f"{row.ridge:g}",
        shown(row.prompt),
        f"{row.update_norm_ratio:.1%}",
        f"{row.relative_damage:.1%}",
        f"{row.direction_stability:.3f}",
        f"{row.target_probability:.3f}",
        f"{row.controls_changed} of {controls}",
        f"{row.nll_rise:+.4f}",
    ]


def _print_title(title: str, about: Provenance) -> None:
    text = "" if about.corpus is None else f" on {shown(about.corpus.name)}"
    out.print(f"[bold]{shown(title)}[/bold] ({shown(about.model)}{text})")


def _print_published(published: Sequence[str]) -> None:
    for line in published:
        out.print(f"published: {shown(line)}")
