"""What several verbs share: options, opening a model and a text, progress on stderr, JSON on
stdout.
"""

from __future__ import annotations

import json
import os
import shlex
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import reduce
from math import isfinite
from pathlib import Path
from typing import Any, TypeVar

import click
import torch
import transformers
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from transformers import PreTrainedTokenizerBase

from ..anatomy import Anatomy, Loaded, Region, load_model, open_stream, prove
from ..anatomy.load import DTYPES, check_dtype, device_named
from ..cells.checkpoint import holds_cells, load_cells
from ..corpus import BOS_POLICIES, DEFAULT_WINDOW, Corpus, load_corpus, read_text
from ..errors import BadInput, MissingExtra, SurgeonError, UnknownArchitecture
from ..patients import heldout_text
from ..report import write_report
from ..show.console import err

F = TypeVar("F", bound=Callable[..., Any])


def options(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    """Several click decorators as one, in reading order."""
    return lambda function: reduce(lambda f, decorate: decorate(f), reversed(decorators), function)


json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON document on stdout and nothing else."
)
seed_option = click.option(
    "--seed",
    default=0,
    type=click.IntRange(0, 2**32 - 1),
    show_default=True,
    help="Seed of everything random.",
)
model_options = options(
    click.argument("model"),
    click.option(
        "--dtype",
        default="auto",
        show_default=True,
        help="auto (the checkpoint's own), float32, bfloat16, float16, float64.",
    ),
    click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, ..."),
)
at_option = click.option(
    "--at",
    "at",
    multiple=True,
    required=True,
    metavar="ENTRY",
    help="'L0.mlp.down[88, 165]'; a row is [88, :], a column [:, 165].",
)
folder_option = click.option(
    "--folder",
    metavar="DIR",
    help="Run folder: write the result, its data and report.html there too.",
)
patch_option = click.option(
    "--patch",
    "patches",
    multiple=True,
    metavar="P",
    help="Patch file; several are applied in order.",
)


def text_options(windows: int | None) -> Callable[[F], F]:
    """Options of the evaluation text; `windows` is the default number of windows, None for all."""
    many = "all" if windows is None else str(windows)
    return options(
        click.option(
            "--text",
            metavar="FILE",
            help="UTF-8 text to evaluate on; default: the patient's held-out text.",
        ),
        click.option(
            "--window",
            default=DEFAULT_WINDOW,
            show_default=True,
            help="Tokens per window, BOS included.",
        ),
        click.option(
            "--windows",
            default=windows,
            type=int,
            help=f"Use the first N windows.  [default: {many}]",
        ),
        click.option(
            "--bos",
            default="auto",
            show_default=True,
            type=click.Choice(BOS_POLICIES),
            help="Whether windows begin with BOS.",
        ),
    )


def open_model(
    name: str, dtype: str = "auto", device: str = "auto", stream: bool = False, whole: bool = True
) -> tuple[Loaded, Anatomy]:
    """Load MODEL and draw its map, proved by experiment; with `stream` its layers stay on disk,
    `whole` as in `open_stream`.
    """
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    anatomy: Anatomy | None = None
    if stream:
        loaded, anatomy = open_stream(name, dtype, device, whole)
    else:
        loaded = load_model(name, dtype, device)
    try:
        anatomy = anatomy or Anatomy.of(loaded.model)
        prove(anatomy)
    except UnknownArchitecture as error:
        # NaN fails every experiment, and the map is not to blame
        with nullcontext() if anatomy is None else anatomy.holding(0):
            weights = [
                (p, weight) for p, weight in loaded.model.named_parameters() if not weight.is_meta
            ]
            broken = [p for p, weight in weights if not bool(torch.isfinite(weight).all())]
        if not broken:
            raise
        raise SurgeonError(
            f"{name} holds weights that are not finite (NaN or infinity in"
            f" {', '.join(broken[:3])}), so nothing can be found or measured; download or write it"
            " again, or load it with a wider --dtype."
        ) from error
    return loaded, anatomy


def open_anatomy(name: str, dtype: str = "auto", device: str = "auto") -> tuple[Anatomy, str]:
    """The proved map of MODEL, a language model or the folder of a cell model; its fingerprint."""
    if not holds_cells(name):
        loaded, anatomy = open_model(name, dtype, device)
        return anatomy, loaded.fingerprint
    check_dtype(dtype)
    cells = load_cells(name)
    cells.model.to(device=device_named(device), dtype=DTYPES.get(dtype))
    anatomy = cells.model.anatomy
    prove(anatomy)
    return anatomy, cells.fingerprint


def regions(anatomy: Anatomy, at: tuple[str, ...]) -> list[Region]:
    """The regions that `--at` names.

    Raises: BadInput, UnknownSite; BadInput if two share an entry, which would be counted twice.
    """
    found = [anatomy.region(a) for a in at]
    for i, one in enumerate(found):
        for other in found[:i]:
            rows, cols = ({a, b} for a, b in ((one.row, other.row), (one.col, other.col)))
            if one.site == other.site and all(
                None in lines or len(lines) == 1 for lines in (rows, cols)
            ):
                both = (
                    f"{one} is given twice" if one == other else f"{other} and {one} share an entry"
                )
                raise BadInput(f"--at: {both}; name each entry once.")
    return found


