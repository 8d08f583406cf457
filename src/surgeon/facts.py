"""Facts in files: requests to edit and facts to trace, one JSON object a line, or as CounterFact
and the known-1000 list have them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .corpus import read_text
from .errors import BadInput
from .subject import SLOT


@dataclass(frozen=True)
class Fact:
    """One fact: a prompt with `{}` where the subject stands, and what follows it.

    target: what a model is to say after an edit; true: what it says before, if known. paraphrases:
    other prompts about the same subject, whole; neighbours: prompts about other subjects that share
    the true answer, and what follows them if it is not that answer; generation: prompts to continue
    freely.
    """

    prompt: str
    subject: str
    target: str | None = None
    true: str | None = None
    relation: str | None = None
    paraphrases: tuple[str, ...] = ()
    neighbours: tuple[tuple[str, str | None], ...] = ()
    generation: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.prompt.count(SLOT) != 1:
            raise BadInput(
                f"the prompt {self.prompt!r} should hold {{}} once, where the subject"
                f" {self.subject!r} stands."
            )
        if not self.subject.strip():
            raise BadInput(
                f"the subject of {self.prompt!r} is empty; give the words that the fact is about."
            )

    @property
    def text(self) -> str:
        return self.prompt.replace(SLOT, self.subject)


def read_facts(path: str | Path) -> list[Fact]:
    """The facts of a file: JSON lines with `prompt`, `subject` and maybe `target`, `true`,
    `paraphrases`, `neighbours`, `generation`; a JSON list of the same; CounterFact's list
    (`requested_rewrite`); or the known-1000 list (`template`, `attribute`).

    A neighbour is a prompt, or {"prompt", "answer"}.
    Raises: BadText for a file that cannot be read; BadInput naming the line or record that is not a
    fact.
    """
    text = read_text(path)
    if text.lstrip().startswith("["):
        try:
            records = json.loads(text)
        except ValueError as error:
            raise BadInput(f"{path} begins like a JSON list and is none: {error}.") from error
        numbered = [(f"record {i}", r) for i, r in enumerate(records, 1)]
    else:
        numbered = []
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                try:
                    numbered.append((f"line {number}", json.loads(line)))
                except ValueError as error:
                    raise BadInput(
                        f"{path}, line {number}, is not JSON: {error}; write one JSON object a"
                        " line."
                    ) from error
    if not numbered:
        raise BadInput(f"{path} holds no fact.")
    return [_fact(path, where, record) for where, record in numbered]


def _fact(path: str | Path, where: str, record: Any) -> Fact:
    if not isinstance(record, dict):
        raise BadInput(
            f"{path}, {where}, is {type(record).__name__}, where an object with `prompt` and"
            " `subject` is needed."
        )
    read: Callable[[dict[str, Any]], Fact]
    if "requested_rewrite" in record:
        read = _counterfact
    elif "template" in record and "attribute" in record:
        read = _known
    else:
        read = _plain
    try:
        return read(record)
    except KeyError as error:
        raise BadInput(
            f"{path}, {where}, lacks {error}; a fact needs at least `prompt` with {{}} and"
            " `subject`."
        ) from error
    except (TypeError, AttributeError) as error:
        raise BadInput(f"{path}, {where}, has a field of the wrong kind ({error}).") from error
    except BadInput as error:
        raise BadInput(f"{path}, {where}: {error}") from error


def _plain(record: dict[str, Any]) -> Fact:
    def text(name: str) -> str | None:
        value = record.get(name)
        if value is not None and not isinstance(value, str):
            raise TypeError(f"{name} is {value!r}, which is not text")
        return value

    neighbours = [n if isinstance(n, dict) else {"prompt": n} for n in record.get("neighbours", ())]
    return Fact(
        _text(record["prompt"]),
        _text(record["subject"]),
        text("target"),
        text("true"),
        text("relation"),
        tuple(_text(p) for p in record.get("paraphrases", ())),
        tuple((_text(n["prompt"]), n.get("answer")) for n in neighbours),
        tuple(_text(p) for p in record.get("generation", ())),
    )


def _counterfact(record: dict[str, Any]) -> Fact:
    """Source: Meng et al. 2022, arXiv:2202.05262, appendix; the fields of counterfact.json."""
    rewrite = record["requested_rewrite"]
    return Fact(
        _text(rewrite["prompt"]),
        _text(rewrite["subject"]),
        _text(rewrite["target_new"]["str"]),
        _text(rewrite["target_true"]["str"]),
        rewrite.get("relation_id"),
        tuple(_text(p) for p in record.get("paraphrase_prompts", ())),
        tuple((_text(p), None) for p in record.get("neighborhood_prompts", ())),
        tuple(_text(p) for p in record.get("generation_prompts", ())),
    )


def _known(record: dict[str, Any]) -> Fact:
    """The list's templates stop short of their prompts' last word here and there; the prompt is
    what was asked.
    """
    prompt, subject = _text(record.get("prompt", record["template"])), _text(record["subject"])
    template = prompt if SLOT in prompt else prompt.replace(subject, SLOT, 1)
    return Fact(template, subject, None, _text(record["attribute"]), record.get("relation_id"))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not text")
    return value
