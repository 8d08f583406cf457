"""A lab: opened by name or made of a module, its texts and what it keeps, its verbs by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import surgeon as package
from surgeon import Lab
from surgeon.errors import BadCheckpoint, BadInput, BadText, SurgeonError
from surgeon.result import Result
from surgeon.studies.lab import TextSettings
from surgeon.studies.registry import RESULTS, STUDIES

PLANTED = "L0.mlp.down[5, 7]"


@pytest.fixture(scope="module")
def lab(folder: Path) -> Lab:
    return package.open(str(folder))


@pytest.fixture
def reading(text: Path) -> dict[str, Any]:
    return {"text": str(text), "window": 16, "windows": 8}


# -- opening --------------------------------------------------------------------------------------


def test_a_lab_by_name_and_one_of_a_module_give_the_same_numbers(
    folder: Path, reading: dict[str, Any]
):
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    named = package.open(folder).verify(PLANTED, **reading)
    for made in (package.open(model, tokenizer), package.open((model, tokenizer))):
        result = made.verify(PLANTED, **reading)
        assert result.made(**vars(named.provenance)) == named
    assert made.model is model
    assert made.name == str(folder)


def test_the_fingerprint_of_a_module_is_of_its_weights(folder: Path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    before = package.open(model).fingerprint
    assert package.open(model).fingerprint == before
    assert len(before or "") == 64
    model.get_parameter("model.layers.0.mlp.down_proj.weight").data[0, 0] += 1
    assert package.open(model).fingerprint != before


def test_a_module_without_a_tokenizer_can_do_what_needs_no_text():
    lab = package.open(tiny_model("llama"))
    assert len(lab.sites().sites) > 10
    assert lab.ablate("L1.mlp.down[3, 4]").entries == 1
    with pytest.raises(BadInput, match="ships no tokenizer"):
        lab.measure(window=16)


def test_what_cannot_be_opened(tmp_path: Path, copy: Path):
    with pytest.raises(BadInput, match="no model folder at"):
        package.open(tmp_path / "nowhere")
    (copy / "model.safetensors").unlink()
    with pytest.raises(BadCheckpoint, match=r"no .*safetensors"):
        package.open(copy)
    with pytest.raises(BadInput, match="dtype banana is not known"):
        package.open("patient", dtype="banana")
    broken = tiny_model("llama")
    broken.get_parameter("model.layers.0.mlp.down_proj.weight").data[:] = float("nan")
    with pytest.raises(SurgeonError, match="not finite"):
        package.open(broken)


# -- texts ----------------------------------------------------------------------------------------


def test_a_text_is_cut_once(lab: Lab, text: Path):
    one = lab.corpus(TextSettings(str(text), window=16, windows=6))
    assert lab.corpus(TextSettings(str(text), window=16, windows=6)) is one
    assert lab.corpus(TextSettings(str(text), window=16, windows=7)) is not one
    assert one.windows.shape == (6, 16)
    record = one.record()
    assert (record.name, record.tokens, record.bos) == (text.name, 6 * 15, True)


def test_the_text_that_is_not_named_fits_the_model(text: Path, folder: Path):
    model = tiny_model("llama")  # which reads 64 positions
    lab = package.open(model, AutoTokenizer.from_pretrained(folder))
    with pytest.raises(BadInput, match="window 256 is longer than the 64 positions"):
        lab.corpus(TextSettings())
    assert lab.corpus(TextSettings(), fit=True).windows.shape[1] == 64
    with pytest.raises(BadInput, match="longer than the 64 positions"):
        lab.corpus(TextSettings(str(text)), fit=True)


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"text": "nowhere.txt"}, BadText, "No such file"),
        ({"window": 1}, BadInput, "leaves nothing to predict"),
        ({"windows": 0}, BadInput, "leaves no text"),
        ({"bos": "banana"}, BadInput, "bos banana is not known"),
        ({"window": "many"}, BadInput, "window is 'many'; it should be a whole number."),
    ],
)
def test_texts_that_cannot_be_read(lab: Lab, settings: Any, error: type[Exception], said: str):
    with pytest.raises(error, match=said):
        lab.measure(**settings)


# -- verbs ----------------------------------------------------------------------------------------


def test_every_study_is_a_method_and_every_method_a_study():
    for name in STUDIES:
        method = getattr(Lab, name.replace(" ", "_").replace("-", "_"), None)
        if STUDIES[name].opens:
            assert method is not None, name
            assert (method.__doc__ or "").strip().endswith("."), name


def test_every_kind_that_a_study_returns_is_registered():
    """What no report, no notebook and no `from_json` could find would be lost."""
    for study in STUDIES.values():
        annotation = study.module.run.__annotations__["return"]
        for name in annotation.split("|"):
            kind = getattr(study.module, name.strip()).kind
            assert kind in RESULTS, name


def test_a_result_says_of_what_it_is_and_what_makes_it_again(lab: Lab, reading: dict[str, Any]):
    result = lab.verify(PLANTED, seed=3, **reading)
    about = result.provenance
    assert (about.model, about.fingerprint) == (lab.name, lab.fingerprint)
    assert about.corpus == lab.corpus(TextSettings(**reading)).record()
    assert (about.seed, about.settings["at"], about.settings["windows"]) == (3, [PLANTED], 8)
    assert about.settings["controls"] == 20  # defaults, too
    assert about.surgeon
    assert eval(about.command or "", {"lab": lab}) == result


def test_an_unknown_setting_and_an_unknown_verb(lab: Lab):
    with pytest.raises(BadInput, match="windos is no setting of verify; did you mean windows"):
        lab.verify(PLANTED, windos=3)
    with pytest.raises(BadInput, match="verify needs at"):
        lab.verify()
    with pytest.raises(BadInput, match="verifi is no verb; did you mean verify"):
        lab.run("verifi")


def test_the_model_is_left_as_it_was(folder: Path, reading: dict[str, Any]):
    lab = package.open(folder)
    before = {name: weight.clone() for name, weight in lab.model.state_dict().items()}
    injury = lab.ablate(PLANTED)
    lab.find(**reading)
    lab.verify(PLANTED, **reading)
    lab.measure(injury, **reading)
    with pytest.raises(BadInput):
        lab.measure(injury, text="nowhere.txt")
    after = lab.model.state_dict()
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())


def test_work_tells_where_it_is(folder: Path, reading: dict[str, Any]):
    lab, told = package.open(folder), []
    lab.listen(lambda *step: told.append(step))
    lab.verify(PLANTED, **reading)
    assert told[-1][0] == "verify"
    assert told[-1][1] == told[-1][2]


def test_a_finding_is_made_once(folder: Path, reading: dict[str, Any], monkeypatch: Any):
    """`vital` in three verbs costs one search."""
    from surgeon.studies import naming

    calls = []
    search = naming.find
    monkeypatch.setattr(naming, "find", lambda *a: calls.append(1) or search(*a))
    lab = package.open(folder)
    injury = lab.ablate("vital", **reading)
    assert lab.verify("vital", **reading).at == lab.verify(PLANTED, **reading).at
    assert injury.provenance.settings["at"] == [PLANTED]
    assert len(calls) == 1
    lab.ablate("vital", **{**reading, "windows": 10})
    assert len(calls) == 2


def test_results_are_the_same_in_another_lab(folder: Path, reading: dict[str, Any]):
    def run() -> list[Result]:
        lab = package.open(folder)
        return [lab.find(**reading), lab.verify(PLANTED, **reading), lab.sites()]

    for one, two in zip(run(), run(), strict=True):
        assert json.dumps(one.to_json()) == json.dumps(two.to_json())


def test_a_streamed_lab_gives_what_a_loaded_one_gives(
    folder: Path, reading: dict[str, Any], tmp_path: Path
):
    shutil.copytree(folder, tmp_path / "copy")
    loaded = package.open(folder).find(**reading)
    streamed = package.open(tmp_path / "copy", stream=True).find(**reading)
    assert [one.parts for one in streamed.sets] == [one.parts for one in loaded.sets]
    assert streamed.bytes_read > 0
    assert loaded.bytes_read is None
    damage = streamed.sets[0].damage.joint_nats
    assert damage == pytest.approx(loaded.sets[0].damage.joint_nats, abs=1e-5)


def test_a_sweep_of_one_verb_gives_what_the_verb_gives(lab: Lab, reading: dict[str, Any]):
    grid = {"mode": ["scale:0.5", "zero"], "at": [PLANTED, "L1.mlp.down[3, :]"]}
    table = lab.sweep("measure", grid, **reading)
    assert [(row["mode"], row["at"]) for row in table.rows()] == [
        (mode, at) for mode in grid["mode"] for at in grid["at"]
    ]
    for row in table.rows():
        alone = lab.measure(mode=row["mode"], at=row["at"], **reading)
        assert row["damage_nats"] == alone.damage_nats
    assert type(table).from_json(table.to_json()) == table
    about = table.provenance
    assert (about.model, about.corpus) == (alone.provenance.model, alone.provenance.corpus)
    again = eval(str(about.command), {"lab": lab})
    assert again.table == table.table


def test_a_sweep_is_checked_before_its_first_run(lab: Lab, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("surgeon.studies.measure.run", lambda *_: pytest.fail("it was run"))
    with pytest.raises(BadInput, match="banana"):
        lab.sweep("measure", {"mode": ["zero", "banana"]}, at=PLANTED)
    with pytest.raises(BadInput, match="no verb"):
        lab.sweep("mesure", {"mode": ["zero"]})
    with pytest.raises(BadInput, match="no combination"):
        lab.sweep("measure", {"mode": []})


def test_a_patch_goes_onto_a_plain_model(lab: Lab):
    """As `lab.model` is, for who goes on with transformers alone."""
    patch = lab.ablate(PLANTED).patch
    weight = lab.model.model.layers[0].mlp.down_proj.weight
    before = weight.detach().clone()
    with patch.applied(lab.model):
        assert weight[5, 7] == 0
    patch.apply_(lab.model)
    assert weight[5, 7] == 0
    patch.undo_(lab.model)
    assert torch.equal(weight, before)