def tokenizer_of(loaded: Loaded) -> PreTrainedTokenizerBase:
    if loaded.tokenizer is None:
        raise BadInput(
            f"{loaded.name} ships no tokenizer, so no text can be read with it; put its"
            " tokenizer.json beside the weights."
        )
    return loaded.tokenizer


def open_corpus(
    loaded: Loaded, text: str | None, window: int, windows: int | None, bos: str
) -> Corpus:
    """The evaluation text as windows.

    Raises: BadText, BadInput; BadInput if the model cannot read windows or tokens like these.
    """
    source, name = (
        (heldout_text(), "patient-heldout") if text is None else (read_text(text), Path(text).name)
    )
    config = loaded.model.config.get_text_config()
    longest, known = (
        getattr(config, "max_position_embeddings", None),
        getattr(config, "vocab_size", None),
    )
    if longest is not None and window > longest:
        raise BadInput(
            f"--window {window} is longer than the {longest} positions that {loaded.name} reads;"
            f" use at most {longest}."
        )
    corpus = load_corpus(tokenizer_of(loaded), source, name, window, windows, bos)
    if known is not None and int(corpus.windows.max()) >= known:
        raise BadInput(
            f"the tokenizer of {loaded.name} gives token {int(corpus.windows.max())}, and the model"
            f" knows {known}; the tokenizer belongs to another model."
        )
    return corpus


def require_finite(**numbers: float | None) -> None:
    """Raises: SurgeonError naming the first number that is NaN or infinite, for which neither JSON
    nor a conclusion has room.
    """
    for name, number in numbers.items():
        if number is not None and not isfinite(number):
            raise SurgeonError(
                f"{name} is {number} on this text: the model's predictions are not finite; try"
                " --dtype float32, or look at its patches."
            )


def command_line() -> str | None:
    """The command as it was typed, quoted for a shell; None where no command runs."""
    context = click.get_current_context(silent=True)
    arguments = None if context is None else context.find_root().obj
    return None if arguments is None else shlex.join(["surgeon", *arguments])


def to_text(document: dict[str, Any]) -> str:
    """The document as JSON, with the command that made it."""
    made_by = command_line()
    return json.dumps(
        document if made_by is None else {"command": made_by, **document}, indent=2, allow_nan=False
    )


def print_json(document: dict[str, Any]) -> None:
    """Exactly one JSON document on stdout."""
    click.echo(to_text(document))


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """A progress line on stderr; silent where stderr is no terminal."""
    if not err.is_terminal:
        yield lambda what, done, total: None
        return
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        console=err,
        transient=True,
    ) as bar:
        tasks: dict[str, Any] = {}

        def update(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        yield update


def run_folder(output: str | None) -> Path | None:
    """The run folder, if one is wanted: made and tried before the work that is to go into it.

    Raises: BadInput.
    """
    if output is None:
        return None
    folder = Path(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise BadInput(
            f"cannot make the folder {output} or write to it: {error.strerror}; choose another"
            " place."
        ) from error
    return folder


Writer = Callable[[Path], Any]


def deliver(
    verb: str,
    document: dict[str, Any],
    tell_all: Callable[[], None],
    as_json: bool,
    folder: Path | None,
    data: Mapping[str, Writer] | None = None,
) -> None:
    """The end of a verb: its data and `VERB.json` go into the run folder, the result to stdout,
    report.html beside the data.

    data: what writes each file, by name; called with the path of a temporary file, which is then
    renamed. Without `folder` none is called. An extra that is missing costs only what needs it, and
    a sentence on stderr; so does a folder that no report can be made of.
    Raises: OSError where the folder cannot be written to any more.
    """
    if folder is not None:
        for name, write in (data or {}).items():
            try:
                _write(folder / name, write)
            except MissingExtra as error:
                click.echo(f"surgeon: no {name} was written: {error}", err=True)
        text = to_text(document) + "\n"
        _write(folder / f"{verb}.json", lambda path: path.write_text(text, encoding="utf-8"))
    if as_json:
        print_json(document)
    else:
        tell_all()
    if folder is not None:
        try:
            report = write_report(folder)
        # an extra is missing, or something else in the folder is damaged; the result is there all
        # the same
        except BadInput as error:
            click.echo(f"surgeon: no report.html was written: {error}", err=True)
        else:
            click.echo(f"report: {report}", err=True)


def write_columns(columns: Mapping[str, Sequence[Any]], path: Path) -> None:
    """Write columns of one length as Parquet.

    Raises: MissingExtra without `weight-surgeon[report]`.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtra("a Parquet file", "report") from error
    pyarrow.parquet.write_table(pyarrow.table(dict(columns)), path)


def _write(path: Path, write: Writer) -> None:
    """Write a file under a temporary name and rename it, so that nobody ever reads half of it."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
