"""What benchmarks of MODEL[=TEXT] have in common: the model, its text and its critical entries; and
the lines of a Markdown table.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from surgeon.anatomy import Anatomy, Entry, load_model
from surgeon.corpus import Corpus, load_corpus, read_text
from surgeon.find import find
from surgeon.patients import heldout_text

WINDOW = 256


@dataclass(frozen=True)
class Model:
    """critical: the entries of the vital sets that `find` finds on all of the text."""

    name: str
    anatomy: Anatomy
    corpus: Corpus
    critical: list[Entry]


def models_asked_for(about: str | None, windows: int) -> Iterator[Model]:
    """The models that the command line names, one after the other; patient where it names none."""
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=["patient"], metavar="MODEL[=TEXT]")
    for each in parser.parse_args().models:
        name, _, text = each.partition("=")
        loaded = load_model(name)
        assert loaded.tokenizer is not None
        source = read_text(text) if text else heldout_text()
        title = Path(text).name or "held-out text"
        corpus = load_corpus(loaded.tokenizer, source, title, WINDOW, windows)
        anatomy = Anatomy.of(loaded.model)
        critical = [c.entry for s in find(anatomy, corpus).sets if s.vital for c in s.entries]
        yield Model(Path(name).name, anatomy, corpus, critical)


def heading(*cells: object) -> None:
    line(*cells)
    line(*("---" for _ in cells))


def line(*cells: object) -> None:
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)
