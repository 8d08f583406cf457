"""Results: the JSON is the fields and back again, nothing is lost or let through, one screen."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, field, replace
from pathlib import Path
from typing import Any

import pytest
from made_results import made_results

from surgeon.anatomy import Entry, Region
from surgeon.errors import BadInput, MissingExtra, SurgeonError
from surgeon.result import (
    CorpusRecord,
    Provenance,
    Result,
    attached,
    attached_files,
    derived,
    record,
    result,
)
from surgeon.studies.registry import RESULTS, read_result, result_class


@record
class Part:
    """One part."""

    entry: Entry
    nats: list[float]
    note: str | None = None

    @derived
    def row(self) -> int:
        return self.entry.row


@result("whole", version=3)
class Whole(Result):
    """All parts."""

    parts: list[Part]
    by_name: dict[str, Part]
    pair: tuple[float, int]
    several: tuple[Region, ...]
    either: float | str | None
    free: dict[str, Any] = field(default_factory=dict)
    patch: Any = attached("whole.safetensors")

    @derived
    def most(self) -> float:
        return max(max(part.nats) for part in self.parts)

    def rows(self) -> list[dict[str, object]]:
        return [{"entry": part.entry, "most": max(part.nats)} for part in self.parts]


def whole(**changes: Any) -> Whole:
    part = Part(Entry.parse("L0.mlp.down[3, 5]"), [0.5, 0.25])
    about = Provenance(
        model="m",
        fingerprint="f",
        corpus=CorpusRecord("text", 10, True, 2, 5),
        settings={"steps": 3, "words": ["a"], "nothing": None},
        seed=1,
        surgeon="0.1",
        command="surgeon whole m",
    )
    made = Whole(
        [part],
        {"first": part},
        (0.5, 2),
        (Region.parse("L0.mlp.down[3, :]"),),
        "x",
        {"a": [1, {"b": None}]},
        provenance=about,
    )
    return replace(made, **changes)


def test_the_json_is_the_fields_with_what_is_derived():
    document = whole(patch=object()).to_json()
    assert list(document)[:2] == ["kind", "version"]
    assert document == {
        "kind": "whole",
        "version": 3,
        "model": "m",
        "fingerprint": "f",
        "corpus": {"name": "text", "tokens": 10, "bos": True, "windows": 2, "window": 5},
        "settings": {"steps": 3, "words": ["a"], "nothing": None},
        "seed": 1,
        "surgeon": "0.1",
        "command": "surgeon whole m",
        "parts": [{"entry": "L0.mlp.down[3, 5]", "nats": [0.5, 0.25], "note": None, "row": 3}],
        "by_name": {
            "first": {"entry": "L0.mlp.down[3, 5]", "nats": [0.5, 0.25], "note": None, "row": 3}
        },
        "pair": [0.5, 2],
        "several": ["L0.mlp.down[3, :]"],
        "either": "x",
        "free": {"a": [1, {"b": None}]},
        "most": 0.5,
    }


@pytest.mark.parametrize("either", [None, 0.5, "x"])
def test_there_and_back(either: Any):
    made = whole(either=either)
    assert Whole.from_json(json.loads(json.dumps(made.to_json()))) == made
    assert Whole.from_json({**made.to_json(), "most": 7, "unknown": 1}) == made


@pytest.mark.parametrize("kind", made_results())
def test_every_kind_there_and_back(kind: str):
    made = made_results("a [b] 'c'")[kind]
    document = json.loads(json.dumps(made.to_json()))
    assert read_result(document) == made
    assert type(made).from_json(document).to_json() == document


@pytest.mark.parametrize("kind", RESULTS)
def test_every_kind_is_where_the_registry_says(kind: str):
    found = result_class(kind)
    assert (found.kind, found.version >= 1) == (kind, True)
    assert (found.__doc__ or "").strip()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kind": "part"}, "no result of the kind whole, version 3, but 'part', version 3."),
        ({"version": 2}, "but 'whole', version 2."),
        ({"parts": 3}, "whole.parts is damaged"),
        ({"parts": [{"nats": []}]}, "whole.parts lacks entry; it was not written by this"),
        ({"parts": [{"entry": 3, "nats": []}]}, "whole.parts.entry is damaged"),
        ({"parts": [{"entry": "L0[", "nats": []}]}, "is not an entry"),
        ({"by_name": {"x": []}}, "whole.by_name.x is damaged"),
        ({"pair": "ab"}, "whole.pair is damaged"),
        ({"pair": [0.5]}, "whole.pair is damaged: it holds 1 of 2 values."),
        ({"either": []}, "whole.either is damaged"),
        ({"seed": "x"}, "whole.provenance.seed is damaged"),
    ],
)
def test_what_is_no_such_result_is_said(changes: dict[str, Any], said: str):
    with pytest.raises(BadInput) as raised:
        Whole.from_json({**whole().to_json(), **changes})
    assert said in str(raised.value)


@pytest.mark.parametrize("document", [{}, {"kind": "banana"}, {"kind": ["find"]}, {"kind": None}])
def test_a_document_of_no_kind_is_said_so(document: dict[str, Any]):
    with pytest.raises(BadInput, match="is no result of Surgeon"):
        read_result(document)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite_never_reaches_a_file(number: float):
    part = Part(Entry.parse("L0.mlp.down[3, 5]"), [number])
    with pytest.raises(SurgeonError, match=r"nats is .* not finite"):
        whole(parts=[part]).to_json()
    with pytest.raises(SurgeonError, match="pair is"):
        whole(pair=(number, 1)).to_json()


def test_what_has_no_place_in_a_result_is_a_mistake_of_ours():
    with pytest.raises(TypeError, match=r"free\.x holds object"):
        whole(free={"x": object()}).to_json()
    assert whole(free={"x": Path("a/b")}).to_json()["free"] == {"x": "a/b"}


def test_what_has_a_file_of_its_own_is_no_part_of_the_json():
    patch = object()
    made = whole(patch=patch)
    assert "patch" not in made.to_json()
    assert made.attachments() == {"whole.safetensors": patch}
    assert whole().attachments() == {}
    assert attached_files(Whole) == {"patch": "whole.safetensors"}
    assert made == whole()
    assert "object" not in repr(made)


def test_results_are_not_changed():
    made = whole()
    with pytest.raises(FrozenInstanceError):
        made.either = 1  # type: ignore[misc,assignment]
    other = made.made(command="again")
    assert (made.provenance.command, other.provenance.command) == ("surgeon whole m", "again")
    assert replace(other, provenance=made.provenance) == made


def test_a_table():
    assert list(whole().rows()[0]) == ["entry", "most"]
    frame = whole().to_frame()
    assert frame.to_dict("records") == [{"entry": "L0.mlp.down[3, 5]", "most": 0.5}]

    @result("flat")
    class Flat(Result):
        number: int

    with pytest.raises(BadInput, match="of the kind flat is no table"):
        Flat(1).rows()


def test_a_table_without_pandas(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(MissingExtra, match=r"weight-surgeon\[report\]"):
        whole().to_frame()


def test_a_result_is_one_screen():
    part = Part(Entry.parse("L0.mlp.down[3, 5]"), [0.123456789] * 1000, "long " * 1000)
    made = whole(
        parts=[part] * 5000,
        by_name={str(i): part for i in range(999)},
        either="word " * 999,
        free={"a": {"b": list(range(9999))}},
    )
    lines = repr(made).splitlines()
    assert lines[0] == "Whole(m)"
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 100
    assert "[5000 Part]" in repr(made)
    assert "{999 items}" in repr(made)
    assert len(repr(part)) <= 200
    assert repr(whole()).splitlines()[1:] == [
        "  parts    [1 Part]",
        "  by_name  {first: Part(…)}",
        "  pair     [0.5, 2]",
        "  several  [L0.mlp.down[3, :]]",
        "  either   'x'",
        "  free     {a: [1, {1 items}]}",
        "  most     0.5",
    ]


@pytest.mark.parametrize("kind", made_results())
def test_every_kind_is_one_screen(kind: str):
    lines = repr(made_results("word " * 99)[kind]).splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 100
