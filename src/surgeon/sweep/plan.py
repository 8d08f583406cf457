"""A plan: a YAML file that says which models, operations and seeds; checked before anything is
loaded, then made into tasks.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import product
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from ..anatomy.folder import fingerprint
from ..anatomy.load import DTYPES, load_tokenizer, locate, read_config
from ..corpus import BOS_POLICIES, DEFAULT_WINDOW, read_text
from ..errors import BadInput
from .task import Operation, Task, Text, corpus_digest


@dataclass(frozen=True)
class Work:
    """An operation of the plan with one choice of its parameters.

    inputs: digests of the files that it names.
    """

    operation: str
    params: dict[str, Any]
    inputs: dict[str, str]
    seeded: bool


@dataclass(frozen=True)
class Plan:
    """What a plan file says, its grids multiplied out.

    models: by the name in the plan, the folder or Hub id to load.
    """

    title: str
    models: dict[str, str]
    work: list[Work]
    seeds: list[int] = field(default_factory=lambda: [0])
    texts: list[str | None] = field(default_factory=lambda: [None])
    window: int = DEFAULT_WINDOW
    windows: int | None = 40
    bos: str = "auto"
    dtype: str = "auto"
    device: str = "auto"


# what is read by its type alone; the other keys have rules of their own
_PLAIN: dict[str, Any] = {
    "title": str,
    "window": int,
    "windows": int | None,
    "bos": str,
    "dtype": str,
    "device": str,
}
_KEYS = ("models", "operations", "seeds", "text", *_PLAIN)


def read_plan(path: str | Path, operations: Mapping[str, Operation]) -> Plan:
    """Read and check a plan. Relative paths in it are looked for beside the plan first.

    Raises: BadText for a file that cannot be read; BadInput naming the key, the operation or the
    parameter that cannot be used.
    """
    path = Path(path)
    try:
        source = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        raise BadInput(f"{path} is not YAML: {str(error).splitlines()[0]}.") from error
    if not isinstance(source, dict) or not {"models", "operations"} <= set(source):
        raise BadInput(f"{path} is not a plan: it should be a mapping with models and operations.")
    for key in source:
        if key not in _KEYS:
            raise BadInput(f"{path}: {key} is not a key of a plan{_nearest(key, _KEYS)}")
    plain = {
        key: _typed(source[key], kind, f"{path}: {key}")
        for key, kind in _PLAIN.items()
        if key in source
    }
    for key, known in (("bos", BOS_POLICIES), ("dtype", ("auto", *DTYPES))):
        if plain.get(key, "auto") not in known:
            raise BadInput(f"{path}: {key} {plain[key]} is not known; use {', '.join(known)}.")
    models = [
        _typed(m, str, f"{path}: a model") for m in _some(source["models"], f"{path}: models")
    ]
    seeds = [
        _typed(s, int, f"{path}: a seed") for s in _some(source.get("seeds", [0]), f"{path}: seeds")
    ]
    if not all(0 <= seed < 2**32 for seed in seeds):
        raise BadInput(f"{path}: a seed is a whole number from 0 to {2**32 - 1}.")
    texts = source.get("text")
    texts = (
        [
            _typed(t, str, f"{path}: text")
            for t in _some([texts] if isinstance(texts, str) else texts, f"{path}: text")
        ]
        if texts
        else []
    )
    work = [
        one
        for number, item in enumerate(_some(source["operations"], f"{path}: operations"), 1)
        for one in _work(path, f"{path}, operation {number}", item, operations)
    ]
    return Plan(
        **{"title": path.stem, **plain},
        models={m: _model(path, m) for m in models},
        seeds=seeds,
        texts=[_beside(path, t) for t in texts] or [None],
        work=work,
    )


def expand(plan: Plan) -> list[Task]:
    """The tasks of a plan, each once, in its order: model, text, operation, seed. Weights are
    hashed, texts tokenised, no model loaded.

    Raises: BadInput, BadCheckpoint, BadText for a model or a text that cannot be used.
    """
    found: dict[str, Task] = {}
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
                        work.inputs,
                        seed,
                    )
                    found.setdefault(task.id, task)
    return list(found.values())


def _work(path: Path, where: str, item: Any, operations: Mapping[str, Operation]) -> Iterable[Work]:
    """One item of `operations`: a name, or a mapping with `name`, `params` (fixed) and `grid`
    (lists, multiplied out).
    """
    item = {"name": item} if isinstance(item, str) else item
    if not isinstance(item, dict) or "name" not in item:
        raise BadInput(
            f"{where}, should be a name, or a mapping with name, params and grid; it is {item!r}."
        )
    for key in item:
        if key not in ("name", "params", "grid"):
            raise BadInput(
                f"{where}: {key} is not a key of an"
                f" operation{_nearest(key, ('name', 'params', 'grid'))}"
            )
    name = str(item["name"])
    if name not in operations:
        raise BadInput(f"{where}: {name} is not an operation{_nearest(name, operations)}")
    settings = operations[name].settings
    fixed, grid = ({} if item.get(k) is None else item[k] for k in ("params", "grid"))
    types = get_type_hints(settings)
    for key, given in (("params", fixed), ("grid", grid)):
        if not isinstance(given, dict):
            raise BadInput(
                f"{where} ({name}): {key} should be a mapping of parameters; it is {given!r}."
            )
        for parameter in given:
            if parameter not in types:
                raise BadInput(
                    f"{where}: {parameter} is not a parameter of {name}{_nearest(parameter, types)}"
                )
    if both := sorted(set(fixed) & set(grid)):
        raise BadInput(
            f"{where} ({name}): {both[0]} is in params and in grid; keep one of the two."
        )
    axes = {
        key: _some(values, f"{where} ({name}): the grid's {key}") for key, values in grid.items()
    }
    for values in product(*axes.values()):
        given = {**fixed, **dict(zip(axes, values, strict=True))}
        typed = {
            key: _typed(value, types[key], f"{where} ({name}): {key}")
            for key, value in given.items()
        }
        try:
            chosen = settings(**typed)
        except TypeError as error:
            missing = [
                f.name
                for f in fields(settings)
                if f.name not in typed and f.default is f.default_factory
            ]
            raise BadInput(
                f"{where} ({name}) needs the parameter {', '.join(missing) or str(error)}."
            ) from error
        except BadInput as error:
            raise BadInput(f"{where} ({name}): {error}") from error
        chosen, inputs = _with_files(path, where, chosen)
        yield Work(
            name,
            {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(chosen).items()},
            inputs,
            operations[name].seeded,
        )


def _with_files(path: Path, where: str, settings: Any) -> tuple[Any, dict[str, str]]:
    """The settings with whole paths, and the digest of each file that they name."""
    inputs: dict[str, str] = {}
    for one in fields(settings):
        value = getattr(settings, one.name)
        if not one.metadata.get("file") or not value:
            continue
        files = [_beside(path, f) for f in ([value] if isinstance(value, str) else value)]
        try:
            inputs[one.name] = ",".join(
                hashlib.sha256(Path(f).read_bytes()).hexdigest() for f in files
            )
        except OSError as error:
            raise BadInput(
                f"{where}: the file {error.filename} of {one.name} cannot be read:"
                f" {error.strerror}."
            ) from error
        settings = replace(
            settings, **{one.name: files[0] if isinstance(value, str) else tuple(files)}
        )
    return settings, inputs


def _beside(path: Path, name: str) -> str:
    """A file that the plan names, as a whole path: beside the plan, or else in the working
    directory.
    """
    beside = path.parent / name
    return str((beside if beside.exists() else Path(name)).resolve())


def _model(path: Path, name: str) -> str:
    """The folder that a model's name stands for, as a whole path; `patient` and a Hub id as they
    are.
    """
    if name == "patient":
        return name
    whole = _beside(path, name)
    return whole if Path(whole).exists() else name


def _some(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise BadInput(
            f"{what} should be a list with at least one item; it is {value!r}, so there would be"
            " nothing to run."
        )
    return value


def _typed(value: Any, kind: Any, what: str) -> Any:
    """The value as `kind` (a plain type, `X | None`, or tuple[X, ...] for a list).

    Raises: BadInput.
    """
    options = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    for option in options:
        if get_origin(option) is tuple and isinstance(value, list):
            return tuple(_typed(v, get_args(option)[0], what) for v in value)
        if option is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if option in (str, int, bool, NoneType) and type(value) is option:
            return value
    names = " or ".join("a list" if get_origin(o) is tuple else _WORDS[o] for o in options)
    raise BadInput(f"{what} is {value!r}; it should be {names}.")


_WORDS: dict[Any, str] = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    NoneType: "null",
}


def _nearest(name: Any, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown name."""
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=1)
    return (
        f"; did you mean {near[0]}? It can be {', '.join(names)}."
        if near
        else f"; it can be {', '.join(names)}."
    )
