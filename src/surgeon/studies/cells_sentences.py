"""`cells sentences`: cells as text for a language model of cells."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .. import files
from ..cells.data import DataSettings, cell_sentences
from ..result import Result, result
from ..settings import setting
from .desk import Desk


@dataclass(frozen=True, kw_only=True)
class Settings(DataSettings):
    """Write cells as sentences of gene names, text for a language model of cells: `surgeon find
    MODEL --text FILE`.
    """

    output: str = setting(help="text file to write, one cell a line", metavar="FILE", short="-o")
    genes: int = setting(100, "genes of each cell, highest expressed first", low=1)
    seed: int = setting(0, "seed of the order of ties", low=0, high=2**32 - 1)


@result("cells sentences")
class CellSentences(Result):
    """A text that was written: a line for each of so many cells, of at most so many genes.

    source: which expression of the data. first: the first line.
    """

    source: str
    cells: int
    genes: int
    first: str
    output: str


def run(desk: Desk, settings: Settings) -> CellSentences:
    values = settings.read()
    lines = cell_sentences(values, settings.genes, settings.seed)
    files.write_text(Path(settings.output), "\n".join(lines) + "\n")
    return CellSentences(
        values.source,
        len(lines),
        settings.genes,
        lines[0],
        settings.output,
        provenance=desk.provenance(settings),
    )
