"""`surgeon audit`: what a compression, merge, pruning, adapter or fine-tune did to the critical
entries.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click
import torch

from ..anatomy import Anatomy, Entry, Site, load_model
from ..anatomy.load import DTYPES
from ..anatomy.stream import open_stream
from ..audit import (
    AMBER,
    OK,
    RED,
    Adapter,
    Audit,
    AuditConfig,
    Checkpoint,
    EntryAudit,
    GgufFile,
    Plugin,
    SetAudit,
    SuperActivation,
    Watched,
    Weights,
    audit,
    channels,
    open_pair,
    peaks,
)
from ..cells.checkpoint import holds_cells
from ..errors import BadInput, MissingExtra, SurgeonError
from ..find import find
from ..find.index import Published, records_of, records_shaped
from ..patch import load
from ..quantize.packing import pieces
from ..quantize.quantizer import CORRECTION, METHOD, PARTS, SidecarConfig
from ..studies.cell_patches import CellWeights
from .common import open_corpus, open_model, print_json, progress, regions, text_options

FORMATS = ("text", "json", "github")
FAILURES = {"red": (RED,), "amber": (RED, AMBER), "never": ()}
SHOWN = 3
ANNOTATED = 8  # GitHub shows ten annotations of a kind for each step
_TRUST = 0.25  # a printed weight is this model's if the base holds it to within this share
_TOP = 1e-4  # and one without a printed value if it is among this share of its matrix, by |w|


@click.command("audit")
@click.argument("base")
@click.argument("other")
@click.option(
    "--at",
    "at",
    multiple=True,
    metavar="ENTRY",
    help="Entry, row or column to audit; all of them are one set.",
)
@click.option(
    "--patch",
    "patches",
    multiple=True,
    metavar="P",
    help="Audit the entries that a patch changes; each patch is a set.",
)
@click.option(
    "--format",
    "form",
    default="text",
    show_default=True,
    type=click.Choice(FORMATS),
    help="github: annotations of a workflow.",
)
@click.option("--json", "as_json", is_flag=True, help="The same as --format json.")
@click.option(
    "--fail-on",
    default="red",
    show_default=True,
    type=click.Choice(tuple(FAILURES)),
    help="Verdict that ends with exit status 1.",
)
@click.option(
    "--run", "run", is_flag=True, help="Also run both models, and compare their super activations."
)
@text_options(windows=40)
def command(
    base: str,
    other: str,
    at: tuple[str, ...],
    patches: tuple[str, ...],
    form: str,
    as_json: bool,
    fail_on: str,
    run: bool,
    text: str | None,
    window: int,
    windows: int | None,
    bos: str,
) -> None:
    """Compare the critical entries of OTHER with those of BASE, which it was made from: a
    fine-tune, a merge, a pruned or quantized model, a LoRA adapter, a GGUF file. Only the matrices
    concerned are read.

    Without --at and --patch: the published entries of BASE, else what `surgeon find` finds in it
    (--text and the options after it).
    """
    corpus = (text, window, windows, bos)
    first: Weights
    second: Weights
    if holds_cells(base):
        if run or not (at or patches):
            raise BadInput(
                f"{base} is a model of gene expression, which no text can be read with; name the"
                " entries to audit with --at or --patch, and leave out --run."
            )
        first, second = CellWeights(base), CellWeights(other)
    else:
        first, second = open_pair(base, other, {METHOD: Plugin("_codes", _sidecar)})
    watched, source = _watched(first, base, at, patches, corpus)
    with progress() as tell:
        result = audit(first, second, watched, AuditConfig(), tell)
    activations, reason = _run(base, other, first, second, result, corpus) if run else ([], None)
    document = {
        "base": base,
        "other": other,
        "source": source,
        **result.to_json(),
        "activations": [a.to_json() for a in activations],
    }
    if reason is not None:
        document["not_run"] = reason
    if as_json or form == "json":
        print_json(document)
    elif form == "github":
        click.echo(_annotations(other, result))
    else:
        click.echo(_line(base, other, result, activations, reason))
    if result.verdict in FAILURES[fail_on]:
        raise SurgeonError(
            f"the verdict is {result.verdict}, which fails the audit (--fail-on {fail_on})."
        )


# -- which entries -----------------------------------------------------------------------------


def _watched(
    base: Weights, name: str, at: tuple[str, ...], patches: tuple[str, ...], corpus: Any
) -> tuple[list[Watched], str]:
    """The sets to audit, and where they come from, in words."""
    sets = [Watched(_entries(base.anatomy, at))] if at else []
    sets += [Watched(_touched(base.anatomy, path)) for path in patches]
    if sets:
        return sets, "given"
    assert isinstance(base, Checkpoint)
    published, model = _published(base, name)
    if published:
        click.echo(
            f"surgeon: auditing the {len(published)} published entries of {model}.", err=True
        )
        return [Watched(tuple(r.entry for r in published))], f"published for {model}"
    click.echo(
        f"surgeon: no published entries are known for {name}; looking for its critical sets, as"
        " `surgeon find` does.",
        err=True,
    )
    anatomy, loaded = _in_memory_or_streamed(base, name)
    with progress() as tell:
        found = find(anatomy, open_corpus(loaded, *corpus), progress=tell)
    vital = [s for s in found.sets if s.verification.vital]
    if not vital:
        raise BadInput(
            f"`surgeon find` finds no vital entries in {name}, so there are none to audit; name"
            " some with --at."
        )
    click.echo(
        f"surgeon: found {', '.join(f'a {s.geometry} of {len(s.entries)}' for s in vital)}.",
        err=True,
    )
    return [
        Watched(tuple(c.entry for c in s.entries), tuple(c.share for c in s.entries)) for s in vital
    ], "found in BASE"


def _entries(anatomy: Anatomy, at: tuple[str, ...]) -> tuple[Entry, ...]:
    found = []
    for region in regions(anatomy, at):
        rows, cols = region.rows_cols(anatomy.view(region.site).shape)
        found += [Entry(region.site, r, c) for r, c in zip(rows, cols, strict=True)]
    return tuple(found)


def _touched(anatomy: Anatomy, path: str) -> tuple[Entry, ...]:
    patch = load(path)
    found = []
    for site in patch.sites:
        if patch.base[site].shape != anatomy.view(site).shape:
            raise BadInput(
                f"the patch {path} was made on another model than BASE: its {site} has shape"
                f" {patch.base[site].shape}."
            )
        found += [Entry(site, r, c) for r, c in patch.touched(site).nonzero().tolist()]
    return tuple(found)


def _published(base: Checkpoint, name: str) -> tuple[list[Published], str]:
    """The published entries of BASE: of the model it is called after and shaped like, or of one of
    its shape whose weights it holds.
    """
    records = [r for r in records_shaped(base.anatomy.config) if r.status != "nearly inert"]
    try:
        named = {r.model for r in records_of(name)}
    except BadInput:
        named = set()
    for model in dict.fromkeys(r.model for r in records):
        mine = [r for r in records if r.model == model]
        if model in named or all(_holds(base, r) for r in mine):
            return mine, model
    return [], ""


def _holds(base: Checkpoint, record: Published) -> bool:
    matrix = base.matrix(record.entry.site)
    value = matrix[record.row, record.col]
    if record.weight is not None:
        return bool((value - record.weight).abs() <= _TRUST * abs(record.weight))
    return int((matrix.abs() >= value.abs()).sum()) <= _TOP * matrix.numel()


def _in_memory_or_streamed(base: Checkpoint, name: str) -> tuple[Anatomy, Any]:
    size = sum(s.stop - s.start for s in base.tensors.shards.stored.values())
    if size < 0.5 * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        loaded, anatomy = open_model(name)
        return anatomy, loaded
    click.echo(
        "surgeon: BASE does not fit into memory; reading it block by block. --at or --patch would"
        " spare that.",
        err=True,
    )
    loaded, streamed = open_stream(name, whole=False)
    return streamed, loaded


def _sidecar(checkpoint: Checkpoint, name: str, site: Site, place: int) -> torch.Tensor:
    """The matrix of a checkpoint that `surgeon quantize --export sidecar` wrote, its critical
    entries put back.
    """
    config = SidecarConfig(**checkpoint.settings)
    parts = {
        p: checkpoint.tensors.read(f"{name}_{p}")
        for p in PARTS
        if f"{name}_{p}" in checkpoint.tensors
    }
    matrix = pieces(parts, config.grid)[place].dequantize().to(DTYPES[config.dtype])
    if config.correction is not None:
        for delta in load(checkpoint.folder / CORRECTION).on(site):
            delta.apply_(matrix)
    return matrix


# -- running both ------------------------------------------------------------------------------


def _run(
    base: str, other: str, first: Weights, second: Weights, result: Audit, corpus: Any
) -> tuple[list[SuperActivation], str | None]:
    """The super activations of both models; if one cannot be run, why."""
    places = channels([e.entry for e in result.entries])
    if not places:
        return (
            [],
            "the entries lie in experts that share one module, whose channels are not looked at",
        )
    addresses = [first.anatomy.addresses[site] for site, _ in places]
    rows = [row for _, row in places]
    loaded, _ = open_model(base)
    windows = open_corpus(loaded, *corpus).windows
    before = peaks(loaded.model, addresses, rows, windows)
    try:
        after = peaks(_load(other, second, loaded.model), addresses, rows, windows)
    except (MissingExtra, SurgeonError) as error:
        return [], str(error)
    return [
        SuperActivation(site, row, a, b)
        for (site, row), a, b in zip(places, before, after, strict=True)
    ], None


def _load(other: str, weights: Weights, base: Any) -> Any:
    """OTHER as a model that runs; an adapter goes onto the base that is loaded already."""
    if isinstance(weights, Adapter):
        try:
            from peft import PeftModel
        except ImportError as error:
            raise MissingExtra("running an adapter", "lora") from error
        model: Any = PeftModel.from_pretrained(base, other)
        return model.merge_and_unload()
    if isinstance(weights, GgufFile):
        path = Path(other)
        try:
            return (
                type(base)
                .from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
                .eval()
            )
        except (
            Exception
        ) as error:  # transformers raises many types here, all of them about this file
            raise SurgeonError(
                f"transformers cannot run {other}: {str(error).partition(chr(10))[0]}"
            ) from error
    return load_model(other).model


# -- printing ----------------------------------------------------------------------------------


def _line(
    base: str, other: str, result: Audit, activations: list[SuperActivation], reason: str | None
) -> str:
    sets = [_of_set(s) for s in result.sets]
    ran = [f"channel {a.row} after {a.site} {a.base:.4g} -> {a.other:.4g}" for a in activations]
    ran += [f"not run: {reason}"] if reason else []
    return f"{result.verdict}: {other} against {base}: {'; '.join([*sets, *ran])}"


def _of_set(found: SetAudit) -> str:
    shown = sorted(found.entries, key=lambda e: (-abs(e.share), str(e.entry)))[:SHOWN]
    entries = ", ".join(map(_of_entry, shown))
    if len(found.entries) == 1:
        return entries
    bad = {grade: sum(e.verdict == grade for e in found.entries) for grade in (RED, AMBER)}
    kept = "nothing finite" if found.ratio is None else f"{found.ratio:.2f}"
    many = f" and {len(found.entries) - SHOWN} more" if len(found.entries) > SHOWN else ""
    return (
        f"{len(found.entries)} entries keep {kept} of their sum, {bad[RED]} red and {bad[AMBER]}"
        f" amber alone ({entries}{many})"
    )


def _of_entry(e: EntryAudit) -> str:
    other, ratio, rank = (
        "none" if x is None else format(x, f)
        for x, f in ((e.other, ".5g"), (e.ratio, ".2f"), (e.rank, "d"))
    )
    return f"{e.entry} {e.base:.5g} -> {other}, ratio {ratio}, rank {e.rank_base} -> {rank}"


def _annotations(other: str, result: Audit) -> str:
    """GitHub's workflow commands: one line for each set, then its entries that are not ok and carry
    most.
    """
    kinds = {RED: "error", AMBER: "warning", OK: "notice"}
    lines = []
    for found in result.sets:
        lines.append((kinds[found.verdict], f"{found.verdict}: {other}: {_of_set(found)}"))
        if len(found.entries) > 1 and found.verdict != OK:
            bad = sorted((e for e in found.entries if e.verdict != OK), key=lambda e: -abs(e.share))
            lines += [(kinds[e.verdict], f"{e.verdict}: {_of_entry(e)}") for e in bad[:ANNOTATED]]
    return "\n".join(
        f"::{kind} title={_escaped('surgeon audit', True)}::{_escaped(message)}"
        for kind, message in lines
    )


def _escaped(text: str, is_property: bool = False) -> str:
    """As GitHub's own toolkit does, so that neither a path nor a name can begin a command of its
    own.
    """
    text = text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    return text.replace(":", "%3A").replace(",", "%2C") if is_property else text
