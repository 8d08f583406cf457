"""Recipes: the shipped ones read, the patient's runs offline, and what is wrong with one is said in a sentence."""

import json
from pathlib import Path

import pytest

from surgeon.cli.recipe import SHOWN, read_recipe
from surgeon.errors import BadInput
from surgeon.repair import RepairConfig

RECIPES = Path(__file__).parents[2] / "recipes"


def test_the_shipped_recipes_read():
    names = {p.name for p in RECIPES.glob("*.yaml")}
    assert names == {"olmo-1b-superweight.yaml", "patient-superweight.yaml"}
    olmo, patient = (read_recipe(RECIPES / n) for n in sorted(names))
    assert olmo.at == ("L1.mlp.down[1764, 1710]",)
    assert olmo.repair == patient.repair == RepairConfig.reference()
    assert (olmo.window, olmo.windows) == (patient.window, patient.windows)
    assert olmo.published["recovered"] == 0.927
    assert patient.at == "vital"


@pytest.mark.slow
def test_the_patient_is_broken_and_repaired_offline(surgeon, tmp_path):
    status, stdout, stderr = surgeon("run", RECIPES / "patient-superweight.yaml", "-o", tmp_path / "run", "--json")
    assert (status, stderr) == (0, "")
    document = json.loads(stdout)
    repair = document["repair"]
    assert document["figures"] == []
    assert repair["nll"]["broken"] > repair["nll"]["base"] + 0.3
    # the reference's rate of 1e-3 is small for weights of this size: 400 steps bring back less than half
    assert repair["recovered"] > 0.3
    assert repair["control"]["recovered"] < repair["recovered"] - 0.25
    assert repair["steps"] == 400
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"run.json", "injury.safetensors", "repair.safetensors"}


def test_published_figures_stand_beside_the_measured_ones(surgeon, folder, text, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"title: t\nmodel: {folder}\nwindow: 16\ninjury:\n  at: ['L0.mlp.down[5, 7]']\nrepair:\n  method: graft\n"
        "published:\n  nll.base: 1.5\n  recovered: 0.9\n"
    )
    status, stdout, stderr = surgeon("run", recipe, "--text", text, "--json")
    assert status == 0, stderr
    document = json.loads(stdout)
    assert [f["published"] for f in document["figures"]] == [1.5, 0.9]
    assert document["figures"][0]["measured"] == document["repair"]["nll"]["base"]
    assert document["figures"][1]["measured"] == document["repair"]["recovered"]
    status, stdout, _ = surgeon("run", recipe, "--text", text)
    assert status == 0
    assert "published" in stdout
    assert "measured" in stdout


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[1, 2]", "should be a mapping"),
        ("title: x\nmodel: y: z", "not YAML"),
        ("title: x\nmodel: y\n", "needs a title, a model and an injury"),
        ("title: x\nmodel: y\ninjury: {at: banana}\n", "injury.at is 'banana'"),
        ("title: x\nmodel: y\ninjury: {at: []}\n", "injury.at"),
        ("title: x\nmodel: y\nbanana: 1\ninjury: {at: vital}\n", "banana is not a key"),
        ("title: x\nmodel: y\ninjury: {at: vital, how: 1}\n", "injury.how is not a key"),
        ("title: x\nmodel: y\ninjury: {at: vital}\nrepair: {learning: 1}\n", "repair.learning is not a key"),
        ("title: x\nmodel: y\ninjury: {at: vital}\nrepair: {distil: {x: 1}}\n", "repair.distil.x is not a key"),
        ("title: x\nmodel: y\ninjury: {at: vital}\nrepair: {method: pray}\n", "pray"),
        ("title: x\nmodel: y\nwindow: many\ninjury: {at: vital}\n", "window is 'many'"),
        ("title: x\nmodel: y\ninjury: {at: vital}\npublished: {nll.base: low}\n", "to numbers"),
    ],
)
def test_a_wrong_recipe_is_said_so(tmp_path, content, words):
    path = tmp_path / "r.yaml"
    path.write_text(content)
    with pytest.raises(BadInput, match=words):
        read_recipe(path)


def test_a_figure_that_is_not_measured_is_named(surgeon, folder, text, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"title: t\nmodel: {folder}\nwindow: 16\ninjury:\n  at: ['L0.mlp.down[5, 7]']\nrepair: {{method: graft}}\npublished: {{charm: 1}}\n"
    )
    status, _, stderr = surgeon("run", recipe, "--text", text)
    assert status == 2
    assert "charm" in stderr
    assert SHOWN[0] in stderr
