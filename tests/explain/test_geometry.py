"""Geometry and the top-k curve against plain arithmetic and patches made by hand."""

import pytest
import torch
from tiny import tiny_model

from surgeon.anatomy import Anatomy, Site
from surgeon.corpus import Corpus
from surgeon.errors import BadInput, WrongBase
from surgeon.explain import GeometryConfig, geometry, participation, topk_curve
from surgeon.measure import mean_nll
from surgeon.patch import Patch, ablate

SITE = Site.parse("L1.mlp.down")
WINDOWS = torch.randint(3, 99, (4, 16), generator=torch.Generator().manual_seed(0))
CORPUS = Corpus("random", WINDOWS, False)


def repair_of(
    anatomy: Anatomy, injury: Patch, row: int, cols: list[int], share: float = 0.5
) -> Patch:
    """Puts a share of the base back into some entries, and a little into others."""
    base = anatomy.view(SITE).read().clone()
    with injury.applied(anatomy):
        matrix = anatomy.view(SITE).read().clone()
        matrix[row, cols] += share * base[row, cols]
        return Patch.from_matrix(anatomy, {SITE: matrix})


@pytest.fixture(params=["llama", "gpt2"])
def anatomy(request: pytest.FixtureRequest) -> Anatomy:
    return Anatomy.of(tiny_model(request.param))


def damaging_row(anatomy: Anatomy) -> int:
    """A row whose loss costs something on these random windows, where most changes may as well
    help.
    """
    base = mean_nll(anatomy.model, WINDOWS)
    damage = []
    for row in range(8):
        with ablate(anatomy, [f"{SITE}[{row}, :]"]).applied(anatomy):
            damage.append(mean_nll(anatomy.model, WINDOWS) - base)
    return max(range(8), key=damage.__getitem__)


def test_a_line_is_plain_arithmetic(anatomy):
    row, cols = 5, [1, 7, 8, 20]
    base = anatomy.view(SITE).read()[row].double().clone()
    injury = ablate(anatomy, [f"{SITE}[{row}, 7]", f"{SITE}[{row}, 30]"])
    broken = base.clone()
    broken[[7, 30]] = 0
    merged = broken.clone()
    merged[cols] += 0.5 * base[cols]
    described = geometry(
        anatomy, [injury, repair_of(anatomy, injury, row, cols)], GeometryConfig(entries=3)
    )
    (line,) = described.lines
    assert str(line.region) == f"{SITE}[{row}, :]"
    delta = merged - broken
    vectors = {"base": base, "broken": broken, "delta": delta, "merged": merged}
    assert line.norms == pytest.approx(
        {name: v.norm().item() for name, v in vectors.items()}, rel=1e-5
    )
    for pair, value in line.cosines.items():
        a, b = pair.split("_")
        assert value == pytest.approx(
            torch.cosine_similarity(vectors[a], vectors[b], dim=0).item(), abs=1e-5
        )
    order = delta.abs().argsort(descending=True).tolist()
    assert [str(e.entry) for e in line.top] == [f"{SITE}[{row}, {c}]" for c in order[:3]]
    assert line.changed == 4
    ablated = {str(e.entry): e.rank for e in line.ablated}
    assert ablated == {f"{SITE}[{row}, 7]": order.index(7) + 1, f"{SITE}[{row}, 30]": None}
    assert line.injured == 2
    assert torch.equal(anatomy.view(SITE).read()[row].double(), base)


def test_a_lone_injury_is_its_own_delta_and_a_column_is_described_as_one(anatomy):
    described = geometry(anatomy, [ablate(anatomy, [f"{SITE}[:, 3]"])])
    (line,) = described.lines
    assert str(line.region) == f"{SITE}[:, 3]"
    assert line.cosines["delta_base"] == pytest.approx(-1)
    assert (line.norms["broken"], line.norms["merged"]) == (0, 0)
    assert str(line.top[0].entry).endswith(", 3]")


def test_effective_number_of_entries():
    assert participation(torch.tensor([0.0, 3.0, 0.0], dtype=torch.float64)) == pytest.approx(
        (1, 1)
    )
    assert participation(torch.ones(7, dtype=torch.float64)) == pytest.approx((7, 7))
    d = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    p = d**2 / 14
    assert participation(d) == pytest.approx((14**2 / 98, (-(p * p.log()).sum()).exp().item()))
    assert participation(torch.zeros(4, dtype=torch.float64)) == (0, 0)


