"""Settings: one declaration, read flat, filled back in, checked in one place; and as options."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import nan
from typing import Any, Literal

import click
import pytest

from surgeon.cli.options import GroupedCommand, flag, given_by, options_of
from surgeon.errors import BadInput
from surgeon.settings import MISSING, configured, nested, setting, settings_of, values_of
from surgeon.studies.registry import STUDIES


def pair(text: str) -> tuple[int, int]:
    try:
        low, high = map(int, text.split(":"))
    except ValueError:
        raise BadInput(f"‹span› {text} is no range like 0:4.") from None
    return low, high


@dataclass(frozen=True)
class Inner:
    steps: int = setting(400, "most training steps", low=0, high=1000)
    rate: float = setting(0.5, "the rate; auto is another matter", low=0, group="Training")


@dataclass(frozen=True)
class Outer:
    """Settings of a verb of the tests."""

    at: Any = setting(help="what is named", metavar="ENTRY", many=True)
    mode: str = setting("zero", "what it becomes", choices=("zero", "flip"), short="-m")
    span: tuple[int, int] | None = setting(None, "layers", parse=pair, metavar="A:B")
    words: tuple[str, ...] = setting(("a", "b"), "a word", spelled="word")
    limit: int | None = setting(None, "the first N", low=1)
    control: bool = setting(True, "also a control")
    force: bool = setting(False, "in any case")
    level: Literal["low", "high"] = setting("low", "how much")
    train: Inner = nested(Inner)
    value: Inner = nested(Inner, prefix="value")

    def __post_init__(self) -> None:
        if self.force and self.limit:
            raise BadInput("‹force› and ‹limit› exclude each other.")


def test_the_list_is_flat_and_knows_where_each_belongs():
    found = {one.name: one for one in settings_of(Outer)}
    own = ["at", "mode", "span", "words", "limit", "control", "force", "level"]
    assert list(found) == [*own, "steps", "rate", "value_steps", "value_rate"]
    assert found["value_rate"].path == ("value", "rate")
    assert found["rate"].declaration.group == "Training"
    assert [name for name, one in found.items() if one.required] == ["at"]
    assert found["at"].default is MISSING


def test_an_instance_gives_its_values_as_defaults():
    config = Outer(at=["x"], train=Inner(steps=3))
    assert {one.name: one.default for one in settings_of(config)}["steps"] == 3
    assert values_of(config) == {
        "at": ["x"],
        "mode": "zero",
        "span": None,
        "words": ["a", "b"],
        "limit": None,
        "control": True,
        "force": False,
        "level": "low",
        "steps": 3,
        "rate": 0.5,
        "value_steps": 400,
        "value_rate": 0.5,
    }


def test_what_is_given_goes_to_its_place():
    config = configured(
        Outer, {"at": "x", "steps": 7, "value_steps": 8, "span": "0:4", "words": ["c"], "rate": 1}
    )
    assert (config.train.steps, config.value.steps) == (7, 8)
    assert (config.span, config.words) == ((0, 4), ("c",))
    assert config.train.rate == 1.0
    assert isinstance(config.train.rate, float)
    assert configured(config, {"value_rate": 0.25}) == replace(config, value=Inner(8, 0.25))
    assert configured(Outer, values_of(config)) == config


def test_ends_that_are_left_out():
    @dataclass(frozen=True)
    class Open:
        share: float = setting(0.5, "a share", above=0, below=1)

    assert configured(Open, {"share": 0.999}).share == 0.999
    for share, said in ((0, "is 0; it must be above 0."), (1, "is 1; it must be below 1.")):
        with pytest.raises(BadInput) as raised:
            configured(Open, {"share": share})
        assert str(raised.value) == f"share {said}"


def test_two_settings_of_one_name_are_a_mistake():
    @dataclass(frozen=True)
    class Twice:
        steps: int = setting(1, "steps")
        inner: Inner = nested(Inner)

    with pytest.raises(TypeError, match="two settings called steps"):
        settings_of(Twice)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "verb needs at."),
        ({"at": "x", "stepps": 1}, "stepps is no setting of verb; did you mean steps? It can be"),
        ({"at": "x", "banana": 1}, "banana is no setting of verb; it can be at, control"),
        ({"at": "x", "steps": "many"}, "steps is 'many'; it should be a whole number."),
        ({"at": "x", "steps": 1.5}, "steps is 1.5; it should be a whole number."),
        ({"at": "x", "steps": True}, "steps is True; it should be a whole number."),
        ({"at": "x", "rate": "x"}, "rate is 'x'; it should be a number."),
        ({"at": "x", "control": 1}, "control is 1; it should be true or false."),
        ({"at": "x", "words": "c"}, "words is 'c'; it should be a list."),
        ({"at": "x", "words": [1]}, "words is [1]; it should be a list."),
        ({"at": "x", "limit": "3"}, "limit is '3'; it should be a whole number or nothing."),
        ({"at": "x", "mode": "halve"}, "mode halve is not known; use zero, flip."),
        ({"at": "x", "level": "no"}, "level is 'no'; it should be low or high."),
        ({"at": "x", "steps": -1}, "steps is -1; it must be at least 0."),
        ({"at": "x", "value_steps": 1001}, "value_steps is 1001; it must be at most 1000."),
        ({"at": "x", "limit": 0}, "limit is 0; it must be at least 1."),
        ({"at": "x", "rate": nan}, "rate is nan; it must be a finite number."),
        ({"at": "x", "rate": float("inf")}, "rate is inf; it must be a finite number."),
        ({"at": "x", "span": "0-4"}, "span 0-4 is no range like 0:4."),
        ({"at": "x", "force": True, "limit": 1}, "force and limit exclude each other."),
    ],
)
def test_what_cannot_be_is_said_by_name(given: dict[str, Any], said: str):
    with pytest.raises(BadInput) as raised:
        configured(Outer, given, "verb")
    assert str(raised.value).startswith(said)


def test_nothing_is_changed_by_a_wrong_value():
    given = {"at": "x", "steps": 3}
    configured(Outer, given)
    assert given == {"at": "x", "steps": 3}


# -- as options of a command ---------------------------------------------------------------------


@pytest.fixture
def command() -> Any:
    """What a command line gives: the settings that were typed, and nothing that is a default."""
    seen: list[dict[str, Any]] = []
    callback = click.pass_context(
        lambda context, **_: seen.append(given_by(context, [s.name for s in settings_of(Outer)]))
    )
    made = GroupedCommand("verb", params=options_of(Outer), callback=callback)

    def call(*words: str) -> Any:
        made.main(list(words), standalone_mode=False)
        return seen[-1]

    call.help = made.get_help(click.Context(made))  # type: ignore[attr-defined]
    return call


def test_what_is_typed_is_given(command: Any):
    assert command("--at", "x") == {"at": ("x",)}
    given = command(
        *("--at", "x", "--at", "y", "-m", "flip", "--span", "0:2", "--word", "c"),
        *("--limit", "2", "--no-control", "--force", "--value-steps", "5", "--steps", "400"),
    )
    assert given == {
        "at": ("x", "y"),
        "mode": "flip",
        "span": "0:2",
        "words": ("c",),
        "limit": 2,
        "control": False,
        "force": True,
        "value_steps": 5,
        "steps": 400,
    }
    with pytest.raises(BadInput, match="exclude each other"):
        configured(Outer, given)
    assert configured(Outer, {**given, "force": False}).value.steps == 5


@pytest.mark.parametrize("words", [(), ("--at", "x", "--mode", "halve"), ("--at", "x", "--x")])
def test_what_click_refuses(command: Any, words: tuple[str, ...]):
    with pytest.raises(click.UsageError):
        command(*words)


def test_the_help_has_every_setting_under_its_heading(command: Any):
    for one in settings_of(Outer):
        assert flag(one) in command.help or f"--no-{flag(one)[2:]}" in command.help
    assert "What is named; again for several." in command.help
    assert command.help.index("Options:") < command.help.index("Training:")
    assert "[default: 400" in command.help


# -- the settings of every study -----------------------------------------------------------------


# what a verb needs one of, so that no single setting is required
FACT = {"prompt": "The capital of {} is", "subject": "France", "target": "Rome"}
ONE_OF_SEVERAL = {
    "trace": {"prompt": FACT["prompt"], "subject": FACT["subject"]},
    "edit": FACT,
    "edit layers": FACT,
    "edit many": {"facts": "facts.jsonl"},
    "quantize": {"bits": 4},
}


@pytest.mark.parametrize("verb", STUDIES)
def test_every_setting_of_a_verb_is_declared_whole(verb: str):
    """Help as a phrase without its stop, a default that its own checks let pass, one spelling."""
    declared = settings_of(STUDIES[verb].settings)
    for one in declared:
        text = one.declaration.help
        assert text, one.name
        assert not text.endswith("."), one.name
    arguments = STUDIES[verb].positional
    options = [flag(one) for one in declared if one.name not in arguments]
    spellings = [*options, "--json", "--folder"]
    assert len({*spellings}) == len(spellings)
    defaults = {one.name: one.default for one in declared if not one.required}
    entry = "L0.mlp.down[0, 0]"
    needed = {s.name: (*s.declaration.choices, entry)[0] for s in declared if s.required}
    needed |= ONE_OF_SEVERAL.get(verb, {})
    assert values_of(configured(STUDIES[verb].settings, {**defaults, **needed})) == values_of(
        configured(STUDIES[verb].settings, needed)
    )
