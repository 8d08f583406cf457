"""`surgeon export`: a patch in the formats of the ecosystem."""

from __future__ import annotations

from pathlib import Path

import click
from rich.markup import escape

from ..patch import export_lora, load
from ..show.console import out
from .common import json_option, print_json


@click.command("export")
@click.argument("patch")
@click.option(
    "--to",
    "target",
    required=True,
    type=click.Choice(["lora"]),
    help="Format: lora, a PEFT LoRA adapter.",
)
@click.option("-o", "output", required=True, metavar="DIR", help="New folder for the adapter.")
@json_option
def command(patch: str, target: str, output: str, as_json: bool) -> None:
    """Write PATCH as a LoRA adapter, for the model with all patches applied that PATCH builds
    on.
    """
    config = export_lora(load(patch), Path(output))
    targets = config["target_modules"] + (config["target_parameters"] or [])
    if as_json:
        print_json(
            {
                "patch": patch,
                "format": target,
                "output": output,
                "rank": config["r"],
                "targets": targets,
            }
        )
    else:
        out.print(
            escape(f"{patch} as an adapter of rank {config['r']} on {', '.join(targets)}: {output}")
        )
