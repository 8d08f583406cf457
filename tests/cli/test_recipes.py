"""Recipes: the shipped ones read, the patient's runs offline, and what is wrong with one is said in
a sentence.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from surgeon.repair import REFERENCE
from surgeon.studies.recipes.reading import Recipe, read_recipe
from surgeon.studies.recipes.repair import SHOWN
from surgeon.studies.registry import read_result, study_named
from surgeon.studies.run import KINDS

RECIPES = Path(__file__).parents[2] / "recipes"


def repair_of(recipe: Recipe) -> Any:
    """The settings that the recipe's repair is made with."""
    return study_named("repair").configured(recipe.step("repair", "repair", recipe.body["repair"]))


def test_the_shipped_recipes_read():
    # plans of sweeps are read by tests/sweep
    names = {p.name for p in RECIPES.glob("*.yaml") if not p.name.startswith("sweep-")}
    assert names == {
        "olmo-1b-superweight.yaml",
        "patient-superweight.yaml",
        "four-edits.yaml",
        "rome-conditioning.yaml",
    }
    recipes = {name: read_recipe(RECIPES / name) for name in names}
    assert all(set(recipe.body) & set(KINDS) for recipe in recipes.values())
    olmo, patient = recipes["olmo-1b-superweight.yaml"], recipes["patient-superweight.yaml"]
    assert olmo.body["injury"]["at"] == ["L1.mlp.down[1764, 1710]"]
    assert patient.body["injury"]["at"] == "vital"
    assert olmo.text == patient.text == {"window": 128, "windows": 240}
    assert olmo.body["published"]["recovered"] == 0.927
    reference = study_named("repair").configured({"injury": "p", **REFERENCE})
    assert repair_of(olmo).repair == repair_of(patient).repair == reference.repair


def test_the_shipped_plan_of_a_sweep_reads(surgeon):
    status, stdout, _ = surgeon("sweep", RECIPES / "sweep-patient.yaml", "--dry-run")
    assert status == 0
    # measure; find and repair, twice; four injuries; 3 bits x 2 blocks; two editors, twice
    assert sum(" on patient" in line for line in stdout.splitlines()) == 1 + 2 + 4 + 2 + 6 + 4


@pytest.mark.slow
def test_the_patient_is_broken_and_repaired_offline(surgeon, tmp_path):
    status, stdout, stderr = surgeon(
        "run", RECIPES / "patient-superweight.yaml", "-o", tmp_path / "run", "--json"
    )
    assert (status, stderr) == (0, f"report: {tmp_path / 'run' / 'report.html'}\n")
    document = json.loads(stdout)
    repair = document["repair"]
    assert document["figures"] == []
    assert repair["nll"]["broken"] > repair["nll"]["base"] + 0.3
    # the reference's rate of 1e-3 is small for weights of this size: 400 steps bring back less than
    # half
    assert repair["recovered"] > 0.3
    assert repair["control"]["recovered"] < repair["recovered"] - 0.25
    assert repair["steps"] == 400
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        "recipe-repair.json",
        "injury.safetensors",
        "repair.safetensors",
        "report.html",
    }