def test_the_topk_curve_is_what_patches_made_by_hand_recover(anatomy):
    row = damaging_row(anatomy)
    injury = ablate(anatomy, [f"{SITE}[{row}, :]"])
    cols = [0, 3, 11, 12, 31]
    repair = repair_of(anatomy, injury, row, cols, share=1.0)
    by_hand = repair_of(anatomy, injury, row, cols[:2], share=0.9)
    curve = topk_curve(anatomy, [injury, repair], CORPUS, trained=[(2, by_hand), (3, by_hand)])
    base = anatomy.view(SITE).read().clone()
    nll = {"base": mean_nll(anatomy.model, WINDOWS)}
    with injury.applied(anatomy):
        nll["broken"] = mean_nll(anatomy.model, WINDOWS)

        def recovered(patch: Patch) -> float:
            with patch.applied(anatomy):
                return 1 - (mean_nll(anatomy.model, WINDOWS) - nll["base"]) / (
                    nll["broken"] - nll["base"]
                )

        for point in curve.points:
            if point.largest is not None:
                best = base[row, cols].abs().argsort(descending=True)[: point.k]
                matrix = anatomy.view(SITE).read().clone()
                chosen = torch.tensor(cols)[best]
                matrix[row, chosen] = base[row, chosen]
                assert point.largest == pytest.approx(
                    recovered(Patch.from_matrix(anatomy, {SITE: matrix})), abs=1e-6
                )
        trained = recovered(by_hand)
    assert (curve.nll.base, curve.nll.broken) == pytest.approx((nll["base"], nll["broken"]))
    points = {p.k: p for p in curve.points}
    assert list(points) == [1, 2, 3, 4, 5]
    assert (points[2].trained, points[3].trained) == pytest.approx((trained, trained))
    assert (points[3].largest, points[3].random) == (None, None)
    assert points[5].random is None
    low, high = points[1].random_range
    assert low <= points[1].random <= high
    assert torch.equal(anatomy.view(SITE).read(), base)


def test_random_entries_are_the_same_for_the_same_seed():
    anatomy = Anatomy.of(tiny_model("llama"))
    row = damaging_row(anatomy)
    injury = ablate(anatomy, [f"{SITE}[{row}, :]"])
    patches = [injury, repair_of(anatomy, injury, row, list(range(20)))]
    one, two, other = (topk_curve(anatomy, patches, CORPUS, seed=seed).points for seed in (0, 0, 1))
    assert one == two != other


def test_what_cannot_be_explained_is_said():
    anatomy = Anatomy.of(tiny_model("llama"))
    injury = ablate(anatomy, [f"{SITE}[5, :]"])
    with pytest.raises(BadInput, match="without a patch"):
        geometry(anatomy, [])
    elsewhere = repair_of(anatomy, injury, 5, [3])
    with pytest.raises(WrongBase):  # it was made on the broken model
        geometry(anatomy, [elsewhere, injury])
    nothing = ablate(anatomy, [f"{SITE}[5, :]"], "scale:1")
    with pytest.raises(BadInput, match="change no entry"):
        geometry(anatomy, [nothing])
    with pytest.raises(BadInput, match="an injury and a repair"):
        topk_curve(anatomy, [injury], CORPUS)
    with injury.applied(anatomy), pytest.raises(BadInput, match="undo it"):
        geometry(anatomy, [injury])
    base = anatomy.view(SITE).read().clone()
    helps = next(
        i
        for row in range(8)
        if (i := ablate(anatomy, [f"{SITE}[{row}, :]"])) and _damage(anatomy, i) < 0
    )  # on random tokens losing a row helps as often as not
    row = next(iter(helps.on(SITE))).index
    with pytest.raises(BadInput, match="does no damage"):
        topk_curve(anatomy, [helps, repair_of(anatomy, helps, row, [3])], CORPUS)
    assert torch.equal(anatomy.view(SITE).read(), base)


def _damage(anatomy: Anatomy, injury: Patch) -> float:
    base = mean_nll(anatomy.model, WINDOWS)
    with injury.applied(anatomy):
        return mean_nll(anatomy.model, WINDOWS) - base
