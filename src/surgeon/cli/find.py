"""`surgeon find`: critical sets, verified against controls."""

from __future__ import annotations

from typing import Any

import click
from rich.markup import escape

from ..find import FindConfig, FindResult, VerifyConfig, find
from .common import (
    deliver,
    folder_option,
    json_option,
    model_options,
    open_corpus,
    open_model,
    out,
    progress,
    run_folder,
    seed_option,
    text_options,
)


@click.command("find")
@model_options
@text_options(windows=40)
@click.option("--controls", default=VerifyConfig.controls, show_default=True, help="Matched control sets, at least 20.")
@click.option("--min-nats", default=VerifyConfig.min_nats, show_default=True, help="Least joint damage to be called vital.")
@seed_option
@folder_option
@json_option
def command(
    model: str,
    dtype: str,
    device: str,
    text: str | None,
    window: int,
    windows: int | None,
    bos: str,
    controls: int,
    min_nats: float,
    seed: int,
    folder: str | None,
    as_json: bool,
) -> None:
    """Find the weights MODEL cannot live without, and verify them against matched controls. "None" is a result."""
    config = FindConfig(verify=VerifyConfig(controls=controls, min_nats=min_nats, seed=seed))
    run = run_folder(folder)
    loaded, anatomy = open_model(model, dtype, device)
    corpus = open_corpus(loaded, text, window, windows, bos)
    with progress() as tell:
        result = find(anatomy, corpus, config, tell)
    document = {"model": model, "fingerprint": loaded.fingerprint, **result.to_json()}
    deliver("find", document, lambda: print_find(model, result), as_json, run)


def print_find(model: str, result: FindResult) -> None:
    """The result as a few lines: sets with damage beside controls, then what was rejected and why."""
    c = result.corpus
    text = f"{escape(c.name)}, {len(c.windows)} windows, {'with' if c.bos else 'without'} BOS"
    out.print(f"[bold]{escape(model)}[/bold]: NLL {result.base_nll:.3f} on {text}")
    if result.verdict == "none":
        tallest = max(range(len(result.heights)), key=lambda i: result.heights[i])
        out.print(
            f"none found: the tallest channel is {result.heights[tallest]:.1f} times the median (layer {tallest}; bar {result.bar:.1f})"
        )
    for number, found in enumerate(result.sets, 1):
        v, entries = found.verification, found.entries
        shown = ", ".join(str(e.entry) for e in entries[:3]) + (f" and {len(entries) - 3} more" if len(entries) > 3 else "")
        out.print(f"set {number}: [bold]{found.geometry}[/bold] of {len(entries)}: {escape(shown)}")
        out.print(f"  zeroed together  [bold]{v.joint:+.3f} nats[/bold]  (95% {v.ci95[0]:+.3f} to {v.ci95[1]:+.3f}, {v.tokens} tokens)")
        out.print(f"  strongest alone  {max(v.single):+.3f} nats")
        if v.restored is not None:
            out.print(f"  of which stays   {v.restored:+.3f} nats when the channel's peak alone is put back")
        out.print(f"  controls         {v.controls}")
        channels = ", ".join(map(str, found.channels))
        out.print(f"  all {found.full_size} entries that write channel {channels}: {found.full_nats:+.3f} nats on the probe windows")
        out.print(f"  [bold]{'vital' if v.vital else 'not vital'}[/bold] ({v.criteria})")
    for rejection in result.rejected:
        numbers: dict[str, Any] = rejection.numbers
        out.print(f"rejected {escape(rejection.where)}: {rejection.reason} ({', '.join(f'{k} {v:.3g}' for k, v in numbers.items())})")
