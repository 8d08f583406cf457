"""`index`: the published coordinates."""

from __future__ import annotations

from dataclasses import dataclass

from ..find.index import Published, about, published
from ..result import Result, result
from .desk import Desk


@dataclass(frozen=True)
class Settings:
    """List the published super weights, each with its source and evidence."""


@result("index")
class Index(Result):
    """The list, and what it is in two sentences."""

    about: str
    records: list[Published]

    def rows(self) -> list[dict[str, object]]:
        return [{"entry": one.entry, **vars(one)} for one in self.records]


def run(desk: Desk, settings: Settings) -> Index:
    return Index(about(), published(), provenance=desk.provenance(settings))
