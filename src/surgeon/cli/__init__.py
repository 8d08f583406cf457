"""The command line: one file a verb; here the group, and how errors become one sentence and an exit
status.
"""

from __future__ import annotations

import sys

import click
import torch

from ..errors import SurgeonError
from . import (
    ablate,
    apply,
    audit,
    cells,
    demo,
    edit,
    explain,
    export,
    find,
    index,
    measure,
    quantize,
    recipes,
    repair,
    report,
    sites,
    sweep,
    trace,
    undo,
    verify,
)

INTERRUPTED = 1


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="weight-surgeon", prog_name="surgeon")
def surgeon() -> None:
    """Weight surgery for transformer language models.

    MODEL is `patient` (the embedded model), a local folder, or a Hub id, optionally @revision. No
    network unless it is a Hub id.
    """


for _module in (
    demo,
    sites,
    find,
    verify,
    ablate,
    repair,
    measure,
    explain,
    trace,
    edit,
    recipes,
    report,
    apply,
    undo,
    export,
    index,
    quantize,
    audit,
    sweep,
    cells,
):
    surgeon.add_command(_module.command)


def main() -> None:
    """Run the command line.

    Exit status: 0 done, 1 failed, 2 bad input or usage, 3 refused for safety.
    """
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command and return its exit status; errors are said in a sentence on stderr."""
    try:
        # the arguments go along as the context's object: every JSON document records the command
        # that made it
        surgeon.main(arguments, prog_name="surgeon", standalone_mode=False, obj=tuple(arguments))
    except SurgeonError as error:
        return _say(str(error), error.exit_status)
    except click.UsageError as error:
        error.show()
        return error.exit_code
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except (click.Abort, KeyboardInterrupt):
        return _say("interrupted; nothing was written.", INTERRUPTED)
    except (MemoryError, torch.OutOfMemoryError):
        return _say(
            "out of memory; try fewer --windows, a smaller --window, or --dtype bfloat16.", 1
        )
    except BrokenPipeError:
        return 0
    except OSError as error:
        return _say(f"{error.filename or 'a file'} cannot be used: {error.strerror or error}.", 1)
    return 0


def _say(message: str, status: int) -> int:
    click.echo(f"surgeon: {message}", err=True)
    return status
