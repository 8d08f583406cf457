"""The command line: commands made from the registry of studies, and a few of their own.

Only the command that runs is imported, so that a list of commands, or a usage error, costs little.
Here too: how errors become one sentence and an exit status.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from difflib import get_close_matches

import click

from ..errors import SurgeonError
from ..studies.registry import FAMILIES, STUDIES

INTERRUPTED = 1
# commands that are no studies, by their module here
OTHERS = {"report": ("report", "Make one self-contained page of a run folder.")}
ORDER = (
    *("demo", "sites", "find", "verify", "ablate", "repair", "measure", "explain", "trace", "edit"),
    *("quantize", "audit", "cells", "sweep", "run", "report", "apply", "undo", "export", "index"),
)


class Surgeon(click.Group):
    """The group of all commands, each imported when it is asked for."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(ORDER)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name in STUDIES:
            from .studies import command_of

            return command_of(STUDIES[name])
        if name in FAMILIES:
            from .studies import family_of

            return family_of(name, FAMILIES[name])
        if name not in OTHERS:
            return None
        module, _ = OTHERS[name]
        command: click.Command = importlib.import_module(f".{module}", __package__).command
        return command

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        summaries: dict[str, str] = {name: study.summary for name, study in STUDIES.items()}
        summaries |= FAMILIES | {name: summary for name, (_, summary) in OTHERS.items()}
        with formatter.section("Commands"):
            formatter.write_dl([(name, summaries[name]) for name in ORDER])

    def resolve_command(
        self, context: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        # a verb of two words, like `sweep table`; a model of the name `table` is ./table
        both = " ".join(args[:2])
        if both in STUDIES:
            return both, self.get_command(context, both), args[2:]
        if args[0] not in ORDER and not args[0].startswith("-"):
            near = get_close_matches(args[0], ORDER, n=1)
            guess = f" Did you mean {near[0]}?" if near else " `surgeon --help` lists them."
            context.fail(f"No such command {args[0]!r}.{guess}")
        return super().resolve_command(context, args)


@click.group(
    cls=Surgeon,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="weight-surgeon", prog_name="surgeon")
def surgeon() -> None:
    """Weight surgery for transformer language models.

    MODEL is `patient` (the embedded model), a local folder, or a Hub id, optionally @revision.
    There is no network unless it is a Hub id.
    """


def main() -> None:
    """Run the command line. Exit status: 0 done, 1 failed, 2 bad input or usage, 3 refused."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command and return its exit status; errors are said in a sentence on stderr."""
    try:
        # the arguments go along as the context's object: every result records its command
        surgeon.main(arguments, prog_name="surgeon", standalone_mode=False, obj=tuple(arguments))
    except SurgeonError as error:
        return _say(error.said(_spelling(error)), error.exit_status)
    except click.UsageError as error:
        error.show()
        return error.exit_code
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except (click.Abort, KeyboardInterrupt) as stop:
        # click turns one into the other; what was interrupted may say what it leaves behind
        left = str(stop.__cause__ or stop) or "nothing was written."
        return _say(f"interrupted; {left}", INTERRUPTED)
    except BrokenPipeError:
        return 0
    except OSError as error:
        return _say(f"{error.filename or 'a file'} cannot be used: {error.strerror or error}.", 1)
    except Exception as error:
        if not _out_of_memory(error):
            raise
        sentence = "out of memory; try fewer --windows, a smaller --window, or --dtype bfloat16."
        return _say(sentence, 1)
    return 0


def _spelling(error: SurgeonError) -> Callable[[str], str]:
    """How the command that failed spells its settings."""
    return lambda name: error.spelled.get(name, "--" + name.replace("_", "-"))


def _out_of_memory(error: Exception) -> bool:
    # torch is not imported for this: if it was not, this error is not torch's
    torch = sys.modules.get("torch")
    kinds = (MemoryError,) if torch is None else (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds)


def _say(message: str, status: int) -> int:
    click.echo(f"surgeon: {message}", err=True)
    return status
