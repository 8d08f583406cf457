"""Sessions: what stays, what is taken back, and why; and the radar against the model itself."""

from __future__ import annotations

import sys

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from surgeon.anatomy import Anatomy
from surgeon.corpus import load_corpus
from surgeon.edit import (
    Edit,
    EditConfig,
    Preparation,
    SessionConfig,
    UnusableKey,
    edit,
    radar,
    session,
)
from surgeon.errors import BadInput, Refused, SurgeonError
from surgeon.facts import Fact
from surgeon.measure import mean_nll
from surgeon.patients import heldout_text
from surgeon.settings import configured

MODULE = sys.modules["surgeon.edit.session"]  # the package's name for it is the function's
Patient = tuple[Anatomy, PreTrainedTokenizerBase]
FACTS = [
    Fact("The capital of {} is", "France", "Rome"),
    Fact("Most people in {} speak", "Brazil", "German"),
    Fact("{} is remembered as a great", "Mozart", "painter"),
]


@pytest.fixture(scope="module")
def windows(patient: Patient) -> torch.Tensor:
    return load_corpus(patient[1], heldout_text(), "heldout", 128, 6).windows


@pytest.mark.slow
def test_a_session_is_its_edits(
    patient: Patient, preparation: Preparation, windows: torch.Tensor
) -> None:
    anatomy, _ = patient
    before = {n: p.clone() for n, p in anatomy.model.named_parameters()}
    base = mean_nll(anatomy.model, windows)
    ran = session(preparation, FACTS, windows)
    assert all(torch.equal(p, before[n]) for n, p in anatomy.model.named_parameters())
    assert ran.stopped is None
    assert [s.earlier_kept for s in ran.steps] == [0, 1, 2]
    assert all(s.holds for s in ran.steps)
    with ran.patch.applied(anatomy):
        assert mean_nll(anatomy.model, windows) == pytest.approx(ran.steps[-1].nll)
        old = before["model.layers.0.mlp.down_proj.weight"]
        now = anatomy.view("L0.mlp.down").read()
        assert ran.steps[-1].norm == pytest.approx(float((now - old).norm() / old.norm()), rel=1e-4)
    first = edit(preparation, FACTS[:1], EditConfig())
    with first.patch.applied(anatomy):
        assert mean_nll(anatomy.model, windows) == pytest.approx(ran.steps[0].nll)
    assert ran.steps[0].nll > base - 1


@pytest.mark.parametrize(
    ("rails", "why"), [({"max_norm": 0.3}, "of its norm"), ({"max_nll_rise": 0.05}, "NLL")]
)
@pytest.mark.slow
def test_what_breaks_a_rail_is_taken_back(
    patient: Patient,
    preparation: Preparation,
    windows: torch.Tensor,
    rails: dict[str, float],
    why: str,
) -> None:
    anatomy, _ = patient
    whole = session(preparation, FACTS, windows)
    ran = session(preparation, FACTS, windows, rails=SessionConfig(**rails))
    assert ran.stopped is not None
    assert why in ran.stopped
    n = len(ran.edits)
    assert 0 < n < 3
    assert len(ran.steps) == n + 1
    assert [e.patch.digest for e in ran.edits] == [e.patch.digest for e in whole.edits[:n]]
    with ran.patch.applied(anatomy):  # the last good state
        assert mean_nll(anatomy.model, windows) == pytest.approx(ran.steps[n - 1].nll)


def test_rails_that_leave_nothing(preparation: Preparation, windows: torch.Tensor) -> None:
    with pytest.raises(SurgeonError, match="first edit was taken back"):
        session(preparation, FACTS, windows, rails=SessionConfig(max_norm=1e-3))
    for bad in ({"max_norm": 0.0}, {"max_nll_rise": -1.0}, {"min_kept": 2.0}):
        with pytest.raises(BadInput):
            configured(SessionConfig, bad)


@pytest.mark.slow
def test_a_forecast_of_harm_ends_a_session(
    preparation: Preparation, windows: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit set between the forecasts of two edits: the second is taken back, or the first
    refused, and forced both stay.
    """
    open_rails = {"max_norm": 1e9, "max_nll_rise": 1e9, "min_kept": 0.0}
    free = session(preparation, FACTS, windows, rails=SessionConfig(**open_rails))
    damage = [step.relative_damage for step in free.steps]
    assert damage[0] < max(damage[1:])
    monkeypatch.setattr(MODULE, "REFUSE", (damage[0] + max(damage[1:])) / 2)
    ran = session(preparation, FACTS, windows, rails=SessionConfig(**open_rails))
    assert ran.stopped is not None
    assert "on ordinary text" in ran.stopped
    assert 0 < len(ran.edits) < 3
    forced = session(preparation, FACTS, windows, rails=SessionConfig(**open_rails, force=True))
    assert forced.stopped is None
    monkeypatch.setattr(MODULE, "REFUSE", damage[0] / 2)
    with pytest.raises(Refused, match="first edit was taken back"):
        session(preparation, FACTS, windows, rails=SessionConfig(**open_rails))


def test_an_edit_that_cannot_be_made_ends_a_session(
    preparation: Preparation, windows: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = MODULE.edit

    def failing(preparation: Preparation, facts: list[Fact], config: EditConfig) -> Edit:
        if facts[0].subject == "Brazil":
            raise UnusableKey("no key.")
        return real(preparation, facts, config)

    monkeypatch.setattr(MODULE, "edit", failing)
    ran = session(preparation, FACTS, windows)
    assert (len(ran.edits), len(ran.steps)) == (1, 1)
    assert ran.stopped is not None
    assert "could not be made: no key" in ran.stopped


@pytest.mark.parametrize("method", ["rome", "ft"])
def test_radar_sees_what_the_model_does(
    patient: Patient, preparation: Preparation, windows: torch.Tensor, method: str
) -> None:
    anatomy, tokenizer = patient
    edited = edit(preparation, FACTS[:1], EditConfig(method=method))
    scan = radar(anatomy, tokenizer, edited.patch, windows, 5)
    assert scan.keys == windows.numel()
    assert [t.change for t in scan.touched] == sorted(
        (t.change for t in scan.touched), reverse=True
    )
    assert scan.largest == scan.touched[0].change
    for touched in scan.touched:
        ids = windows[touched.window, : touched.position + 1][None]
        with torch.no_grad():
            before = anatomy.model(ids).logits[0, -1].float().log_softmax(-1)
            with edited.patch.applied(anatomy):
                after = anatomy.model(ids).logits[0, -1].float().log_softmax(-1)
        assert touched.kl == pytest.approx(float((before.exp() * (before - after)).sum()), abs=1e-4)
        assert tokenizer.decode([int(ids[0, -1])]) == touched.token
    if method == "rome":
        assert any("France" in t.token for t in scan.touched)
