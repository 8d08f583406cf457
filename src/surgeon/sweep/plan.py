"""A plan: a YAML file that says which models, operations and seeds; checked before anything is
loaded, then made into tasks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, TypeVar

from ..anatomy.folder import fingerprint
from ..anatomy.load import DTYPES, load_tokenizer, locate, read_config
from ..corpus import BOS_POLICIES, DEFAULT_WINDOW
from ..documents import beside, read_yaml
from ..errors import BadInput
from ..settings import Setting, configured, nearest, setting, settings_of, values_of
from .task import Operation, Task, Text, corpus_digest, shared

T = TypeVar("T")
MOST_TASKS = 100_000  # that one grid may multiply out to
VITAL = "vital"  # the set that `find` returns; what an operation on weights takes if none are named


@dataclass(frozen=True)
class Work:
    """An operation of the plan with one choice of its parameters.

    named: the parameters that the plan says. inputs: digests of the files that it names.
    """

    operation: str
    params: dict[str, Any]
    named: list[str]
    inputs: dict[str, str]
    seeded: bool


@dataclass(frozen=True)
class Plan:
    """What a plan file says, its grids multiplied out.

    models: by the name in the plan, the folder or Hub id to load.
    """

    models: dict[str, str]
    work: list[Work]
    seeds: list[int] = field(default_factory=lambda: [0])
    texts: list[str | None] = field(default_factory=lambda: [None])
    title: str = setting("", "what it is about")
    window: int = setting(DEFAULT_WINDOW, "tokens of a window")
    windows: int | None = setting(40, "use the first N windows; null: all")
    bos: str = setting("auto", "whether windows begin with BOS", choices=BOS_POLICIES)
    dtype: str = setting("auto", "of the models", choices=("auto", *DTYPES))
    device: str = setting("auto", "where the models run")


_PLAIN = tuple(one.name for one in settings_of(Plan))  # keys with a single value
_KEYS = ("models", "operations", "seeds", "text", *_PLAIN)


def read_plan(path: str | Path, operations: Mapping[str, Operation]) -> Plan:
    """Read and check a plan. Relative paths in it are looked for beside the plan first.

    Raises: BadText for a file that cannot be read; BadInput naming the key, the operation or the
    parameter that cannot be used.
    """
    path = Path(path)
    source = read_yaml(path)
    if not isinstance(source, dict) or not {"models", "operations"} <= set(source):
        raise BadInput(f"{path} is not a plan: it should be a mapping with models and operations.")
    for key in source:
        if key not in _KEYS:
            raise BadInput(f"{path}: {key} is not a key of a plan{nearest(key, _KEYS)}")
    models = _list_of(str, source["models"], f"{path}: models")
    seeds = _list_of(int, source.get("seeds", [0]), f"{path}: seeds")
    if not all(0 <= seed < 2**32 for seed in seeds):
        raise BadInput(f"{path}: a seed is a whole number from 0 to {2**32 - 1}.")
    work = [
        one
        for number, item in enumerate(_some(source["operations"], f"{path}: operations"), 1)
        for one in _work(path, f"{path}, operation {number}", item, operations)
    ]
    plan = Plan(
        models={model: _model(path, model) for model in models},
        work=work,
        seeds=seeds,
        texts=_texts(path, source.get("text")),
        title=path.stem,
    )
    try:
        read: Plan = configured(plan, {key: source[key] for key in _PLAIN if key in source})
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from error
    return read


def expand(plan: Plan) -> list[Task]:
    """The tasks of a plan, each once, in its order: model, text, operation, seed. Weights are
    hashed, texts tokenised, no model loaded.

    Raises: BadInput, BadCheckpoint, BadText for a model or a text that cannot be used.
    """
    tasks: dict[str, Task] = {}
    for name, where in plan.models.items():
        folder = locate(where)
        config, tokenizer = read_config(folder).get_text_config(), load_tokenizer(folder)
        if tokenizer is None:
            raise BadInput(
                f"{name} ships no tokenizer, so no text can be read with it; put its tokenizer.json"
                " beside the weights."
            )
        longest = getattr(config, "max_position_embeddings", None)
        if longest is not None and plan.window > longest:
            raise BadInput(
                f"a window of {plan.window} is longer than the {longest} positions that {name}"
                f" reads; use at most {longest}."
            )
        weights = fingerprint(folder)
        for path in plan.texts:
            text = Text(path, plan.window, plan.windows, plan.bos)
            digest = corpus_digest(text.read(tokenizer))
            for work in plan.work:
                for seed in plan.seeds if work.seeded else [None]:
                    task = Task(
                        name,
                        where,
                        plan.dtype,
                        plan.device,
                        weights,
                        text,
                        digest,
                        work.operation,
                        work.params,
                        work.named,
                        work.inputs,
                        seed,
                    )
                    tasks.setdefault(task.id, task)
    return list(tasks.values())


def _work(path: Path, where: str, item: Any, operations: Mapping[str, Operation]) -> Iterator[Work]:
    """One item of `operations`: a name, or a mapping with `name`, `params` (fixed) and `grid`
    (lists, multiplied out).
    """
    item = {"name": item} if isinstance(item, str) else item
    if not isinstance(item, dict) or "name" not in item:
        raise BadInput(
            f"{where}, should be a name, or a mapping with name, params and grid; it is {item!r}."
        )
    keys = ("name", "params", "grid")
    for key in item:
        if key not in keys:
            raise BadInput(f"{where}: {key} is not a key of an operation{nearest(key, keys)}")
    name = str(item["name"])
    if name not in operations:
        raise BadInput(f"{where}: {name} is not an operation{nearest(name, operations)}")
    operation = operations[name]
    where = f"{where} ({name})"
    known = _parameters(operation)
    fixed, grid = (_mapping(where, key, item.get(key), known) for key in ("params", "grid"))
    if both := sorted(set(fixed) & set(grid)):
        raise BadInput(f"{where}: {both[0]} is in params and in grid; keep one of the two.")
    axes = {key: _some(values, f"{where}: the grid's {key}") for key, values in grid.items()}
    if (many := prod(len(values) for values in axes.values())) > MOST_TASKS:
        raise BadInput(f"{where}: its grid multiplies out to {many:,} tasks; use a smaller one.")
    if "at" in known and known["at"].required:
        fixed = {"at": VITAL, **fixed}
    for values in product(*axes.values()):
        given = {**fixed, **dict(zip(axes, values, strict=True))}
        yield _one_work(path, where, name, operation, given)


def _parameters(operation: Operation) -> dict[str, Setting]:
    """What an item can say of its operation: all settings but those that the plan says for all."""
    known = {one.name: one for one in settings_of(operation.settings)}
    elsewhere = shared(known)
    return {name: one for name, one in known.items() if name not in elsewhere}


def _mapping(where: str, key: str, value: Any, known: Mapping[str, Setting]) -> dict[str, Any]:
    """`params` or `grid` of an item. Raises: BadInput for a parameter that there is not."""
    given = {} if value is None else value
    if not isinstance(given, dict):
        raise BadInput(f"{where}: {key} should be a mapping of parameters; it is {given!r}.")
    for parameter in given:
        if parameter in known:
            continue
        if parameter in _KEYS or parameter == "seed":
            raise BadInput(
                f"{where}: {parameter} is said once for the whole plan, not in an operation's"
                f" {key}."
            )
        raise BadInput(f"{where}: {parameter} is not a parameter{nearest(parameter, known)}")
    return given


def _one_work(
    path: Path, where: str, name: str, operation: Operation, given: dict[str, Any]
) -> Work:
    """The operation with one choice of its parameters, files by their whole paths."""
    known = _parameters(operation)
    try:
        whole, inputs = _with_files(path, known, given)
        for one in known.values():
            if one.kind is Any and one.name in whole:
                _check_texts(one, whole[one.name])
        values = values_of(configured(operation.settings, whole, name))
    except BadInput as error:
        raise BadInput(f"{where}: {error}") from error
    params = {key: value for key, value in values.items() if key in known}
    return Work(name, params, list(given), inputs, operation.seeded)


def _check_texts(one: Setting, value: Any) -> None:
    """What names weights or a patch is a text here; in Python it can be more.

    Raises: BadInput.
    """
    texts = value if isinstance(value, list) else [value]
    if value is not None and not all(isinstance(text, str) for text in texts):
        raise BadInput(f"{one.name} is {value!r}; it should be text or a list of texts.")


def _with_files(
    path: Path, known: Mapping[str, Setting], given: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, str]]:
    """What is given, with whole paths, and the digest of each file that it names.

    Raises: BadInput for a file that cannot be read.
    """
    whole, inputs = dict(given), {}
    for name, value in given.items():
        if not known[name].declaration.is_file or not value:
            continue
        names = value if isinstance(value, list) else [value]
        if not all(isinstance(file, str) for file in names):
            continue  # its type is checked with the others'
        files = [beside(path, file) for file in names]
        try:
            digests = [hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in files]
        except OSError as error:
            raise BadInput(
                f"the file {error.filename} of {name} cannot be read: {error.strerror}."
            ) from error
        inputs[name] = ",".join(digests)
        whole[name] = files if isinstance(value, list) else files[0]
    return whole, inputs


def _texts(path: Path, value: Any) -> list[str | None]:
    """The files of a plan's text, or of several; None for the patient's held-out text."""
    if not value:
        return [None]
    names = _list_of(str, [value] if isinstance(value, str) else value, f"{path}: text")
    return [beside(path, name) for name in names]


def _model(path: Path, name: str) -> str:
    """The folder that a model's name stands for, as a whole path; `patient` and a Hub id as they
    are.
    """
    if name == "patient":
        return name
    whole = beside(path, name)
    return whole if Path(whole).exists() else name


def _some(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise BadInput(
            f"{what} should be a list with at least one item; it is {value!r}, so there would be"
            " nothing to run."
        )
    return value


def _list_of(kind: type[T], value: Any, what: str) -> list[T]:
    """A list of texts or of whole numbers. Raises: BadInput."""
    wanted = "texts" if kind is str else "whole numbers"
    items = _some(value, what)
    for item in items:
        if type(item) is not kind:  # not isinstance: YAML's true is a whole number to Python
            raise BadInput(f"{what} should be a list of {wanted}; it holds {item!r}.")
    return items
