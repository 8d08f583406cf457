"""The consoles that text goes to, and tables that are never cut."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

# without emoji: what a model or a user wrote is printed as it is, also where it holds :smile:
out = Console(highlight=False, soft_wrap=True, emoji=False)
err = Console(stderr=True, highlight=False, emoji=False)


def print_table(table: Table) -> None:
    """A table as wide as what it holds: an address that is cut at the width of a terminal, or of
    none, cannot be copied.
    """
    Console(highlight=False, soft_wrap=True, emoji=False, width=100_000).print(table)


def shown(text: str) -> str:
    """Text of a model or a user as it may be printed: no markup, and nothing that a terminal would
    obey.
    """
    return escape(one_line(text))


def one_line(text: str) -> str:
    """Text with what is not printable written out, so that it stays on its line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
