"""Results as text for a terminal: whole sentences, and nothing that a text says is markup."""

from __future__ import annotations

from dataclasses import replace

import pytest
from made_results import (
    detection,
    edit_result,
    edits_result,
    find_result,
    layer_ranking,
    made_results,
    measurement,
    trace_result,
    verification,
)

from surgeon.result import Result, result
from surgeon.show.text import KINDS, print_result


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]):
    def call(result: Result) -> str:
        capsys.readouterr()
        print_result(result)
        return capsys.readouterr().out

    return call


@pytest.mark.parametrize("kind", made_results())
def test_texts_are_printed_as_they_are(printed, kind: str):
    """Square brackets are markup and :smile: an emoji to the library that prints."""
    assert kind in KINDS
    assert "[red]x[/red] [/] :smile:" in printed(made_results("[red]x[/red] [/] :smile:")[kind])


def test_find_says_the_verdict_and_its_rule(printed):
    text = printed(find_result("the rule"))
    assert "set 1: severe, row of 2: L0.mlp.down[3, 5], L0.mlp.down[3, 6]" in text
    assert "+0.750 nats per token  (95% +0.600 to +0.900, 500 tokens)" in text
    assert "+0.0005 median, +0.0100 worst of 20 (the rule)" in text
    assert "set 2: severe, row: L0.mlp.down[4, :]" in text
    assert "sets 1 and 2 are links of one chain, by channel 3: +0.750 and +0.700 nats" in text
    assert "Verdict: vital, severe. A number that decides is within a tenth" in text
    assert text.count("The rule: the rule. By the lower end") == 1


def test_none_found_names_the_tallest_channel_and_the_bar(printed):
    text = printed(replace(find_result("model"), sets=[]))
    assert (
        "None found: the tallest channel is 12.0 times the median (layer 1; the bar is 4.0)."
        in (text)
    )
    assert "Verdict" not in text


def test_what_is_not_vital_is_said_so(printed):
    text = printed(replace(verification("r"), vital=False))
    assert "Verdict: not vital." in text
    assert "The rule: r." in text
    assert "+0.1000 nats are left after restoring the super activation alone" in text


def test_parts_that_were_not_measured_alone_are_counted(printed):
    result = verification()
    many = replace(result, at=result.at * 3)
    assert "and 4 more" in printed(many)
    assert "more" not in printed(result)


def test_detection_says_that_nothing_was_measured(printed):
    text = printed(detection("model"))
    assert "1 candidates; no damage was measured (the bar is 4.0)" in text
    assert "strongest L0.mlp.down[3, 5], -40% of its write" in text


def test_without_patches_there_is_nothing_to_compare_with(printed):
    alone = replace(
        measurement("m"), patches=[], kl_from_base=None, top1_agreement=None, base_nll=None
    )
    assert "KL from base" not in printed(alone)
    assert "patched:" not in printed(alone)
    assert "KL from base 0.1000  top-1 agreement 0.900" in printed(measurement("m"))


def test_an_edit_says_what_changes_on_ordinary_text(printed):
    text = printed(edit_result("m"))
    assert "Forecast: ok. The layer's output changes by 9.0% on ordinary text" in text
    assert "Note: m" in text
    assert "-0.900" in text
    assert "Neighbours that keep their answer: 3 of 4." in text
    assert "P(target) 0.0000 → 0.9900" in text


def test_several_edits_say_why_they_stopped(printed):
    text = printed(edits_result("the rail"))
    assert "Stopped: the rail. The patch holds the 1 before." in text
    assert "Every edit stayed." in printed(replace(edits_result(), stopped=None))


def test_layers_that_cannot_be_told_apart_are_named(printed):
    text = printed(layer_ranking("rome"))
    assert "Layer 1 is best; 0 cannot be told from it on so few facts." in text
    assert "not traced" in text


def test_a_trace_is_shaded_between_corrupted_and_clean(printed):
    lines = printed(trace_result("tok")).splitlines()
    row = next(line for line in lines if line.strip().startswith("*tok"))
    assert "██" in row or "▓▓" in row
    assert any("most comes back at layer 1 at 'tok' 0.9000 (0.8000 to 1.0000)" in x for x in lines)


def test_a_kind_without_a_text_is_shown_by_its_fields(printed):
    @result("strange")
    class Strange(Result):
        words: str

    assert printed(Strange("[red]")) == "Strange\n  words  '[red]'\n"
