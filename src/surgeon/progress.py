"""How long work tells where it is: a function of what is done, how far, and of how much."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # importing rich draws a random number, and importing Surgeon should not
    from rich.console import Console
    from rich.progress import TaskID

Tell = Callable[[str, int, int], None]  # what is being done, steps done, of how many


def silent(what: str, done: int, total: int) -> None:
    """Tell nobody."""


@contextmanager
def progress_bar(console: Console) -> Iterator[Tell]:
    """A line for each kind of work, gone at the end; nothing where the console is no terminal."""
    if not (console.is_terminal or console.is_jupyter):
        yield silent
        return
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        lines: dict[str, TaskID] = {}

        def tell(what: str, done: int, total: int) -> None:
            if what not in lines:
                lines[what] = bar.add_task(what, total=total)
            bar.update(lines[what], completed=done, total=total)

        yield tell
