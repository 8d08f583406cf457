"""A setting of an operation: its default, and what it does."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def setting(default: Any, help: str) -> Any:
    """A field of a settings dataclass."""
    return field(default=default, metadata={"help": help})
