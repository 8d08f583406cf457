"""One task of a sweep: an operation on a model and a text, and the id that its content gives it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:  # a table of results needs no model
    import transformers

    from ..corpus import Corpus

FORMAT = 2  # raised when the same task gives other rows than before, within one release
TEXT_SETTINGS = ("text", "window", "windows")
Row = dict[str, Any]  # column to text, number, truth value or None


@runtime_checkable
class Table(Protocol):
    """What an operation gives: a `Result` with rows, or several as one."""

    def rows(self) -> list[Row]: ...


@runtime_checkable
class Operation(Protocol):
    """What a plan can name: a verb.

    settings: the class of its settings, which are the operation's parameters. seeded: whether its
    seed changes anything; if not, it runs once, whatever the seeds. `run(lab, given)` gives a
    result that is a table, and leaves the model as it found it.
    """

    @property
    def settings(self) -> type[Any]: ...

    @property
    def seeded(self) -> bool: ...

    def run(self, lab: Any, given: Mapping[str, Any]) -> Table: ...


@dataclass(frozen=True)
class Text:
    """The text of a task. path: a file; None for the patient's held-out text."""

    path: str | None = None
    window: int = 256
    windows: int | None = None
    bos: str = "auto"

    @property
    def name(self) -> str:
        return "patient-heldout" if self.path is None else Path(self.path).name

    def read(self, tokenizer: transformers.PreTrainedTokenizerBase) -> Corpus:
        """Raises: BadText, BadInput."""
        from ..corpus import load_corpus, read_text
        from ..patients import heldout_text

        source = heldout_text() if self.path is None else read_text(self.path)
        return load_corpus(tokenizer, source, self.name, self.window, self.windows, self.bos)


@dataclass(frozen=True)
class Task:
    """One task. Whatever decides its result is in the id, and nothing else: not where the files
    lie, nor the device.

    model: as the plan names it; where: the folder or Hub id to load. params: every setting of the
    operation, but for its text and its seed; named: those that the plan says. inputs: digests of
    the files that `params` names. seed: None for an operation without randomness.
    """

    model: str
    where: str
    dtype: str
    device: str
    fingerprint: str
    text: Text
    corpus: str
    operation: str
    params: dict[str, Any]
    named: list[str]
    inputs: dict[str, str]
    seed: int | None

    @property
    def id(self) -> str:
        content = {
            "format": FORMAT,
            "release": version("weight-surgeon"),
            "model": self.fingerprint,
            "dtype": self.dtype,
            "corpus": self.corpus,
            "operation": self.operation,
            "params": {**self.params, **self.inputs},
            "seed": self.seed,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:20]

    @property
    def says(self) -> str:
        """The task in a few words, for people."""
        settings = ", ".join(f"{name} {self.params[name]}" for name in self.named)
        seed = "" if self.seed is None else f", seed {self.seed}"
        return f"{self.operation}({settings}) on {self.model}{seed}"

    def given(self, known: Collection[str]) -> dict[str, Any]:
        """What an operation with these settings is called with."""
        values = {
            "text": self.text.path,
            "window": self.text.window,
            "windows": self.text.windows,
            "bos": self.text.bos,
            "seed": self.seed or 0,
        }
        return {**self.params, **{name: values[name] for name in shared(known)}}

    def to_json(self) -> dict[str, Any]:
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "text"}
        return {"id": self.id, **own, "text": dict(vars(self.text))}

    @classmethod
    def from_json(cls, source: dict[str, Any]) -> Task:
        own = {k: v for k, v in source.items() if k not in ("id", "text")}
        return cls(**own, text=Text(**source["text"]))

    def head(self) -> Row:
        """The columns that every result has."""
        return {
            "task": self.id,
            "model": self.model,
            "dtype": self.dtype,
            "text": self.text.name,
            "operation": self.operation,
            "seed": self.seed,
        }

    def columns(self) -> Row:
        """What every row of the task's result begins with."""
        return {**self.head(), **{name: plain(value) for name, value in self.params.items()}}


def shared(known: Collection[str]) -> set[str]:
    """Of an operation's settings those that a plan says once for all: the seed, and what is of the
    text, where the operation reads one.
    """
    of_text = TEXT_SETTINGS if "text" in known else ()
    return {"seed", "bos", *of_text} & set(known)


def plain(value: Any) -> Any:
    """A value as a column can hold it: lists and mappings as JSON, addresses as texts."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple | dict):
        return json.dumps(value, default=str)
    return str(value)


def corpus_digest(corpus: Corpus) -> str:
    """SHA-256 of the tokens, as they are cut into windows."""
    shape = ",".join(map(str, corpus.windows.shape))
    return hashlib.sha256(
        f"{shape}:{corpus.bos}:".encode() + corpus.windows.numpy().astype("<i8").tobytes()
    ).hexdigest()
