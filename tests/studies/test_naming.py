"""What names weights and what is a patch, in every form that a caller may have it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import surgeon as package
from surgeon import Entry, Lab, Region
from surgeon.errors import BadInput, BadPatch, SurgeonError, UnknownSite
from surgeon.patch import save, stacked
from surgeon.studies.lab import TextSettings
from surgeon.studies.naming import patch_of, patches_of, regions_of, vital_set

PLANTED = "L0.mlp.down[5, 7]"


@pytest.fixture(scope="module")
def lab(folder: Path) -> Lab:
    return package.open(folder)


@pytest.fixture(scope="module")
def reading(text: Path) -> TextSettings:
    return TextSettings(str(text), 16, 8)


def named(lab: Lab, at: Any, reading: TextSettings) -> list[str]:
    return [str(region) for region in regions_of(lab, at, reading)]


# -- weights --------------------------------------------------------------------------------------


def test_every_form_names_the_same(lab: Lab, reading: TextSettings):
    found = lab.find(text=reading.text, window=16, windows=8, only="mlp.down")
    (critical,) = found.sets
    verified = lab.verify(PLANTED, text=reading.text, window=16, windows=8)
    forms = (
        PLANTED,
        [PLANTED],
        (PLANTED,),
        Entry.parse(PLANTED),
        Region.parse(PLANTED),
        [Region.parse(PLANTED)],
        critical,
        [critical],
        found,
        verified,
        "vital",
        ["vital"],
    )
    for form in forms:
        assert named(lab, form, reading) == [PLANTED], form


def test_several_stand_in_the_order_given(lab: Lab, reading: TextSettings):
    at = ["L1.mlp.down[3, :]", Entry.parse(PLANTED), "L0.attn.out[:, 2]"]
    assert named(lab, at, reading) == ["L1.mlp.down[3, :]", PLANTED, "L0.attn.out[:, 2]"]


@pytest.mark.parametrize(
    ("at", "said"),
    [
        ([PLANTED, PLANTED], r"at: L0\.mlp\.down\[5, 7\] is given twice"),
        ([PLANTED, "L0.mlp.down[5, :]"], "share an entry"),
        ([PLANTED, "L0.mlp.down[:, 7]"], "share an entry"),
        ([PLANTED, "L0.mlp.down[:, :]"], "share an entry"),
        (["vital", PLANTED], "is given twice"),
        ([], "no weights are named; name at least one with at"),
        (3, "int names no weights"),
        ([{}], "dict names no weights"),
        ("banana", "is not an entry"),
        ("L9.mlp.down[0, 0]", "this model has 3 layers"),
        ("L0.mlp.down[99, 0]", "row 99 does not exist"),
    ],
)
def test_what_names_nothing(lab: Lab, reading: TextSettings, at: Any, said: str):
    with pytest.raises(BadInput, match=said):
        regions_of(lab, at, reading)


def test_an_unknown_site_is_an_unknown_site(lab: Lab, reading: TextSettings):
    with pytest.raises(UnknownSite):
        regions_of(lab, "L0.mlp.dwn[0, 0]", reading)


def test_where_nothing_is_vital(lab: Lab, reading: TextSettings):
    """The tiny model without its planted weight."""
    with lab.ablate(PLANTED).patch.applied(lab.anatomy):
        other = package.open(lab.model, lab.tokenizer)
        none = other.find(text=reading.text, window=16, windows=8, only="mlp.down")
        assert none.sets == []
        with pytest.raises(SurgeonError, match="nothing vital was found"):
            vital_set(other, reading)
        with pytest.raises(BadInput, match="this finding holds no set"):
            regions_of(other, none, reading)


# -- patches --------------------------------------------------------------------------------------


def test_every_form_of_a_patch(lab: Lab, tmp_path: Path):
    injury = lab.ablate(PLANTED)
    path = tmp_path / "injury.safetensors"
    save(injury.patch, path)
    for form in (injury, injury.patch, path, str(path)):
        assert patch_of(form).digest == injury.patch.digest
        assert [one.digest for one in patches_of(form)] == [injury.patch.digest]
    assert patches_of(()) == patches_of([]) == []
    assert len(patches_of([injury, path])) == 2


def test_what_is_no_patch(lab: Lab, tmp_path: Path):
    (tmp_path / "p").write_bytes(b"banana" * 20)
    with pytest.raises(BadPatch, match="is damaged or is not a patch"):
        patch_of(tmp_path / "p")
    with pytest.raises(BadInput, match="No such file"):
        patch_of(tmp_path / "nowhere")
    with pytest.raises(BadInput, match="SiteList holds no patch"):
        patch_of(lab.sites())
    injury = type(lab.ablate(PLANTED))
    read = injury.from_json(lab.ablate(PLANTED).to_json())
    with pytest.raises(BadInput, match="Injury holds no patch"):
        patch_of(read)
    with pytest.raises(BadInput, match="int holds no patch"):
        patch_of(3)


def test_a_stack_is_applied_in_order_and_taken_off(lab: Lab):
    first, second = lab.ablate(PLANTED).patch, lab.ablate("L1.mlp.down[3, 4]").patch
    before = {name: weight.clone() for name, weight in lab.model.state_dict().items()}
    view = lab.anatomy.view("L0.mlp.down")
    with stacked(lab.anatomy, [first, second]):
        assert float(view.read()[5, 7]) == 0.0
        assert float(lab.anatomy.view("L1.mlp.down").read()[3, 4]) == 0.0
    with pytest.raises(SurgeonError), stacked(lab.anatomy, [first, first]):
        pass
    after = lab.model.state_dict()
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())
