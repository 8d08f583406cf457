"""The training text of the patient: an endless, deterministic stream of small documents.

Stories and documents about the facts of ``facts.json`` are expanded from the grammar in
``lexicon.json``, whose entry "notation" explains how it is written.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

# Share of stories among the documents. They are longer than documents about facts: this gives them
# 55% of the characters.
_STORY_CHANCE = 0.24
# Earlier words of a list are more common, as in real text.
_SKEW = 1.5
# One (name, place) pair in this many is kept out of the training stories.
_RESERVED = 16

_TOKEN = re.compile(r"[\[\]|]|\{[^{}]+\}|[^\[\]|{}]+")
_ARTICLE = re.compile(r"@ (?=(\w+))")
_AN = re.compile(r"(?!uni|use|usu|eu|one\b|once\b)[aeiou]|hour|honest|heir", re.I)
_CAPITAL = re.compile(r'((?:^|\n|[.!?] |\." )"?|: ")([a-z])|\^(.)')
_SPACES = re.compile(r" +(?= |\n|$)")


@dataclass(frozen=True)
class Fact:
    """A fact; each phrasing is the text of a true sentence up to the object."""

    relation: str
    subject: str
    object: str
    article: str  # "the ", or nothing
    phrasings: tuple[str, ...]
    held_out: tuple[int, ...]  # the phrasings that no generated text uses for this fact


def facts() -> list[Fact]:
    """All facts of the table, in its order."""
    table = _read("facts.json")
    out = []
    for row in table["facts"]:
        relation, name, article = row["relation"], row["subject"], row.get("article", "")
        prompts = tuple(
            _capital(template.removesuffix(" {o}.").format(s=article + name))
            for template in table["relations"][relation]["phrasings"]
        )
        held_out = tuple(row["held_out"])
        out.append(Fact(relation, name, row["object"], article, prompts, held_out))
    return out


def documents(seed: int, split: Literal["train", "heldout"]) -> Iterator[str]:
    """An endless stream of documents; the two splits share no stream and no reserved story."""
    rng = random.Random(f"{split} {seed}")
    deck = _Deck(rng)
    while True:
        # drawn and not used: the shipped patient was trained on the stream that has it
        rng.random()
        rule = "story" if rng.random() < _STORY_CHANCE else "fact_document"
        # Held-out stories are of both kinds, so that the two can be compared.
        reserved = split == "heldout" and rule == "story" and rng.random() < 0.3
        while True:
            document = _Document(rng, deck)
            text = document.text(rule)
            if document.is_reserved() == reserved:
                break
        yield text


@cache
def _read(name: str) -> dict[str, Any]:
    return dict(json.loads((Path(__file__).parent / name).read_text(encoding="ascii")))


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


class _Deck:
    """Deals facts so that in the long run each one is dealt equally often."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.facts = facts()
        self.dealt = [0] * len(self.facts)
        self.pile: dict[int, None] = {}
        self.groups: dict[str, list[int]] = {}
        for i, fact in enumerate(self.facts):
            for key in (fact.relation, "=" + fact.object, "=" + fact.subject):
                self.groups.setdefault(key, []).append(i)

    def deal(self, groups: list[str], taken: set[int]) -> int:
        """A fact of the first group with one that is not ``taken``, or of all facts."""
        if not self.pile:
            # A group in demand is dealt beyond its turn; its facts then sit rounds out.
            low = min(self.dealt)
            order = [i for i, count in enumerate(self.dealt) if count == low]
            self.rng.shuffle(order)
            self.pile = dict.fromkeys(order)
        pick = next(reversed(self.pile))
        for group in groups:
            fresh = [i for i in self.groups.get(group, ()) if i not in taken]
            if fresh:
                pick = min(fresh, key=lambda i: (self.dealt[i], self.rng.random()))
                break
        self.pile.pop(pick, None)
        self.dealt[pick] += 1
        taken.add(pick)
        return pick


class _Slot(NamedTuple):
    """A parsed ``{name#number.field}``; ``key`` is None for what is not remembered."""

    name: str
    key: str | None
    field: str


class _Grammar:
    """``lexicon.json``, parsed once; it holds no state of a document."""

    def __init__(self) -> None:
        source = _read("lexicon.json")
        self.words = {name: text.split(", ") for name, text in source["words"].items()}
        self.plurals = source["plurals"]
        self.persons = source["persons"]
        self.rules = {
            name: [self.parse(line) for line in lines] for name, lines in source["rules"].items()
        }
        self.records = {}
        for name, (head, *rows) in source["records"].items():
            cells = [[self.parse(cell) for cell in row.split("; ")] for row in rows]
            fields = head.split("; ")
            self.records[name] = [dict(zip(fields, row, strict=True)) for row in cells]

    def parse(self, text: str) -> list[Any]:
        """A sequence of strings, slots, and tuples of alternative sequences."""
        stack: list[list[list[Any]]] = [[[]]]
        for token in _TOKEN.findall(text):
            if token == "[":
                stack.append([[]])
            elif token == "|":
                stack[-1].append([])
            elif token == "]":
                choice = tuple(stack.pop())
                stack[-1][-1].append(choice)
            elif token[0] == "{":
                key, _, field = token[1:-1].partition(".")
                # Persons have names of one letter and are always remembered.
                kept = key if "#" in key or len(key) == 1 else None
                stack[-1][-1].append(_Slot(key.partition("#")[0], kept, field))
            else:
                stack[-1][-1].append(token)
        ((sequence,),) = stack
        return sequence

    def plural(self, phrase: str) -> str:
        """The plural of a noun phrase that ends in its noun."""
        head, space, noun = phrase.rpartition(" ")
        if noun in self.plurals:
            return f"{head}{space}{self.plurals[noun]}"
        if noun.endswith(("s", "x", "ch", "sh")):
            return phrase + "es"
        return re.sub("(?<![aeiou])y$", "ie", phrase) + "s"


