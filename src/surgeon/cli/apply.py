"""`surgeon apply`: patches onto a checkpoint folder, shard by shard."""

from __future__ import annotations

from pathlib import Path

import click
from rich.markup import escape

from ..anatomy.load import locate
from ..cells.checkpoint import holds_cells
from ..patch import apply_to_checkpoint, load
from ..show.console import out
from ..studies.cell_patches import patch_cells
from .common import json_option, print_json


@click.command("apply")
@click.argument("model")
@click.option(
    "--patch",
    "patches",
    multiple=True,
    required=True,
    metavar="P",
    help="Patch file; several are applied in order.",
)
@click.option(
    "-o", "output", required=True, metavar="DIR", help="New folder for the patched checkpoint."
)
@json_option
def command(model: str, patches: tuple[str, ...], output: str, as_json: bool) -> None:
    """Write a copy of MODEL with patches applied.

    Refused (exit status 3) if a patch was made on other weights.
    """
    loaded = [load(p) for p in patches]
    if holds_cells(model):
        patch_cells(model, loaded, output)
    else:
        apply_to_checkpoint(locate(model), loaded, Path(output))
    if as_json:
        print_json({"model": model, "patches": list(patches), "output": output})
    else:
        out.print(
            escape(
                f"{len(patches)} patch{'es' if len(patches) > 1 else ''} applied to {model}:"
                f" {output}"
            )
        )
