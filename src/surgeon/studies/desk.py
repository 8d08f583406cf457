"""What every study works at, also one that opens no model; light to import."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from ..progress import Tell, silent
from ..result import CorpusRecord, Provenance
from ..settings import values_of


class Desk:
    """Where a study works that opens no model, or opens its own: it tells where it is, and says how
    its results were made. A `Lab` is one with a model.

    opened_by: the name that a model was opened by; None where there is none.
    """

    def __init__(self, opened_by: str | None = None) -> None:
        self.opened_by = opened_by
        self.tell: Tell = silent

    @property
    def name(self) -> str:
        return ""

    @property
    def fingerprint(self) -> str | None:
        return None

    def listen(self, tell: Tell) -> None:
        """Have all that follows tell where it is."""
        self.tell = tell

    def provenance(
        self,
        settings: Any,
        corpus: CorpusRecord | None = None,
        model: str | None = None,
        fingerprint: str | None = None,
    ) -> Provenance:
        """Of what a result with these settings is. model, fingerprint: of which, where none is
        open.
        """
        values = values_of(settings)
        return Provenance(
            model=self.name if model is None else model,
            fingerprint=fingerprint or self.fingerprint,
            corpus=corpus,
            settings=values,
            seed=values.get("seed"),
            surgeon=version("weight-surgeon"),
        )
