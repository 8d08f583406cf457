"""`surgeon run`: a recipe, that is an experiment written down, with published figures beside the
measured ones.
"""

from __future__ import annotations

from pathlib import Path

import click

from ...errors import BadInput
from ..common import deliver, json_option, run_folder
from . import conditioning, edits, repair
from .reading import read_yaml

# the key that only this kind of recipe has
KINDS = {"injury": repair.run, "edits": edits.run, "conditioning": conditioning.run}


@click.command("run")
@click.argument("recipe")
@click.option("--model", help="Another model than the recipe's.")
@click.option(
    "--text",
    metavar="FILE",
    help="UTF-8 text to work and judge on; default: the patient's held-out text.",
)
@click.option(
    "-o",
    "output",
    metavar="DIR",
    help="Also write the run folder: run.json, the patches, report.html.",
)
@json_option
def command(
    recipe: str, model: str | None, text: str | None, output: str | None, as_json: bool
) -> None:
    """Run a RECIPE (YAML): an injury and its repair, edits and their controls, or what conditions
    an edit; published figures beside.
    """
    path = Path(recipe)
    source = read_yaml(path, list(KINDS))
    kinds = [key for key in KINDS if key in source]
    if len(kinds) != 1:
        raise BadInput(
            f"{path} should hold one of {', '.join(KINDS)}, and it holds"
            f" {' and '.join(kinds) or 'none of them'}."
        )
    if model is not None:
        source["model"] = model
    folder = run_folder(output)
    document, tell_all = KINDS[kinds[0]](path, source, text, folder)
    deliver("run", document, tell_all, as_json, folder)
