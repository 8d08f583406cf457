"""docs/commands.md and docs/results.md are what the registry says; these tests write them."""

from __future__ import annotations

from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import click

from surgeon.cli import OTHERS
from surgeon.cli import surgeon as group
from surgeon.cli.options import flag
from surgeon.result import Provenance, attached_files, derived
from surgeon.settings import Setting, settings_of
from surgeon.studies.registry import RESULTS, STUDIES, result_class

DOCS = Path(__file__).parents[2] / "docs"
COMMANDS = """# Commands and their settings

Written by `tests/studies/test_documents.py` from the registry of studies. A setting is an option of
the command, an argument of the method of a lab and a key of a YAML plan, by the same name; where
the option is spelled otherwise, both stand here. Every command that opens a model also takes
`--dtype` and `--device`, and `find` and `quantize` take `--stream`. `--json` prints one JSON
document, `--folder DIR` writes a run folder.
"""
RESULTS_HEAD = """# Results

Written by `tests/studies/test_documents.py`. Every document also has `kind`, `version` and
PROVENANCE. Damage is in nats per token. Fields in italics are computed from others.
"""


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def default(one: Setting) -> str:
    if one.default is MISSING:
        return "required"
    return "" if one.default in (None, (), "") else cell(f"`{one.default}`")


def named(one: Setting, positional: tuple[str, ...]) -> str:
    if one.name in positional:
        return f"`{one.name.upper()}`"
    option = flag(one)
    spelled = f"`{option}`"
    if one.default is True:
        spelled += f", `--{one.declaration.off or f'no-{option[2:]}'}`"
    return spelled if option[2:].replace("-", "_") == one.name else f"{spelled} (`{one.name}`)"


def meaning(one: Setting) -> str:
    choices = one.declaration.choices
    offered = f" ({', '.join(choices)})" if choices else ""
    return cell(one.declaration.help.replace("‹", "`").replace("›", "`") + offered)


def commands() -> str:
    parts = [COMMANDS]
    for study in STUDIES.values():
        parts.append(f"## surgeon {study.name}\n\n{study.summary}\n")
        rows = [
            f"| {named(one, study.positional)} | {default(one)} | {meaning(one)} |"
            for one in settings_of(study.settings)
        ]
        if rows:
            parts.append("\n".join(["| setting | default | meaning |", "|---|---|---|", *rows, ""]))
    return "\n".join(parts)


def others() -> str:
    """The commands that are no studies, from what click knows of them."""
    parts = []
    for name in OTHERS:
        command = group.get_command(click.Context(group), name)
        assert command is not None
        parts.append(f"## surgeon {name}\n\n{command.get_short_help_str(200)}\n")
        rows = [
            f"| {', '.join(f'`{word}`' for word in (*option.opts, *option.secondary_opts))} |"
            f" {cell(option.help or '')} |"
            for option in command.params
            if isinstance(option, click.Option)
        ]
        parts.append("\n".join(["| option | meaning |", "|---|---|", *rows, ""]))
    return "\n".join(parts)


def shape(kind: type) -> list[tuple[str, str]]:
    """The fields of a class in JSON, with their types in short."""
    hints = get_type_hints(kind)
    own = [one.name for one in fields(kind) if one.name != "provenance"]
    kept = attached_files(kind)
    shown = [(name, brief(hints[name])) for name in own if name not in kept]
    computed = [n for base in kind.__mro__ for n, v in vars(base).items() if type(v) is derived]
    return shown + [(f"*{name}*", "") for name in dict.fromkeys(computed)]


def brief(hint: Any) -> str:
    return cell(str(getattr(hint, "__name__", hint)) if not get_args(hint) else short(str(hint)))


def short(text: str) -> str:
    words = [word.rpartition(".")[2] for word in text.replace("[", " [ ").split()]
    return " ".join(words).replace(" [ ", "[").replace("typing.", "")


def records(kind: type, known: dict[str, type]) -> None:
    """The dataclasses that a class holds, by name."""
    for hint in get_type_hints(kind).values():
        for part in [hint, *get_args(hint), *(b for a in get_args(hint) for b in get_args(a))]:
            is_record = isinstance(part, type) and is_dataclass(part)
            ours = is_record and part.__module__.startswith("surgeon.") and part is not Provenance
            if ours and part.__name__ not in known and not hasattr(part, "parse"):
                known[part.__name__] = part
                records(part, known)


def results() -> str:
    about = ", ".join(f"`{one.name}`" for one in fields(Provenance))
    parts = [RESULTS_HEAD.replace("PROVENANCE", about)]
    held: dict[str, type] = {}
    for kind in RESULTS:
        cls = result_class(kind)
        records(cls, held)
        parts.append(f"## {kind}\n\n`{cls.__name__}`, version {cls.version}\n")
        parts.append(table(cls))
    parts.append("# Their parts\n")
    whole = {result_class(kind).__name__ for kind in RESULTS} | {"Patch"}
    for name in sorted(set(held) - whole):
        parts.append(f"## {name}\n")
        parts.append(table(held[name]))
    return "\n".join(parts)


def table(kind: type) -> str:
    rows = [f"| {name} | {type_} |" for name, type_ in shape(kind)]
    return "\n".join(["| field | type |", "|---|---|", *rows, ""])


def check(name: str, text: str) -> None:
    path = DOCS / name
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    path.write_text(text, encoding="utf-8")
    assert before == text, f"docs/{name} was out of date and has been written anew; look at it"


def test_every_setting_of_every_command_is_written_down():
    check("commands.md", f"{commands()}\n{others()}")


def test_every_kind_of_result_is_written_down():
    check("results.md", results())
