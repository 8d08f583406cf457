"""`index verify`: whether a model holds the published weights."""

from __future__ import annotations

from dataclasses import dataclass

from ..find.index import Check, verify_published
from ..result import Result, result
from ..settings import setting
from .desk import Desk


@dataclass(frozen=True)
class Settings:
    """Compare the published values with MODEL: a folder, or a Hub id, optionally @revision.

    Only the matrices concerned are read. From the Hub they are fetched by byte range, and kept in
    its cache.
    """

    model: str = setting(help="a folder or a Hub id", metavar="MODEL")
    as_name: str | None = setting(
        None,
        "the model this one is a copy of: a Hub id of the list, or its last part",
        metavar="NAME",
        spelled="as",
    )


@result("index verify")
class IndexCheck(Result):
    """Each published coordinate of the model, beside what the model holds."""

    checks: list[Check]

    def rows(self) -> list[dict[str, object]]:
        return [{"entry": one.entry, **vars(one)} for one in self.checks]


def run(desk: Desk, settings: Settings) -> IndexCheck:
    checks = verify_published(settings.model, as_name=settings.as_name, tell=desk.tell)
    return IndexCheck(checks, provenance=desk.provenance(settings, model=settings.model))
