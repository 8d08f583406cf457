"""What a section of the report is made of, and how numbers are written in sentences."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .charts import Chart

Cell = str | int | float | None


@dataclass(frozen=True)
class Table:
    """Numbers stay numbers, so that they stand right and are written alike.

    `of`: how many rows there are, where not all are here.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    of: int = 0


@dataclass(frozen=True)
class Piece:
    """A stretch of a text, and whether it differs from the text it is compared with."""

    text: str
    differs: bool


@dataclass(frozen=True)
class Generations:
    """One prompt and what each state wrote after it."""

    prompt: str
    texts: Sequence[tuple[str, Sequence[Piece]]]


@dataclass(frozen=True)
class Picture:
    """One section. kind: what it shows. headline: what is seen, computed from the data. about: how
    to read it, with units.

    shown: a table that is the picture; table: the data behind it, folded. file, command: where the
    result lies and what measures it again; the page fills them in.
    """

    kind: str
    headline: str
    about: str
    chart: Chart | None = None
    shown: Table | None = None
    table: Table | None = None
    generations: Sequence[Generations] = field(default=())
    file: str = ""
    command: str = ""


@dataclass(frozen=True)
class Claim:
    """A number of the headline, and beneath it the control it stands beside. kind: its colour."""

    kind: str
    value: str
    what: str
    control: str


@dataclass(frozen=True)
class Headline:
    """The sentence at the top of a page, as one result would have it, and its numbers."""

    sentence: str
    claims: Sequence[Claim] = ()


def model_name(model: str) -> str:
    """A model as a headline has it: a folder by its own name, not by where it lies."""
    return Path(model).name or model if model.startswith(("/", ".", "~")) else model


def compare(prompt: str, texts: Sequence[tuple[str, str]]) -> Generations:
    """The texts of each state, words that differ from the first state's marked."""
    first = _words(texts[0][1])
    return Generations(prompt, [(state, _pieces(first, _words(text))) for state, text in texts])


def _words(text: str) -> list[str]:
    return re.findall(r"\S+\s*", " ".join(text.split()))


def _pieces(first: list[str], other: list[str]) -> list[Piece]:
    found = []
    for tag, _, _, start, end in difflib.SequenceMatcher(
        None, first, other, autojunk=False
    ).get_opcodes():
        if start < end:
            found.append(Piece("".join(other[start:end]), tag != "equal"))
    return found


def nats(value: float) -> str:
    """A difference, in nats: two figures more than its size needs."""
    return f"{value:+.3f}" if abs(value) >= 0.1 else f"{value:+.4f}"


def percent(share: float) -> str:
    """With as many decimals as it takes to tell it from 0 and 100%."""
    size = abs(share)
    decimals = (
        0 if 0.0995 <= size < 0.99 or size >= 1.005 or share in (0, 1) else 1 if size < 0.999 else 2
    )
    return f"{share:.{decimals}%}"


def many(n: int, what: str) -> str:
    return (
        f"{n:,} {what}"
        if n == 1
        else f"{n:,} {what.removesuffix('y') + 'ies' if what.endswith('y') else what + 's'}"
    )
