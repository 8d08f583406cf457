"""`surgeon undo`: take a patch off a checkpoint folder, bit for bit."""

from __future__ import annotations

from pathlib import Path

import click
from rich.markup import escape

from ..anatomy.load import locate
from ..cells.checkpoint import holds_cells
from ..patch import load, undo_on_checkpoint
from ..show.console import out
from ..studies.cell_patches import patch_cells
from .common import json_option, print_json


@click.command("undo")
@click.argument("model")
@click.option("--patch", required=True, metavar="P", help="Patch file to take off.")
@click.option(
    "-o",
    "output",
    required=True,
    metavar="DIR",
    help="New folder for the checkpoint without the patch.",
)
@json_option
def command(model: str, patch: str, output: str, as_json: bool) -> None:
    """Write a copy of MODEL with a patch taken off again: the original entries come back bit for
    bit.
    """
    if holds_cells(model):
        patch_cells(model, [load(patch)], output, undo=True)
    else:
        undo_on_checkpoint(locate(model), load(patch), Path(output))
    if as_json:
        print_json({"model": model, "patch": patch, "output": output})
    else:
        out.print(escape(f"{patch} taken off {model}: {output}"))