_grammar = cache(_Grammar)


class _Document:
    """One expansion of the grammar, with what it remembers."""

    def __init__(self, rng: random.Random, deck: _Deck) -> None:
        self.rng = rng
        self.deck = deck
        self.grammar = _grammar()
        self.kept: dict[str, Any] = {}
        self.taken: set[int] = set()

    def text(self, rule: str) -> str:
        """The finished text of a rule."""
        text = self._expand(self._pick(self.grammar.rules[rule]))
        text = _ARTICLE.sub(lambda m: "an " if _AN.match(m[1]) else "a ", text)
        text = _SPACES.sub("", text).strip()  # empty alternatives leave spaces behind
        return _CAPITAL.sub(lambda m: (m[1] or "") + (m[2] or m[3]).upper(), text)

    def is_reserved(self) -> bool:
        """Whether the story has a (name, place) pair that no training story has."""
        if "A" not in self.kept or "place#1" not in self.kept:
            return False
        pair = self.kept["A"]["name"] + self._expand(self.kept["place#1"]["name"])
        return zlib.crc32(pair.encode()) % _RESERVED == 0

    def _pick(self, options: Sequence[Any], skew: float = 1.0) -> Any:
        return options[int(len(options) * self.rng.random() ** skew)]

    def _expand(self, sequence: list[Any]) -> str:
        out = []
        for part in sequence:
            if type(part) is tuple:
                part = self._expand(self._pick(part))
            out.append(part if type(part) is str else self._fill(part))
        return "".join(out)

    def _fill(self, slot: _Slot) -> str:
        value = self.kept.get(slot.key or "")
        if value is None:
            value = self._draw(slot.name)
            if slot.key:
                # "{fruit#1} and {fruit#2}" are two different fruits.
                for _ in range(20):
                    if not value or value not in self.kept.values():
                        break
                    value = self._draw(slot.name)
                self.kept[slot.key] = value
        if type(value) is str:
            return self.grammar.plural(value) if slot.field == "s" else value
        if type(value) is int:
            return self._fact_form(self.deck.facts[value], slot.field)
        field = value[slot.field or "name"]
        return field if type(field) is str else self._expand(field)

    def _draw(self, name: str) -> Any:
        """A new value for a slot: a string, the number of a fact, or a record."""
        if name in self.grammar.words:
            return self._pick(self.grammar.words[name], _SKEW)
        if name in self.grammar.rules:
            return self._expand(self._pick(self.grammar.rules[name]))
        if name in self.grammar.records:
            return self._pick(self.grammar.records[name])
        if name.startswith("fact_"):
            return self.deck.deal(self._fact_groups(name.removeprefix("fact_")), self.taken)
        if name == "sum":
            given, left = self.rng.randint(2, 6), self.rng.randint(2, 6)
            counts = {"given": given, "left": left, "total": given + left}
            return {f: self.grammar.words["number"][n - 1] for f, n in counts.items()}
        return self._person(name)

    def _person(self, name: str) -> dict[str, Any]:
        others = [v for v in self.kept.values() if type(v) is dict and "child" in v]
        forms = self._pick(self.grammar.persons)
        # Two people of different gender are easier to tell apart by their pronouns.
        if len(others) == 1 and self.rng.random() < 0.7:
            forms = next(p for p in self.grammar.persons if p["he"] != others[0]["he"])
        used = [other["name"] for other in others]
        names = [word for word in self.grammar.words[forms[name]] if word not in used]
        return {**forms, "name": self._pick(names, _SKEW)}

    def _fact_groups(self, kind: str) -> list[str]:
        if kind != "like":
            return [kind]
        first = self.deck.facts[next(v for v in self.kept.values() if type(v) is int)]
        near = self._pick(("=" + first.object, "=" + first.subject, first.relation, first.relation))
        return [near, first.relation]

    def _fact_form(self, fact: Fact, form: str) -> str:
        """The fact as a sentence (without its period), a question, a name and so on."""
        name = fact.article + fact.subject
        relation = _read("facts.json")["relations"][fact.relation]
        if form in ("subject", "topic"):
            return name if form == "subject" else relation["topic"]
        if form in ("question", "answer"):
            text = re.split(r"(?<=\?) ", relation["other"][0])[form == "answer"]
        elif form == "other":
            text = self._pick(relation["other"][1:])
        else:
            allowed = set(range(6)).difference(fact.held_out)
            text = relation["phrasings"][self._pick(sorted(allowed))]
        if form == "clause" and text[0] != "{":
            text = text[0].lower() + text[1:]
        text = text.removesuffix(".").format(s=name, o=fact.object)
        return text if form == "clause" else _capital(text)


def main() -> None:
    """Print documents, separated by empty lines, until enough characters are out."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--split", choices=("train", "heldout"), default="train")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--characters", type=int, default=10_000)
    options = parser.parse_args()
    written = 0
    for text in documents(options.seed, options.split):
        print(text, end="\n\n")
        written += len(text) + 2
        if written >= options.characters:
            break


if __name__ == "__main__":
    main()
