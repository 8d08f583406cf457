"""`surgeon find`: critical sets, verified against controls."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import click
from rich.markup import escape

from ..anatomy import StreamedAnatomy
from ..errors import BadInput
from ..find import (
    DetectConfig,
    Detection,
    ExpertProfile,
    FindConfig,
    FindResult,
    Rejection,
    VerifyConfig,
    detect,
    find,
    profile_experts,
)
from ..show.console import out
from .common import (
    deliver,
    folder_option,
    json_option,
    model_options,
    open_corpus,
    open_model,
    progress,
    run_folder,
    seed_option,
    text_options,
)


@click.command("find")
@model_options
@text_options(windows=40)
@click.option(
    "--controls",
    default=VerifyConfig.controls,
    show_default=True,
    help="Matched control sets, at least 20.",
)
@click.option(
    "--min-nats",
    default=VerifyConfig.min_nats,
    show_default=True,
    help="Least joint damage to be called vital.",
)
@click.option(
    "--stream",
    is_flag=True,
    help=(
        "Leave the layers on disk or on the Hub and read one at a time, for models larger than"
        " memory."
    ),
)
@click.option(
    "--layers",
    metavar="A:B",
    help="Look for writers in layers A to B-1 only; detection then reads no layer above.",
)
@click.option(
    "--detect-only",
    is_flag=True,
    help="Stop after detection: candidates, without damage and controls, so nothing is vital.",
)
@click.option(
    "--experts",
    is_flag=True,
    help="Of a mixture of experts, also the profile: which experts write the outliers.",
)
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
    stream: bool,
    layers: str | None,
    detect_only: bool,
    experts: bool,
    seed: int,
    folder: str | None,
    as_json: bool,
) -> None:
    """Find the weights MODEL cannot live without, and verify them against matched controls.

    "None" is a result.
    """
    span = None if layers is None else _span(layers)
    config = FindConfig(
        DetectConfig(layers=span), VerifyConfig(controls=controls, min_nats=min_nats, seed=seed)
    )
    run = run_folder(folder)
    loaded, anatomy = open_model(model, dtype, device, stream, whole=not detect_only)
    corpus = open_corpus(loaded, text, window, windows, bos)
    document: dict[str, Any] = {"model": model, "fingerprint": loaded.fingerprint or None}
    result: FindResult | Detection
    profile: list[ExpertProfile] = []
    with progress() as tell:
        if isinstance(anatomy, StreamedAnatomy):
            anatomy.tell = partial(tell, "block")
        if experts:
            tell("experts", 0, 1)
            profile = profile_experts(
                anatomy, corpus.windows[: config.probe_windows], None if span is None else span[1]
            )
            document["experts"] = [p.to_json() for p in profile]
        if detect_only:
            tell("detect", 0, 1)
            result = detect(anatomy, corpus.windows[: config.probe_windows], config.detect)
            document |= {"corpus": corpus.to_json(), "verdict": None}
        else:
            result = find(anatomy, corpus, config, tell)
    document |= result.to_json()
    if isinstance(anatomy, StreamedAnatomy):
        document["streamed"] = {"bytes_read": anatomy.shards.bytes_read}

    def tell_all() -> None:
        if isinstance(result, FindResult):
            print_find(model, result)
        else:
            print_detection(model, result)
        print_experts(profile)

    deliver("detect" if detect_only else "find", document, tell_all, as_json, run)


def _span(layers: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+):(\d+)", layers)
    if match is None:
        raise BadInput(
            f"--layers {layers} is no range of layers; write the first and the end like 0:4, which"
            " means layers 0 to 3."
        )
    return int(match[1]), int(match[2])


def print_detection(model: str, seen: Detection) -> None:
    """What detection alone saw."""
    out.print(
        f"[bold]{escape(model)}[/bold]: {len(seen.candidates)} candidates, no damage measured (bar"
        f" {seen.bar:.1f})"
    )
    for c in seen.candidates:
        strongest = c.contributions[0]
        where = f"L{c.layer} channel {c.channel}, {c.height:.1f} times the median"
        out.print(
            f"  {where}: strongest {escape(str(strongest.entry))}, {strongest.share:.0%} of its"
            " write"
        )
    _print_rejected(seen.rejected)


def print_experts(profile: list[ExpertProfile], most: int = 8) -> None:
    """The experts with the highest peaks."""
    for p in profile[:most]:
        what = "[bold]super expert[/bold]" if p.is_super else "expert"
        numbers = (
            f"peak {p.peak:.1f} at channel {p.channel}, {p.share:.0%} of what its layer's experts"
            f" write, {p.routed:.0%} of the tokens"
        )
        out.print(f"{what} L{p.layer} e{p.expert}: {numbers}")
    if len(profile) > most:
        out.print(f"and {len(profile) - most} more experts, none with a higher peak")


def print_find(model: str, result: FindResult) -> None:
    """The result as a few lines: sets with damage beside controls, then what was rejected and
    why.
    """
    c = result.corpus
    text = f"{escape(c.name)}, {len(c.windows)} windows, {'with' if c.bos else 'without'} BOS"
    out.print(f"[bold]{escape(model)}[/bold]: NLL {result.base_nll:.3f} on {text}")
    if result.verdict == "none":
        tallest = max(range(len(result.heights)), key=lambda i: result.heights[i])
        out.print(
            f"none found: the tallest channel is {result.heights[tallest]:.1f} times the median"
            f" (layer {tallest}; bar {result.bar:.1f})"
        )
    for number, found in enumerate(result.sets, 1):
        v, entries = found.verification, found.entries
        shown = ", ".join(str(e.entry) for e in entries[:3]) + (
            f" and {len(entries) - 3} more" if len(entries) > 3 else ""
        )
        out.print(f"set {number}: [bold]{found.geometry}[/bold] of {len(entries)}: {escape(shown)}")
        out.print(
            f"  zeroed together  [bold]{v.joint:+.3f} nats[/bold]  (95% {v.ci95[0]:+.3f} to"
            f" {v.ci95[1]:+.3f}, {v.tokens} tokens)"
        )
        out.print(f"  strongest alone  {max(v.single):+.3f} nats")
        if v.restored is not None:
            out.print(
                f"  of which stays   {v.restored:+.3f} nats when the channel's peak alone is put"
                " back"
            )
        out.print(f"  controls         {v.controls}")
        channels = ", ".join(map(str, found.channels))
        out.print(
            f"  all {found.full_size} entries that write channel {channels}: {found.full_nats:+.3f}"
            " nats on the probe windows"
        )
        out.print(f"  [bold]{'vital' if v.vital else 'not vital'}[/bold] ({v.criteria})")
    _print_rejected(result.rejected)


def _print_rejected(rejected: list[Rejection]) -> None:
    for rejection in rejected:
        numbers: dict[str, Any] = rejection.numbers
        out.print(
            f"rejected {escape(rejection.where)}: {rejection.reason}"
            f" ({', '.join(f'{k} {v:.3g}' for k, v in numbers.items())})"
        )
