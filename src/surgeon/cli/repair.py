"""`surgeon repair`: heal an injury with a patch, beside a control."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
from rich.markup import escape
from rich.table import Table

from ..errors import BadInput
from ..patch import load, save
from ..repair import METHODS, DistilConfig, RepairConfig, RepairResult, repair
from ..show.console import out, print_table
from .common import (
    F,
    deliver,
    folder_option,
    json_option,
    model_options,
    open_corpus,
    open_model,
    options,
    progress,
    require_finite,
    run_folder,
    seed_option,
    text_options,
)

TRAINING = {f.name: f for f in fields(DistilConfig)}


def _training_options() -> Callable[[F], F]:
    """An option for each setting of distillation, described by the setting itself; not given, the
    default or the preset holds.
    """
    types: dict[str, Any] = {
        "loss": click.Choice(["kl", "ce"]),
        "schedule": click.Choice(["cosine", "constant"]),
    }
    return options(
        *(
            click.option(
                f"--{name.replace('_', '-')}",
                name,
                type=types.get(name, type(f.default)),
                help=f"Distil: {f.metadata['help']}.  [default: {f.default}]",
            )
            for name, f in TRAINING.items()
        )
    )


@click.command("repair")
@model_options
@click.option(
    "--injury",
    required=True,
    metavar="P",
    help="Patch that broke the model, as `surgeon ablate` writes it.",
)
@click.option(
    "-o",
    "output",
    required=True,
    metavar="P2",
    help="Patch file to write; it is applied after the injury.",
)
@click.option(
    "--method",
    type=click.Choice(METHODS),
    help=(
        "Closed form, training, or training from the closed form.  [default:"
        f" {RepairConfig.method}]"
    ),
)
@click.option("--exclude-injured", is_flag=True, help="Leave the injured entries as they are.")
@click.option(
    "--row",
    "rows",
    multiple=True,
    type=int,
    help="Output channel that may change, again for several; default: the injured.",
)
@click.option(
    "--column",
    "columns",
    multiple=True,
    type=int,
    help="Input neuron that may change, again for several; default: all.",
)
@click.option("--rank", default=0, show_default=True, help="Rank of the change; 0: any.")
@_training_options()
@click.option(
    "--reference", is_flag=True, help="Settings of the published experiment on OLMo-1B-0724-hf."
)
@text_options(windows=None)
@click.option(
    "--held-out",
    metavar="FILE",
    help="Second text to judge on; the text itself is judged on windows that the repair never saw.",
)
@click.option("--no-control", is_flag=True, help="Do not spend the same on a random row.")
@click.option(
    "--resume", metavar="FILE", help="Save the training in FILE, and go on from it if it is there."
)
@seed_option
@folder_option
@json_option
def command(
    model: str,
    dtype: str,
    device: str,
    injury: str,
    output: str,
    method: str | None,
    exclude_injured: bool,
    rows: tuple[int, ...],
    columns: tuple[int, ...],
    rank: int,
    reference: bool,
    text: str | None,
    window: int,
    windows: int | None,
    bos: str,
    held_out: str | None,
    no_control: bool,
    resume: str | None,
    seed: int,
    folder: str | None,
    as_json: bool,
    **training: Any,
) -> None:
    """Heal MODEL after an injury: change a few other weights so that it predicts as before, and say
    how much came back.
    """
    config = RepairConfig.reference() if reference else RepairConfig()
    config = replace(
        config,
        method=method or config.method,
        exclude_injured=exclude_injured,
        rows=rows,
        columns=columns,
        rank=rank,
        seed=seed,
        control=not no_control,
        distil=replace(
            config.distil, **{name: value for name, value in training.items() if value is not None}
        ),
    )
    if resume is not None and not Path(resume).parent.is_dir():
        raise BadInput(
            f"there is no folder {Path(resume).parent} for the checkpoint {resume}; make it first."
        )
    run = run_folder(folder)
    loaded, anatomy = open_model(model, dtype, device)
    corpus = open_corpus(loaded, text, window, windows, bos)
    second = None if held_out is None else open_corpus(loaded, held_out, window, None, bos)
    broken = load(injury)
    with progress() as tell:
        result = repair(
            anatomy, broken, corpus, config, second, tell, None if resume is None else Path(resume)
        )
    require_finite(
        **{
            "the NLL of the repaired model": result.nll["patched"],
            "its KL to the base": result.kl["patched"],
        }
    )
    save(result.patch, output)
    document = {
        "model": model,
        "fingerprint": loaded.fingerprint,
        "injury": injury,
        "patch": output,
        **result.to_json(),
    }
    patches = {"injury.safetensors": broken, "repair.safetensors": result.patch}
    data = {name: partial(save, patch) for name, patch in patches.items()}
    deliver("repair", document, lambda: print_repair(model, result, document), as_json, run, data)


def print_repair(model: str, result: RepairResult, document: dict[str, Any]) -> None:
    corpus = document["corpus"]
    out.print(
        f"[bold]{escape(model)}[/bold] on {corpus['judged_on']} windows of {escape(corpus['name'])}"
        " that the repair never saw"
    )
    table = Table("", "base", "broken", "patched", box=None, header_style="bold")
    for name, values, digits in (
        ("NLL", result.nll, 4),
        ("perplexity", document["ppl"], 2),
        ("KL to base", {"base": 0.0, **result.kl}, 4),
    ):
        table.add_row(
            name, *(f"{values[state]:.{digits}f}" for state in ("base", "broken", "patched"))
        )
    print_table(table)
    shares = [f"recovered [bold]{result.recovered:.3f}[/bold]"]
    if result.control is not None:
        there = result.control["recovered"]
        shares.append(
            f"a random row {there:.3f}"
            if there is not None
            else f"no control: {result.control['why']}"
        )
    if result.held_out["second_text"] and result.held_out["recovered"] is not None:
        shares.append(f"on {escape(result.held_out['name'])} {result.held_out['recovered']:.3f}")
    out.print(";  ".join(shares))
    out.print(
        f"{result.steps} steps, {result.seconds:.1f} s; change of norm {result.delta_norm:.3g} on"
        f" rows of norm {result.row_norm:.3g}, cosine {result.cosine_to_row:.3f}"
    )
    out.print(escape(f"{document['patch']}, {document['patch_bytes']} bytes"))
