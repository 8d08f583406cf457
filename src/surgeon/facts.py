"""Files of facts: requests to edit and facts to trace.

A file holds one JSON object a line, or is CounterFact's list or the known-1000 list as published.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from .corpus import read_text
from .errors import BadInput
from .subject import SLOT


@dataclass(frozen=True)
class Fact:
    """One fact: a prompt with `{}` where the subject stands, and what follows it.

    target: what a model is to say after an edit. true: what it says before, if known.
    paraphrases: other prompts about the same subject, whole. neighbours: prompts about other
    subjects that share the true answer, and what follows them if it is not that answer.
    generation: prompts to continue freely.
    Raises: BadInput for a prompt without just one `{}`, or an empty subject.

    >>> Fact("The capital of {} is", "France", target="Rome").text
    'The capital of France is'
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
        """The prompt with the subject in its place."""
        return self.prompt.replace(SLOT, self.subject)


def facts_of(source: Any) -> list[Fact]:
    """Facts as a caller gives them: the path of a file, one fact, or a list of facts, each a `Fact`
    or a mapping as a line of such a file.

    >>> [fact.text for fact in facts_of([{"prompt": "The capital of {} is", "subject": "Peru"}])]
    ['The capital of Peru is']

    Raises: as `read_facts`.
    """
    if isinstance(source, str | Path):
        return read_facts(source)
    several = [source] if isinstance(source, Fact | Mapping) else source
    if not isinstance(several, Sequence) or not several:
        raise BadInput(f"{source!r} names no facts; give a file, or a list of facts.")
    return [
        one if isinstance(one, Fact) else _fact("the list", f"fact {number}", one)
        for number, one in enumerate(several, 1)
    ]


def as_record(fact: Fact) -> dict[str, Any]:
    """A fact as a line of a file has it, without what was not given."""
    given = {
        one.name: getattr(fact, one.name)
        for one in fields(fact)
        if one.default is MISSING or getattr(fact, one.name) != one.default
    }
    if "neighbours" in given:
        given["neighbours"] = [{"prompt": p, "answer": a} for p, a in fact.neighbours]
    return {name: list(v) if isinstance(v, tuple) else v for name, v in given.items()}


def read_facts(path: str | Path) -> list[Fact]:
    """The facts of a file.

    The file holds JSON lines with `prompt`, `subject` and maybe `target`, `true`, `paraphrases`,
    `neighbours` and `generation`; or a JSON list of the same; or CounterFact's list
    (`requested_rewrite`); or the known-1000 list (`template`, `attribute`). A neighbour is a
    prompt, or {"prompt", "answer"}.
    Raises: BadText for a file that cannot be read; BadInput naming the line or record that is no
    fact.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
    ...     _ = file.write('{"prompt": "{} is in", "subject": "Rome", "true": "Italy"}')
    ...     file.flush()
    ...     facts = read_facts(file.name)
    >>> facts[0].text, facts[0].true
    ('Rome is in', 'Italy')
    """
    text = read_text(path)
    is_list = text.lstrip().startswith("[")
    records = _list_records(path, text) if is_list else _line_records(path, text)
    if not records:
        raise BadInput(f"{path} holds no fact.")
    return [_fact(path, where, record) for where, record in records]


def _list_records(path: str | Path, text: str) -> list[tuple[str, Any]]:
    try:
        records = json.loads(text)
    except ValueError as error:
        raise BadInput(f"{path} begins like a JSON list and is none: {error}.") from error
    return [(f"record {number}", record) for number, record in enumerate(records, 1)]


def _line_records(path: str | Path, text: str) -> list[tuple[str, Any]]:
    records = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            records.append((f"line {number}", json.loads(line)))
        except ValueError as error:
            raise BadInput(
                f"{path}, line {number}, is not JSON: {error}; write one JSON object a line."
            ) from error
    return records


def _fact(path: str | Path, where: str, record: Any) -> Fact:
    if not isinstance(record, Mapping):
        raise BadInput(
            f"{path}, {where}, is {type(record).__name__}, where an object with `prompt` and"
            " `subject` is needed."
        )
    read: Callable[[Mapping[str, Any]], Fact]
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
        raise BadInput(f"{path}, {where}: {error.args[0]}") from error


def _plain(record: Mapping[str, Any]) -> Fact:
    neighbours = [n if isinstance(n, dict) else {"prompt": n} for n in record.get("neighbours", ())]
    return Fact(
        _text(record["prompt"]),
        _text(record["subject"]),
        _optional_text(record, "target"),
        _optional_text(record, "true"),
        _optional_text(record, "relation"),
        _texts(record.get("paraphrases", ())),
        tuple((_text(n["prompt"]), n.get("answer")) for n in neighbours),
        _texts(record.get("generation", ())),
    )


def _counterfact(record: Mapping[str, Any]) -> Fact:
    """Source: Meng et al. 2022, arXiv:2202.05262, appendix; the fields of counterfact.json."""
    rewrite = record["requested_rewrite"]
    neighbours = _texts(record.get("neighborhood_prompts", ()))
    return Fact(
        _text(rewrite["prompt"]),
        _text(rewrite["subject"]),
        _text(rewrite["target_new"]["str"]),
        _text(rewrite["target_true"]["str"]),
        rewrite.get("relation_id"),
        _texts(record.get("paraphrase_prompts", ())),
        tuple((prompt, None) for prompt in neighbours),
        _texts(record.get("generation_prompts", ())),
    )


def _known(record: Mapping[str, Any]) -> Fact:
    # some templates of the list lack the last word of their prompt; the prompt is what was asked
    prompt = _text(record.get("prompt", record["template"]))
    subject = _text(record["subject"])
    template = prompt if SLOT in prompt else prompt.replace(subject, SLOT, 1)
    return Fact(template, subject, None, _text(record["attribute"]), record.get("relation_id"))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not text")
    return value


def _texts(values: Any) -> tuple[str, ...]:
    return tuple(_text(value) for value in values)


def _optional_text(record: Mapping[str, Any], name: str) -> str | None:
    value = record.get(name)
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{name} is {value!r}, which is not text")
    return value
