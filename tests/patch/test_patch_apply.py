"""Patches on a model in memory: exact, refused without a trace, and never on the wrong tensor."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from tiny import tiny_model
from torch import Tensor

from surgeon.anatomy import Anatomy, Entry, Site
from surgeon.errors import BadInput, PackedWeight, PatchConflict, Refused, TiedWeight, WrongBase
from surgeon.patch import (
    EntriesDelta,
    LineDelta,
    LowRankDelta,
    Patch,
    ablate,
    applied_patches,
    compose,
)

DOWN = Site(0, "mlp.down")
HALVES = [torch.float32, torch.bfloat16, torch.float16]


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8).clone()


def state(anatomy: Anatomy) -> dict[str, Tensor]:
    return {name: bits(p) for name, p in anatomy.model.named_parameters()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def llama(dtype: torch.dtype = torch.float32) -> Anatomy:
    return Anatomy.of(tiny_model("llama").to(dtype))


def entries(anatomy: Anatomy, *at: tuple[int, int], value: float = 7.0) -> Patch:
    return Patch.from_entries(anatomy, [Entry(DOWN, r, c) for r, c in at], [value] * len(at))


def rank_one(anatomy: Anatomy, site: Site = DOWN, seed: int = 0) -> Patch:
    n_out, n_in = anatomy.view(site).shape
    g = torch.Generator().manual_seed(seed)
    return Patch.low_rank(
        anatomy, site, torch.randn(n_out, 1, generator=g), torch.randn(1, n_in, generator=g)
    )


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", ["entries", "row", "column", "low rank"])
def test_undo_restores_every_bit(dtype: torch.dtype, kind: str) -> None:
    anatomy = llama(dtype)
    view = anatomy.view(DOWN)
    with torch.no_grad():  # a negative zero and a NaN with a payload among the weights
        view.stored[3, 5] = -0.0
        view.stored.view(torch.int16 if dtype != torch.float32 else torch.int32)[3, 6] = -3
        assert view.stored[3, 6].isnan()
    n_out, n_in = view.shape
    before = state(anatomy)
    patch = {
        "entries": lambda: entries(anatomy, (3, 5), (3, 6), (0, 0)),
        "row": lambda: ablate(anatomy, [f"{DOWN}[3, :]"]),
        "column": lambda: ablate(anatomy, [f"{DOWN}[:, 5]"], "scale:-3"),
        "low rank": lambda: Patch.low_rank(
            anatomy, DOWN, torch.ones(n_out, 2), torch.ones(2, n_in)
        ),
    }[kind]()
    assert same(before, state(anatomy))
    patch.apply_(anatomy)
    assert not same(before, state(anatomy))
    patch.undo_(anatomy)
    assert same(before, state(anatomy))
    with pytest.raises(ZeroDivisionError), patch.applied(anatomy):
        _ = 1 / int(same(before, state(anatomy)))
    assert same(before, state(anatomy))
    assert not applied_patches(anatomy)


def test_only_what_is_named_changes() -> None:
    anatomy = llama()
    with torch.no_grad():
        anatomy.view(DOWN).stored[:, 7] = -0.0
    old = anatomy.view(DOWN).read().clone()
    left, right = torch.zeros(32, 1), torch.ones(1, 48)
    left[4] = 1
    right[0, 7] = 0  # the column of negative zeros is not touched
    patch = Patch.low_rank(anatomy, DOWN, left, right)
    with patch.applied(anatomy):
        new = anatomy.view(DOWN).read()
        changed = (bits(new).view(32, 48, 4) != bits(old).view(32, 48, 4)).any(-1)
        assert torch.equal(changed, patch.touched(DOWN))
        torch.testing.assert_close(new[4, :7], old[4, :7] + 1)


def test_the_smallest_kind_is_chosen() -> None:
    anatomy = llama()
    kinds = {
        "[3, 5]": EntriesDelta,
        "[3, :]": LineDelta,
        "[:, 5]": LineDelta,
        "[:, :]": EntriesDelta,
    }
    for region, kind in kinds.items():
        (delta,) = ablate(anatomy, [f"{DOWN}{region}"]).deltas
        assert type(delta) is kind, region
    most_of_a_row = ablate(anatomy, [Entry(DOWN, 3, c) for c in range(47)])
    assert isinstance(most_of_a_row.deltas[0], LineDelta)
    assert int(most_of_a_row.touched(DOWN).sum()) == 47
    assert isinstance(rank_one(anatomy).deltas[0], LowRankDelta)


def test_from_matrix_finds_what_changed() -> None:
    anatomy = llama(torch.bfloat16)
    new = anatomy.view(DOWN).read().float()
    new[2, 3] += 1
    new[9, 1] = -0.0
    patch = Patch.from_matrix(
        anatomy, {DOWN: new, Site(1, "mlp.down"): anatomy.view("L1.mlp.down").read()}
    )
    assert patch.sites == [DOWN]
    assert patch.touched(DOWN).nonzero().tolist() == [[2, 3], [9, 1]]
    assert patch.base[DOWN].dtype == "bfloat16"
    with pytest.raises(BadInput, match="nothing to patch"):
        Patch.from_matrix(anatomy, {DOWN: anatomy.view(DOWN).read()})
    with pytest.raises(BadInput, match="shape"):
        Patch.from_matrix(anatomy, {DOWN: new.T})


def test_entries_given_twice_are_one() -> None:
    anatomy = llama()
    assert len(entries(anatomy, (1, 2), (1, 2)).deltas[0].old) == 1
    with pytest.raises(BadInput, match="twice"):
        Patch.from_entries(anatomy, [Entry(DOWN, 1, 2)] * 2, [1.0, 2.0])
    with pytest.raises(BadInput, match="does not exist"):
        entries(anatomy, (99, 2))
    with pytest.raises(BadInput, match="factors"):
        Patch.low_rank(anatomy, DOWN, torch.ones(48, 1), torch.ones(1, 32))


def test_a_patch_in_bf16_fits_the_same_weights_in_fp32() -> None:
    small = llama(torch.bfloat16)
    patch = entries(small, (3, 5), value=0.1)
    anatomy = Anatomy.of(copy.deepcopy(small.model).float())
    before = state(anatomy)
    patch.apply_(anatomy)
    assert anatomy.view(DOWN).read()[3, 5] == torch.tensor(0.1, dtype=torch.bfloat16).float()
    patch.undo_(anatomy)
    assert same(before, state(anatomy))


def test_wrong_base() -> None:
    anatomy, other = llama(), Anatomy.of(tiny_model("llama", seed=1))
    patch = entries(anatomy, (3, 5))
    narrow = Anatomy.of(tiny_model("llama", intermediate_size=40))
    gpt2 = Anatomy.of(tiny_model("gpt2", n_layer=1))
    for model in (other, narrow):
        before = state(model)
        with pytest.raises(WrongBase, match=r"L0\.mlp\.down") as refused:
            patch.apply_(model)
        assert refused.value.exit_status == 3
        assert same(before, state(model))
    with pytest.raises(WrongBase, match="does not have"):
        ablate(anatomy, ["L2.mlp.gate[0, 0]"]).apply_(gpt2)
    with pytest.raises(WrongBase):
        patch.undo_(anatomy)


def test_checks_come_before_any_change() -> None:
    anatomy = llama()
    patch = ablate(anatomy, [f"{DOWN}[1, 1]", "L2.mlp.down[1, 1]"])
    anatomy.view("L2.mlp.down").stored[0, 0] += 1
    before = state(anatomy)
    with pytest.raises(WrongBase, match="L2"):
        patch.apply_(anatomy)
    assert same(before, state(anatomy))


def test_twice_is_refused() -> None:
    anatomy = llama()
    for patch in (entries(anatomy, (3, 5)), rank_one(anatomy)):
        patch.apply_(anatomy)
        with pytest.raises(PatchConflict, match="already"):
            patch.apply_(anatomy)
        stranger = Anatomy.of(copy.deepcopy(anatomy.model))
        with pytest.raises(PatchConflict, match="already"):
            patch.apply_(stranger)
        patch.undo_(anatomy)


def test_disjoint_patches_undo_in_any_order() -> None:
    anatomy = llama()
    before = state(anatomy)
    p, q = entries(anatomy, (1, 1)), ablate(anatomy, [f"{DOWN}[2, :]"])
    for first, second in ((p, q), (q, p)):
        p.apply_(anatomy)
        q.apply_(anatomy)
        first.undo_(anatomy)
        second.undo_(anatomy)
        assert same(before, state(anatomy))


def test_overlap_is_refused() -> None:
    anatomy = llama()
    p, q = entries(anatomy, (1, 1)), ablate(anatomy, [f"{DOWN}[1, :]"])
    p.apply_(anatomy)
    on_top = ablate(anatomy, [f"{DOWN}[1, :]"])
    before = state(anatomy)
    with pytest.raises(PatchConflict):
        q.apply_(anatomy)
    on_top.apply_(anatomy)
    with pytest.raises(PatchConflict, match="later"):
        p.undo_(anatomy)
    on_top.undo_(anatomy)
    assert same(before, state(anatomy))
    p.undo_(anatomy)


def test_a_row_that_leaves_the_injured_entries_alone_does_not_hold_them() -> None:
    anatomy = llama()
    before = state(anatomy)
    injury = ablate(anatomy, [f"{DOWN}[1, 1]", f"{DOWN}[1, 9]"])
    injury.apply_(anatomy)
    new = anatomy.view(DOWN).read().clone()
    new[1] *= 1.5  # zeros stay zero
    repair = Patch.from_matrix(anatomy, {DOWN: new})
    assert isinstance(repair.deltas[0], LineDelta)
    repair.apply_(anatomy)
    injury.undo_(anatomy)
    assert anatomy.view(DOWN).read()[1, 1] != 0
    repair.undo_(anatomy)
    assert same(before, state(anatomy))


def test_a_model_loaded_with_the_patch_can_lose_it() -> None:
    anatomy = llama()
    before = state(anatomy)
    p, q, third = entries(anatomy, (1, 1)), ablate(anatomy, [f"{DOWN}[:, 2]"]), rank_one(anatomy)
    p.apply_(anatomy)
    loaded = Anatomy.of(copy.deepcopy(anatomy.model))
    assert not applied_patches(loaded)
    with pytest.raises(WrongBase, match="does not hold"):
        q.undo_(loaded)
    p_again = ablate(loaded, [f"{DOWN}[0, 0]"])
    p_again.apply_(loaded)
    p.undo_(loaded)  # beneath a patch that lies on this model
    p_again.undo_(loaded)
    assert same(before, state(loaded))
    p.undo_(anatomy)
    third.apply_(anatomy)
    with pytest.raises(Refused, match="low-rank"):
        third.undo_(Anatomy.of(copy.deepcopy(anatomy.model)))


def test_undo_does_not_overwrite_what_was_trained_since() -> None:
    anatomy = llama()
    before = state(anatomy)
    patch = entries(anatomy, (1, 1))
    patch.apply_(anatomy)
    anatomy.view(DOWN).stored[1, 1] = 3.0
    with pytest.raises(WrongBase, match="trained"):
        patch.undo_(anatomy)
    anatomy.view(DOWN).stored[1, 1] = 7.0
    patch.undo_(anatomy)
    with patch.applied(anatomy):
        anatomy.view(DOWN).stored[1, 1] = 3.0
    assert same(before, state(anatomy))


def test_tied_and_packed() -> None:
    anatomy = Anatomy.of(tiny_model("gpt2"))
    before = state(anatomy)
    patch = ablate(anatomy, ["embed[3, 5]"])
    with pytest.raises(TiedWeight, match="unembed"):
        patch.apply_(anatomy)
    with patch.applied(anatomy, allow_tied=True):
        assert anatomy.view("unembed").read()[5, 3] == 0
    assert same(before, state(anatomy))

    packed = llama()
    patch = entries(packed, (1, 1))
    packed.model.model.layers[0].mlp.down_proj.weight = torch.nn.Parameter(
        torch.ones(32, 48, dtype=torch.int8), requires_grad=False
    )
    with pytest.raises(PackedWeight):
        patch.apply_(packed)


def test_the_registry_does_not_keep_models() -> None:
    import weakref

    anatomy = llama()
    entries(anatomy, (1, 1)).apply_(anatomy)
    model = weakref.ref(anatomy.model)
    del anatomy
    gc.collect()
    assert model() is None


def test_compose_equals_one_after_the_other() -> None:
    anatomy = llama()
    before = state(anatomy)
    p = ablate(anatomy, [f"{DOWN}[1, :]", "L1.mlp.down[0, 0]"])
    with p.applied(anatomy):
        chained = ablate(anatomy, [f"{DOWN}[:, 3]"], "mean")
        low = rank_one(anatomy, seed=1)
    apart = ablate(anatomy, [f"{DOWN}[2, 5]", "L1.mlp.down[5, 0]"], "flip")
    elsewhere = rank_one(anatomy, Site(2, "mlp.up"))
    for q in (chained, low, apart, elsewhere):
        p.apply_(anatomy)
        q.apply_(anatomy)
        both = state(anatomy)
        q.undo_(anatomy)
        p.undo_(anatomy)
        one = compose(p, q)
        one.apply_(anatomy)
        assert same(both, state(anatomy))
        one.undo_(anatomy)
        assert same(before, state(anatomy))
    assert len(compose(p, chained).on(DOWN)) == 1
    with pytest.raises(WrongBase):
        compose(chained, p)
    with pytest.raises(WrongBase):
        compose(p, ablate(anatomy, [f"{DOWN}[1, 7]"]))


def test_parts_that_do_not_fit_are_not_a_patch() -> None:
    patch = entries(llama(), (1, 1))
    with pytest.raises(ValueError, match="base tensor"):
        Patch(patch.deltas, {})
    with pytest.raises(ValueError, match="at least one"):
        Patch((), {})
