"""`surgeon ablate`: write an injury as a patch."""

from __future__ import annotations

from pathlib import Path

import click
from rich.markup import escape

from ..patch import MODES, ablate, save
from ..show.console import out
from .common import (
    at_option,
    json_option,
    model_options,
    open_anatomy,
    print_json,
    regions,
    seed_option,
)


@click.command("ablate")
@model_options
@at_option
@click.option(
    "--mode",
    default="zero",
    show_default=True,
    help="What an entry becomes: "
    + "; ".join(f"{mode}: {meaning}" for mode, meaning in MODES.items())
    + ".",
)
@click.option("-o", "output", required=True, metavar="P", help="Patch file to write.")
@seed_option
@json_option
def command(
    model: str,
    dtype: str,
    device: str,
    at: tuple[str, ...],
    mode: str,
    output: str,
    seed: int,
    as_json: bool,
) -> None:
    """Write the change of the given entries of MODEL as a patch; the model itself is not
    touched.
    """
    anatomy, _ = open_anatomy(model, dtype, device)
    patch = ablate(anatomy, regions(anatomy, at), mode=mode)
    save(patch, output)
    count, sites = (
        sum(int(patch.touched(s).sum()) for s in patch.sites),
        [str(s) for s in patch.sites],
    )
    document = {
        "model": model,
        "patch": output,
        "bytes": Path(output).stat().st_size,
        "mode": mode,
        "entries": count,
        "sites": sites,
    }
    if as_json:
        print_json(document)
    else:
        entries = "1 entry" if count == 1 else f"{count} entries"
        out.print(
            escape(
                f"{entries} of {', '.join(sites)} changed ({mode}): {output}, {document['bytes']}"
                " bytes"
            )
        )
