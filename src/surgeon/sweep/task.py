"""One task of a sweep: an operation on a model and a text, and the id that its content gives it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from ..anatomy import Anatomy, Loaded
from ..corpus import DEFAULT_WINDOW, Corpus, load_corpus, read_text
from ..patients import heldout_text

FORMAT = 1  # raised when the same task gives other rows than before, within one release
T = TypeVar("T")
Row = dict[str, Any]  # column to text, number, truth value or None


@dataclass(frozen=True)
class Text:
    """The text of a task. path: a file; None for the patient's held-out text."""

    path: str | None = None
    window: int = DEFAULT_WINDOW
    windows: int | None = None
    bos: str = "auto"

    @property
    def name(self) -> str:
        return "patient-heldout" if self.path is None else Path(self.path).name

    def read(self, tokenizer: PreTrainedTokenizerBase) -> Corpus:
        """Raises: BadText, BadInput."""
        source = heldout_text() if self.path is None else read_text(self.path)
        return load_corpus(tokenizer, source, self.name, self.window, self.windows, self.bos)


@dataclass(frozen=True)
class Task:
    """One task. Whatever decides its result is in the id, and nothing else: not where the files
    lie, nor the device.

    model: as the plan names it; where: the folder or Hub id to load. params: every setting of the
    operation. inputs: digests of the files that `params` names. seed: None for an operation without
    randomness.
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
        settings = ", ".join(f"{k} {v}" for k, v in self.params.items() if v is not None)
        return f"{self.operation}({settings}) on {self.model}" + (
            "" if self.seed is None else f", seed {self.seed}"
        )

    def to_json(self) -> dict[str, Any]:
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "text"}
        return {"id": self.id, **own, "text": dict(vars(self.text))}

    @classmethod
    def from_json(cls, source: dict[str, Any]) -> Task:
        own = {k: v for k, v in source.items() if k not in ("id", "text")}
        return cls(**own, text=Text(**source["text"]))

    def columns(self) -> Row:
        """What every row of the task's result begins with."""
        return {
            "task": self.id,
            "model": self.model,
            "dtype": self.dtype,
            "text": self.text.name,
            "operation": self.operation,
            "seed": self.seed,
            **{
                k: v if v is None or isinstance(v, str | int | float) else json.dumps(v)
                for k, v in self.params.items()
            },
        }


@dataclass
class Bench:
    """What an operation works on: a model, its map, a text; and what was worked out on them
    before.
    """

    loaded: Loaded
    anatomy: Anatomy
    corpus: Corpus
    bos: str
    kept: dict[Hashable, Any] = field(default_factory=dict)

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """`make()`, kept for the tasks that follow on the same model and text."""
        if key not in self.kept:
            self.kept[key] = make()
        found: T = self.kept[key]
        return found


@dataclass(frozen=True)
class Operation:
    """What a plan can name. settings: a frozen dataclass, whose fields are the operation's
    parameters.

    `run(bench, settings, seed)` gives at least one flat row, and leaves the model as it found it. A
    field with metadata {"file": True} names a file (or several), whose content counts. seeded:
    whether the seed changes anything; if not, the operation runs once, without.
    """

    settings: type[Any]
    run: Callable[[Bench, Any, int], list[Row]]
    seeded: bool = True


def corpus_digest(corpus: Corpus) -> str:
    """SHA-256 of the tokens, as they are cut into windows."""
    shape = ",".join(map(str, corpus.windows.shape))
    return hashlib.sha256(
        f"{shape}:{corpus.bos}:".encode() + corpus.windows.numpy().astype("<i8").tobytes()
    ).hexdigest()
