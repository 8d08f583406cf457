"""Ratios, ranks, grades and refusals, against brute force on checkpoints of every architecture."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import CONFIGS, saved, tiny_model
from transformers import PreTrainedModel

from surgeon.anatomy import Anatomy, Entry, Site
from surgeon.audit import Audit, Curve, SuperActivation, Watched, audit, open_pair
from surgeon.errors import BadInput


def audited(base: PreTrainedModel, other: PreTrainedModel, folder: Path, *sets: Watched) -> Audit:
    return audit(*open_pair(saved(base, folder / "base"), saved(other, folder / "other")), sets)


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_ratio_and_rank(kind: str, tmp_path: Path) -> None:
    """Every role of a layer, as the model in memory has it, whatever the checkpoint's names and
    layout.
    """
    base, other = tiny_model(kind), tiny_model(kind)
    before, after = Anatomy.of(base), Anatomy.of(other)
    entries = []
    for number, site in enumerate(
        s
        for s in before.addresses
        if s.layer == 1 and not s.role.startswith("norm.") and s.expert in (None, 2)
    ):
        entry = Entry(site, 2, 1)
        before.view(site).set_(torch.tensor([2]), torch.tensor([1]), torch.tensor([3.0]))
        after.view(site).set_(
            torch.tensor([2]), torch.tensor([1]), torch.tensor([3.0 * (0.2 + 0.1 * number)])
        )
        entries.append(entry)
    result = audited(base, other, tmp_path, *(Watched((e,)) for e in entries))
    assert [e.entry for e in result.entries] == entries
    for number, found in enumerate(result.entries):
        matrices = before.view(found.entry.site).read(), after.view(found.entry.site).read()
        assert found.base == matrices[0][2, 1]
        assert found.other == matrices[1][2, 1]
        assert found.ratio == pytest.approx(0.2 + 0.1 * number)
        for matrix, rank in zip(matrices, (found.rank_base, found.rank), strict=True):
            assert (
                rank
                == sorted(matrix.abs().flatten().tolist(), reverse=True).index(
                    float(matrix[2, 1].abs())
                )
                + 1
            )
        (cosine,) = [one.cosine for one in result.matrices if one.site == found.entry.site]
        assert cosine == pytest.approx(1)


@pytest.mark.parametrize(
    ("ratio", "verdict"),
    [
        (1.0, "ok"),
        (0.75, "ok"),
        (2.0, "ok"),
        (0.7499, "amber"),
        (0.5, "amber"),
        (2.01, "amber"),
        (3.0, "amber"),
        (0.4999, "red"),
        (0.0, "red"),
        (-1.0, "red"),
        (3.01, "red"),
        (None, "red"),
        (float("nan"), "red"),
        (float("inf"), "red"),
    ],
)
def test_the_curve(ratio: float | None, verdict: str) -> None:
    assert Curve().grade(ratio) == verdict


def test_a_set_is_graded_by_its_sum_and_by_the_entries_that_carry_much() -> None:
    curve = Curve()
    many = [1.0] * 100
    # the small ones may be rounded away: 20 of 100 equal entries gone leave 0.8 of the sum
    assert curve.of_set([0.0] * 20 + [1.0] * 80, many) == (pytest.approx(0.8), "ok")
    assert curve.of_set([0.0] * 40 + [1.0] * 60, many) == (pytest.approx(0.6), "amber")
    assert curve.of_set([0.0] * 60 + [1.0] * 40, many) == (pytest.approx(0.4), "red")
    # one that carries a tenth may not
    assert curve.of_set([0.0, *[1.0] * 9], [1.0] * 10) == (pytest.approx(0.9), "red")
    assert curve.of_set([0.0, *[1.0] * 10], [1.0] * 11) == (pytest.approx(10 / 11), "ok")
    # what works against the sum counts against it
    assert curve.of_set([0.0, 1.0], [-0.05, 1.0]) == (pytest.approx(1 / 0.95), "ok")
    assert curve.of_set([None, 1.0], [0.01, 1.0]) == (None, "red")


def test_sets(tmp_path: Path) -> None:
    base, other = tiny_model("llama"), tiny_model("llama")
    row = [Entry(Site(0, "mlp.down"), 5, c) for c in range(48)]
    matrix = Anatomy.of(other).view(Site(0, "mlp.down")).stored
    small = matrix[5].abs().argsort()[:24]
    matrix[5, small] = 0
    single = Entry(Site(1, "mlp.down"), 5, 7)
    Anatomy.of(other).view(single.site).stored[5, 7] *= 0.6
    result = audited(base, other, tmp_path, Watched(tuple(row)), Watched((single,)))
    of_row = Anatomy.of(base).view(Site(0, "mlp.down")).stored[5].abs()
    assert result.sets[0].ratio == pytest.approx(float(1 - of_row[small].sum() / of_row.sum()))
    assert [s.verdict for s in result.sets] == ["ok", "amber"]
    assert result.verdict == "amber"
    assert sum(e.verdict == "red" for e in result.sets[0].entries) == 24
    # with shares that say that only the zeroed entries mattered
    shares = tuple(1.0 if c in small else 0.0 for c in range(48))
    (again,) = audited(base, other, tmp_path / "again", Watched(tuple(row), shares)).sets
    assert (again.ratio, again.verdict) == (0, "red")


def test_not_finite(tmp_path: Path) -> None:
    other = tiny_model("llama")
    entry = Entry(Site(0, "mlp.down"), 5, 7)
    Anatomy.of(other).view(entry.site).stored[5, 7] = float("nan")
    (found,) = audited(tiny_model("llama"), other, tmp_path, Watched((entry,))).entries
    assert (found.other, found.ratio, found.rank, found.verdict) == (None, None, None, "red")


def test_relatives_and_strangers(tmp_path: Path) -> None:
    """A pruned, a merged and a fine-tuned model are relatives; one trained from another seed is
    not, nor is one of another shape.
    """
    watched = Watched((Entry(Site(0, "mlp.down"), 5, 7),))
    base = tiny_model("llama")
    pruned, merged = tiny_model("llama"), tiny_model("llama")
    matrix = Anatomy.of(pruned).view(Site(0, "mlp.down")).stored
    matrix[matrix.abs() < matrix.abs().quantile(0.9)] = 0
    matrix[5, 7] = 0
    assert audited(base, pruned, tmp_path / "pruned", watched).verdict == "red"
    for mine, theirs in zip(
        merged.parameters(), tiny_model("llama", seed=9).parameters(), strict=True
    ):
        mine.data = 0.8 * mine.data + 0.2 * theirs.data
    theirs = Anatomy.of(tiny_model("llama", seed=9)).view(Site(0, "mlp.down")).stored[5, 7]
    mine = Anatomy.of(base).view(Site(0, "mlp.down")).stored[5, 7]
    (found,) = audited(base, merged, tmp_path / "merged", watched).entries
    assert found.ratio == pytest.approx(float(0.8 + 0.2 * theirs / mine), rel=1e-5)
    with pytest.raises(BadInput, match="no relative"):
        audited(base, tiny_model("llama", seed=9), tmp_path / "seed", watched)
    with pytest.raises(BadInput, match=r"shape \(out, in\) = \(32, 64\)"):
        audited(base, tiny_model("llama", intermediate_size=64), tmp_path / "wide", watched)
    deep = Watched((Entry(Site(2, "mlp.down"), 5, 7),))
    with pytest.raises(BadInput, match=r"has no L2\.mlp\.down"):
        audited(base, tiny_model("llama", num_hidden_layers=2), tmp_path / "short", deep)


def test_nothing_to_compare(tmp_path: Path) -> None:
    base = tiny_model("llama")
    Anatomy.of(base).view("L0.mlp.down").stored[5, 7] = 0
    with pytest.raises(BadInput, match="zero or not finite"):
        audited(base, base, tmp_path / "a", Watched((Entry(Site(0, "mlp.down"), 5, 7),)))
    with pytest.raises(BadInput, match="no row 32"):
        audited(base, base, tmp_path / "b", Watched((Entry(Site(0, "mlp.down"), 32, 7),)))
    with pytest.raises(BadInput, match="no entries"):
        audited(base, base, tmp_path / "c")


def test_only_the_matrices_concerned_are_read(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    result = audited(model, model, tmp_path, Watched((Entry(Site(1, "mlp.down", 2), 3, 4),)))
    assert result.bytes_read == 2 * Anatomy.of(model).view("L1.mlp.down.e2").read().numel() * 4
    assert result.verdict == "ok"


def test_round_trip_and_one_screen(tmp_path: Path) -> None:
    """Also with entries that have no finite ratio, and with activations."""
    other = tiny_model("llama")
    view = Anatomy.of(other).view("L0.mlp.down")
    view.stored[5, 7] = float("nan")
    row = tuple(Entry(Site(0, "mlp.down"), 5, c) for c in range(48))
    result = audited(tiny_model("llama"), other, tmp_path, Watched(row), Watched(row[:1]))
    result = replace(
        result,
        source="given",
        activations=[SuperActivation(Site(0, "mlp.down"), 5, 0.0, 1.5)],
        not_run="a reason",
    )
    document = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert Audit.from_json(document) == result
    assert document["verdict"] == "red"
    assert document["entries"] == [entry for one in document["sets"] for entry in one["entries"]]
    assert [row["set"] for row in result.rows()] == [1] * 48 + [2]
    assert result.rows()[7]["entry"] == row[7]
    lines = repr(result).splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 100


def test_bounds_of_the_grades_stand_in_order() -> None:
    with pytest.raises(BadInput, match=r"weak 0\.4"):
        Curve(weak=0.4)
    assert Curve(broken=0.2, weak=0.5).grade(0.5) == "ok"
    assert Curve(broken=0.2, weak=0.5).grade(0.3) == "amber"
