"""A result as annotations of a GitHub workflow, for kinds that judge something.

A kind that does is listed here with the module of `show.text` and the function in it that gives its
lines: each a level and a sentence.
"""

from __future__ import annotations

import importlib
from typing import Literal

from ..result import Result

Level = Literal["notice", "warning", "error"]
ANNOTATED = {"audit": "audit:annotate_audit"}


def annotate(result: Result) -> str:
    """One workflow command a line. Raises: KeyError for a kind that has none."""
    module, _, function = ANNOTATED[result.kind].partition(":")
    lines = getattr(importlib.import_module(f".text.{module}", __package__), function)(result)
    title = _escaped(f"surgeon {result.kind}", is_property=True)
    return "\n".join(f"::{level} title={title}::{_escaped(text)}" for level, text in lines)


def _escaped(text: str, is_property: bool = False) -> str:
    """As GitHub's own toolkit does, so that neither a path nor a name can begin a command of its
    own.
    """
    text = text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    return text.replace(":", "%3A").replace(",", "%2C") if is_property else text