def test_published_figures_stand_beside_the_measured_ones(surgeon, folder, text, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"title: t\nmodel: {folder}\nwindow: 16\ninjury:\n  at: ['L0.mlp.down[5, 7]']\nrepair:\n "
        " method: graft\npublished:\n  nll.base: 1.5\n  recovered: 0.9\n"
    )
    status, stdout, stderr = surgeon("run", recipe, "--text", text, "--json")
    assert status == 0, stderr
    document = json.loads(stdout)
    assert [f["published"] for f in document["figures"]] == [1.5, 0.9]
    assert document["figures"][0]["measured"] == document["repair"]["nll"]["base"]
    assert document["figures"][1]["measured"] == document["repair"]["recovered"]
    run = tmp_path / "run"
    status, stdout, stderr = surgeon("run", recipe, "--text", text, "-o", run)
    assert (status, stderr) == (0, f"report: {run / 'report.html'}\n")
    assert "published" in stdout
    assert "measured" in stdout
    assert {p.name for p in run.iterdir()} == {
        "recipe-repair.json",
        "injury.safetensors",
        "repair.safetensors",
        "report.html",
    }
    kept = json.loads((run / "recipe-repair.json").read_text())
    assert kept["figures"] == document["figures"]
    assert read_result(kept).to_json() == kept
    assert "Published and measured" in (run / "report.html").read_text()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[1, 2]", "should be a mapping"),
        ("title: x\nmodel: y: z", "not YAML"),
        (
            "title: x\nmodel: y\n",
            "should hold one of injury, edits, together, conditioning, and it",
        ),
        ("title: x\nmodel: y\ninjury: {at: banana}\n", "'banana' is not an entry"),
        ("title: x\nmodel: y\ninjury: {mode: zero}\n", "r.yaml: injury: ablate needs at."),
        ("title: x\nmodel: y\nbanana: 1\ninjury: {at: vital}\n", "banana is not a key of a recipe"),
        (
            "title: x\nmodel: y\ninjury: {at: vital, mod: 1}\n",
            "injury.mod is not a setting of ablate; did you mean mode",
        ),
        (
            "title: x\nmodel: y\ninjury: {at: vital}\nrepair: {learning: 1}\n",
            "repair.learning is not a setting of repair",
        ),
        ("title: x\nmodel: y\ninjury: {at: vital}\nrepair: 3\n", "repair should be a mapping"),
        (
            "title: x\nmodel: y\ninjury: {at: vital}\nrepair: {steps: -1}\n",
            "r.yaml: repair: steps is -1; it must be at least",
        ),
        ("title: x\nmodel: y\ninjury: {at: vital}\nrepair: {method: pray}\n", "pray"),
        ("title: x\nmodel: y\nwindow: many\ninjury: {at: vital}\n", "window is 'many'"),
        ("title: x\nmodel: y\ninjury: {at: vital}\npublished: {nll.base: low}\n", "to numbers"),
        ("title: x\ninjury: {at: vital}\n", "with a title and a model"),
        ("title: x\nmodel: y\ninjury: {at: vital}\nedits: []\n", "holds injury and edits"),
        ("title: x\nmodel: y\nedits: 3\n", "edits should be a list"),
        ("title: x\nmodel: y\nedits: []\n", "names no edits"),
        ("title: x\nmodel: y\nedits: [{prompt: a}]\n", "an edit of edits lacks subject, target"),
        (
            "title: x\nmodel: y\nedits: [{prompt: 'a', subject: b, target: c}]\n",
            "should hold {} once",
        ),
        (
            "title: x\nmodel: y\nedits: [{prompt: 'a {}', subject: b, target: c, banana: 1}]\n",
            "edits.banana is not a setting of edit",
        ),
        (
            "title: x\nmodel: y\nedits: [{prompt: 'a {}', subject: b, target: c, method: pray}]\n",
            "method pray is not known|pray",
        ),
        (
            "title: x\nmodel: y\nedits: [{prompt: 'a {}', subject: b, target: c, controls: [1]}]\n",
            "list of texts",
        ),
        (
            "title: x\nmodel: y\nedits: [{prompt: 'a {}', subject: b, target: c, true: d}]\n",
            "the key True is no text",
        ),
        ("title: x\nmodel: y\ntogether: [{facts: []}]\n", "needs a list of facts"),
        (
            "title: x\nmodel: y\nconditioning: {subject: a, target: b, prompts: [], ridges: [1],"
            " tokens_per_dimension: [1]}\n",
            "at least one prompt",
        ),
        (
            "title: x\nmodel: y\nconditioning: {prompts: ['{}'], ridges: [1],"
            " tokens_per_dimension: [1]}\n",
            "lacks subject, target",
        ),
        (
            "title: x\nmodel: y\nconditioning: {subject: a, target: b, prompts: ['{}'],"
            " tokens_per_dimension: [x], ridges: [1]}\n",
            "list of numbers",
        ),
        ("title: 2024-01-01\nmodel: y\ninjury: {at: vital}\n", "write it in quotes"),
    ],
)
def test_a_wrong_recipe_is_said_so(surgeon, tmp_path, content, words):
    path = tmp_path / "r.yaml"
    path.write_text(content)
    status, out, err = surgeon("run", path)
    assert (status, out) == (2, "")
    assert re.search(words, err)


@pytest.mark.slow
def test_four_edits_on_the_patient(surgeon, tmp_path):
    """Every target that the patient can write at all has at least 0.98; Las Vegas is six tokens it
    never saw.
    """
    status, out, _ = surgeon("run", RECIPES / "four-edits.yaml", "-o", tmp_path / "run", "--json")
    document = json.loads(out)
    assert status == 0
    rows = [{"name": row["name"], **row["edit"]} for row in document["edits"]]
    least = {row["edit"]["method"]: row["least_target_probability"] for row in document["edits"]}
    assert document["published"] == []
    p = {
        row["name"]: row["target_probability"]["after"]
        for row in rows
        if row["name"] != "what is known of Google"
    }
    assert p.pop("Statue of Liberty to Las Vegas") < 0.1
    assert len(p) == 5
    assert min(p.values()) >= 0.98
    assert [row["name"] for row in rows if row["preflight"]["position_zero"]] == [
        "Google to Texas, at position 0"
    ]
    together = {row["method"]: row for row in rows if row["name"] == "what is known of Google"}
    assert set(together) == {"rome", "emmet", "memit"}
    assert min(least[method] for method in together if method != "rome") > 0.9
    assert document["edits"][6]["least_target_probability"] > 0.9
    assert (
        together["memit"]["preflight"]["relative_damage"]
        < together["rome"]["preflight"]["relative_damage"]
    )
    assert len(list((tmp_path / "run").glob("edit-*.safetensors"))) == 9


@pytest.mark.slow
def test_what_conditions_an_edit(surgeon):
    """As published: words before the subject make the update smaller, at every ridge and every size
    of the sample.
    """
    status, out, _ = surgeon("run", RECIPES / "rome-conditioning.yaml", "--json")
    assert status == 0
    rows = json.loads(out)["conditioning"]
    assert len(rows) == 18
    for first, behind in zip(rows[::2], rows[1::2], strict=True):
        assert first["position_zero"] > behind["position_zero"]
        assert first["update_norm_ratio"] > behind["update_norm_ratio"]
        assert first["nll_rise"] > behind["nll_rise"]
    few, many = rows[0], rows[12]
    assert few["ridge"] == many["ridge"] == 1e-4
    assert few["update_norm_ratio"] > many["update_norm_ratio"]
    assert few["direction_stability"] < many["direction_stability"]


def test_a_figure_that_is_not_measured_is_named(surgeon, folder, text, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"title: t\nmodel: {folder}\nwindow: 16\ninjury:\n  at: ['L0.mlp.down[5, 7]']\nrepair:"
        " {method: graft}\npublished: {charm: 1}\n"
    )
    status, _, stderr = surgeon("run", recipe, "--text", text)
    assert status == 2
    assert "charm" in stderr
    assert SHOWN[0] in stderr
