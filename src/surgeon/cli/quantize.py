"""`surgeon quantize`: compress, hold the critical entries out, and show beside it what each half of
that is worth.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from ..anatomy import Anatomy, Entry
from ..anatomy.load import locate
from ..corpus import Corpus
from ..errors import BadInput
from ..files import check_new_folder, unfinished
from ..find import FindConfig, VerifyConfig, find
from ..measure import mean_nll, require_causal, task_accuracy
from ..quantize import (
    CLIPS,
    EXPORTS,
    METHODS,
    Block,
    ExportPlan,
    Grid,
    QuantizeConfig,
    Row,
    Source,
    input_mean_squares,
    pareto,
    quantized_sites,
    sweep,
    table,
    tensor_types,
)
from ..quantize.formats import KEEP, RECORD, TYPES
from ..show.quantize import print_quantize, print_written
from .activations import activation_options, measure_activations
from .common import (
    deliver,
    folder_option,
    json_option,
    model_options,
    open_corpus,
    open_model,
    options,
    progress,
    regions,
    require_finite,
    run_folder,
    seed_option,
    text_options,
    tokenizer_of,
)

SWEPT_BITS = (8, 4, 3)
SWEPT_BLOCKS = ("tensor", "channel", "group:128", "group:32", "flat:262144", "square:512")
CALIBRATION_WINDOWS = 8
CRITICAL = ("find", "none")

grid_options = options(
    click.option(
        "--bits",
        multiple=True,
        type=click.IntRange(2, 8),
        help="Bits of a weight, 2 to 8; with --sweep again for several.",
    ),
    click.option(
        "--block",
        "blocks",
        multiple=True,
        help=(
            "What shares a scale: tensor, channel, group:N (neighbours in a row), flat:N (runs of"
            " the flattened matrix), square:N (N x N tiles); with --sweep again for several. "
            " [default: group:128]"
        ),
    ),
    click.option(
        "--asymmetric",
        is_flag=True,
        help="Codes from the least to the greatest entry of a block, with an offset.",
    ),
    click.option(
        "--no-pad",
        is_flag=True,
        help=(
            "Refuse a block size that does not divide a matrix, instead of padding the last block."
        ),
    ),
)
method_options = options(
    click.option(
        "--method",
        type=click.Choice(METHODS),
        default=QuantizeConfig.method,
        show_default=True,
        help=(
            "What is written: rounded; clipped and "
            "rounded; rounded with the critical entries put back; clipped, rounded and put back."
        ),
    ),
    click.option(
        "--clip",
        type=click.Choice(CLIPS),
        default="z",
        show_default=True,
        help="How the limits of clipping are set.",
    ),
    click.option(
        "--clip-value",
        type=float,
        help="z, percent kept, or share of the range (mse); default: searched for each matrix.",
    ),
    click.option(
        "--clip-per",
        type=click.Choice(["tensor", "block"]),
        default="tensor",
        show_default=True,
        help="What z and percentiles are statistics of.",
    ),
    click.option(
        "--weighted",
        is_flag=True,
        help=(
            "Search by the error of outputs: E[x^2] of each input, from the first "
            f"{CALIBRATION_WINDOWS} windows, on which nothing is judged then."
        ),
    ),
    click.option(
        "--critical",
        multiple=True,
        metavar="ENTRY",
        help=(
            "Entry or row to hold out, again for several; `find` looks for them, "
            "`none` holds nothing out.  [default: find]"
        ),
    ),
)


@click.command("quantize")
@model_options
@click.option(
    "-o",
    "output",
    metavar="DIR",
    help="New folder for the quantized checkpoint; without it only the table is made.",
)
@grid_options
@method_options
@click.option(
    "--export",
    "kind",
    type=click.Choice(sorted(EXPORTS)),
    default="dense",
    show_default=True,
    help="Format that is written.",
)
@click.option(
    "--keep",
    type=click.Choice(KEEP),
    default="8bit",
    show_default=True,
    help=(
        "How compressed-tensors and torchao keep the "
        "matrices with critical entries: they have no room for single ones."
    ),
)
@click.option(
    "--gguf",
    type=click.Choice(TYPES),
    help="Show the --tensor-type flags with which llama-quantize keeps those matrices so.",
)
@click.option(
    "--stream",
    is_flag=True,
    help=(
        "Write shard by shard without loading the model, so without a table; needs -o and"
        " --critical."
    ),
)
@click.option(
    "--sweep",
    "swept",
    is_flag=True,
    help="Table of bits x block x method, and its Pareto front.",
)
@click.option(
    "--task",
    "tasks",
    multiple=True,
    help="Accuracy on this lm-eval task too: a name it knows or a YAML file.",
)
@click.option("--limit", type=click.IntRange(1), help="Examples of each task.  [default: all]")
@activation_options
@text_options(windows=40)
@seed_option
@folder_option
@json_option
def command(
    model: str,
    dtype: str,
    device: str,
    output: str | None,
    bits: tuple[int, ...],
    blocks: tuple[str, ...],
    asymmetric: bool,
    no_pad: bool,
    method: str,
    clip: str,
    clip_value: float | None,
    clip_per: str,
    weighted: bool,
    critical: tuple[str, ...],
    kind: str,
    keep: str,
    gguf: str | None,
    stream: bool,
    swept: bool,
    tasks: tuple[str, ...],
    limit: int | None,
    activations: str | None,
    hold: int,
    alpha: float,
    text: str | None,
    window: int,
    windows: int | None,
    bos: str,
    seed: int,
    folder: str | None,
    as_json: bool,
) -> None:
    """Round MODEL's projections to few bits, and hold the weights it cannot live without out
    of it.
    """
    _check(bits, blocks, critical, stream, swept, output, weighted)
    if activations is not None and (swept or stream):
        raise BadInput(
            "--activations is one table for one --bits and --block, with the model in memory; leave"
            " --sweep and --stream out."
        )
    grids = [
        Grid(n, not asymmetric, Block.parse(b), not no_pad)
        for n in bits or SWEPT_BITS
        for b in blocks or ("group:128",)
    ]
    config = QuantizeConfig(grids[0], method, clip, clip_value, clip_per, weighted)
    target = None if output is None else Path(output)
    if target is not None:
        check_new_folder(target, locate(model))
    run = run_folder(folder)
    if stream:
        assert target is not None
        there = Source(locate(model), config).anatomy
        entries = _named(there, critical)
        kept = {} if gguf is None else {"gguf": tensor_types(there, entries, gguf).to_json()}
        _export(kind, ExportPlan(locate(model), target, config, tuple(entries), keep=keep))
        document: dict[str, Any] = {
            "model": model,
            **_written(kind, target),
            "config": config.to_json(),
            **kept,
        }
        deliver("quantize", document, lambda: print_written(document), as_json, run)
        return
    loaded, anatomy = open_model(model, dtype, device)
    require_causal(loaded.model)
    corpus = open_corpus(loaded, text, window, windows, bos)
    entries, source = _critical(anatomy, corpus, critical, seed)
    kept = {} if gguf is None else {"gguf": tensor_types(anatomy, entries, gguf).to_json()}
    judged, mean_squares = corpus.windows, {}
    if weighted:
        if len(judged) < 2:
            raise BadInput(
                f"{corpus.name} gives one window; two are needed, to calibrate on and to judge on."
                " Give more text."
            )
        cut = min(CALIBRATION_WINDOWS, len(judged) // 2)
        with progress() as tell:
            mean_squares = input_mean_squares(
                anatomy, judged[:cut], quantized_sites(anatomy, config), tell
            )
        judged = judged[cut:]
    examine = (
        None
        if not tasks
        else lambda: task_accuracy(loaded.model, tokenizer_of(loaded), tasks, limit)
    )
    base = mean_nll(loaded.model, judged)
    require_finite(**{"the NLL of the intact model": base})
    document = {
        "model": model,
        "fingerprint": loaded.fingerprint,
        "corpus": {**corpus.to_json(), "judged_on": len(judged)},
        "base": {"nll": base, "accuracy": {} if examine is None else examine()},
        "critical": {"entries": [str(e) for e in entries], "source": source},
        **kept,
    }
    if swept:
        each = [Block.parse(b) for b in blocks or SWEPT_BLOCKS]
        with progress() as tell:
            rows = sweep(
                anatomy,
                judged,
                config,
                bits or SWEPT_BITS,
                each,
                entries,
                mean_squares,
                examine,
                tell,
            )
        document |= {
            "config": config.to_json(),
            "sweep": [r.to_json() for r in rows],
            "pareto": [r.to_json() for r in pareto(rows)],
        }
    else:
        rows = table(anatomy, judged, config, entries, mean_squares, examine)
        chosen = next(r.result for r in rows if r.method == method and r.result is not None)
        document |= {
            "config": chosen.to_json(),
            "table": [r.to_json() for r in rows],
            "notes": _notes(rows, entries),
        }
        if activations is not None:
            document["activations"] = measure_activations(
                anatomy, corpus, activations, hold, alpha, entries, config
            )
        if target is not None:
            _export(
                kind,
                ExportPlan(loaded.folder, target, config, tuple(entries), mean_squares, keep=keep),
            )
            document |= _written(kind, target)
    deliver("quantize", document, lambda: print_quantize(document), as_json, run)


def _check(
    bits: Sequence[int],
    blocks: Sequence[str],
    critical: Sequence[str],
    stream: bool,
    swept: bool,
    output: str | None,
    weighted: bool,
) -> None:
    """What no single option can tell."""
    if any(word in critical for word in CRITICAL) and len(critical) > 1:
        raise BadInput(
            "--critical find and --critical none stand alone; name entries, or one of the two."
        )
    if swept and (output is not None or stream):
        raise BadInput(
            "--sweep only compares, and writes no checkpoint; run it without -o and --stream, then"
            " quantize as you chose."
        )
    if not swept and (len(bits) != 1 or len(blocks) > 1):
        raise BadInput(
            "quantize needs one --bits, 2 to 8, and at most one --block; several go with --sweep."
        )
    if stream and (output is None or weighted or not critical or "find" in critical):
        raise BadInput(
            "--stream does not load the model: give -o, name the entries with --critical ('none'"
            " for none; `surgeon find --stream` finds them), and leave --weighted out."
        )


def _critical(
    anatomy: Anatomy, corpus: Corpus, named: Sequence[str], seed: int
) -> tuple[list[Entry], str]:
    """The entries to hold out, and where they come from."""
    if named and named != ("find",):
        return _named(anatomy, named), "none asked for" if named == ("none",) else "named"
    with progress() as tell:
        result = find(anatomy, corpus, FindConfig(verify=VerifyConfig(seed=seed)), tell)
    return [
        c.entry for s in result.sets if s.verification.vital for c in s.entries
    ], f"find: {result.verdict}"


def _named(anatomy: Anatomy, named: Sequence[str]) -> list[Entry]:
    """The entries that `--critical` names, each of a row or a column by itself; none for `none`."""
    found = (
        []
        if named == ("none",)
        else [(r, *r.rows_cols(anatomy.view(r.site).shape)) for r in regions(anatomy, tuple(named))]
    )
    return [
        Entry(r.site, row, col)
        for r, rows, cols in found
        for row, col in zip(rows, cols, strict=True)
    ]


@contextmanager
def _told(target: Path) -> Iterator[None]:
    """An interrupt keeps what is finished, which must be said."""
    try:
        yield
    except KeyboardInterrupt:
        click.echo(
            f"surgeon: finished shards stay in {unfinished(target)}; the same command goes on from"
            " them.",
            err=True,
        )
        raise


def _export(kind: str, plan: ExportPlan) -> None:
    with progress() as tell, _told(plan.target):
        EXPORTS[kind](replace(plan, progress=tell))


def _written(kind: str, target: Path) -> dict[str, Any]:
    files = sorted(p for p in target.rglob("*") if p.is_file())
    record = target / RECORD
    matrices = json.loads(record.read_text())["matrices"] if record.is_file() else []
    return {
        "export": {
            "kind": kind,
            "folder": str(target),
            "bytes": sum(p.stat().st_size for p in files),
        },
        "written": matrices,
    }


def _notes(rows: Sequence[Row], entries: Sequence[Entry]) -> list[str]:
    """What the table alone would let one overlook."""
    nll = {row.method: row.nll for row in rows}
    found = []
    if not entries:
        found.append("No entry is held out, so restore is rtn, and holdout is clip.")
    elif (
        nll["restore"] is not None
        and nll["rtn"] is not None
        and abs(nll["restore"] - nll["rtn"]) < 1e-3
    ):
        found.append(
            "Putting back without clipping changes next to nothing: the entries lie on their grid"
            " already, or have their block for themselves."
        )
    best = min((r for r in rows if r.nll is not None), key=lambda r: r.nll or 0.0, default=None)
    if best is not None:
        found.append(f"Least NLL on this text: {best.method}.")
    whole = [m for r in rows[:1] if r.result for m in r.result.matrices.values() if m.blocks == 1]
    if whole and not rows[0].block.startswith("tensor"):
        found.append(
            f"{len(whole)} matrices are no larger than one block of {rows[0].block}, so they have"
            " one scale."
        )
    return found
