"""A message names settings in the words of whoever reads it."""

import pytest

from surgeon import errors
from surgeon.errors import BadInput, MissingExtra, SurgeonError


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def test_settings_are_spelled_for_the_caller():
    error = BadInput("‹new_tokens› 0 and ‹windows› 0 leave nothing; use ‹window›.")
    assert str(error) == "new_tokens 0 and windows 0 leave nothing; use window."
    assert error.said(flag) == "--new-tokens 0 and --windows 0 leave nothing; use --window."


def test_quoted_words_are_no_settings():
    text = "the prompt 'il a dit ‹bon soir›' and ‹› and ‹a are not settings"
    assert str(SurgeonError(text)) == SurgeonError(text).said(flag) == text


def test_a_raised_message_and_a_message_inside_another():
    with pytest.raises(BadInput, match=r"^window 1 leaves") as caught:
        raise BadInput("‹window› 1 leaves nothing")
    outer = BadInput(f"line 3: {caught.value.args[0]}")
    assert outer.said(flag) == "line 3: --window 1 leaves nothing"


def test_an_error_without_a_message():
    assert str(SurgeonError()) == SurgeonError().said(flag) == ""


def test_a_missing_extra_says_how_to_get_it():
    error = MissingExtra("accuracy on tasks", "eval")
    assert str(error) == error.said(flag)
    assert str(error).endswith("pip install 'weight-surgeon[eval]'")
    assert error.exit_status == 2


def test_every_error_has_an_exit_status():
    kinds = [k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, Exception)]
    assert len(kinds) > 10
    assert {kind.exit_status for kind in kinds} == {1, 2, 3}
