"""Random stacks of patches: undone in any order the model is as it was, or a refusal leaves it as
it is.
"""

from __future__ import annotations

import copy
from functools import cache

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from surgeon.anatomy import Anatomy
from surgeon.errors import PatchConflict, WrongBase
from surgeon.patch import Patch, ablate, applied_patches, compose

KINDS = ["llama", "gpt2", "bloom", "phi3", "mixtral", "gpt_oss"]
ROLES = ["mlp.down", "mlp.up", "attn.q", "attn.v"]


@cache
def model_of(kind: str) -> PreTrainedModel:
    return tiny_model(kind)


def fresh(kind: str, dtype: torch.dtype) -> Anatomy:
    """A new model for each example, since hypothesis may stop one anywhere."""
    return Anatomy.of(copy.deepcopy(model_of(kind)).to(dtype))


def state(anatomy: Anatomy) -> dict[str, Tensor]:
    return {
        name: p.contiguous().view(torch.uint8).clone()
        for name, p in anatomy.model.named_parameters()
        if ".0." in name
    }


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


CHOICES = st.tuples(
    st.sampled_from(ROLES),
    st.integers(0, 2),
    st.integers(0, 2),
    st.sampled_from(["entry", "row", "column", "mean", "low rank", "narrow low rank"]),
)


def patch_of(anatomy: Anatomy, role: str, row: int, col: int, kind: str) -> Patch:
    site = next(s for s in anatomy.addresses if s.layer == 0 and s.role == role)
    if "low rank" not in kind:
        text = {"row": f"[{row}, :]", "column": f"[:, {col}]"}.get(kind, f"[{row}, {col}]")
        return ablate(anatomy, [f"{site}{text}"], {"mean": "mean", "row": "flip"}.get(kind, "zero"))
    n_out, n_in = anatomy.view(site).shape
    left, right = torch.ones(n_out, 1), torch.linspace(-1, 1, n_in)[None]
    if kind == "narrow low rank":
        left[torch.arange(n_out) != row] = 0
    return Patch.low_rank(anatomy, site, left, right)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.data(),
    st.sampled_from(KINDS),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_stacks(data: st.DataObject, kind: str, dtype: torch.dtype) -> None:
    anatomy = fresh(kind, dtype)
    start = state(anatomy)
    waiting: list[Patch] = []
    for _ in range(data.draw(st.integers(1, 5))):
        # some are made on the bare model, as above; some on what the stack left
        if waiting and data.draw(st.booleans()):
            patch = waiting.pop(data.draw(st.integers(0, len(waiting) - 1)))
        else:
            patch = patch_of(anatomy, *data.draw(CHOICES))
            if data.draw(st.booleans()):
                waiting.append(patch)
                continue
        before = state(anatomy)
        try:
            patch.apply_(anatomy)
        except (PatchConflict, WrongBase):
            assert same(before, state(anatomy))
    while applied_patches(anatomy):
        on = applied_patches(anatomy)
        patch = on[data.draw(st.integers(0, len(on) - 1))]
        before = state(anatomy)
        try:
            patch.undo_(anatomy)
            assert len(applied_patches(anatomy)) == len(on) - 1
        except PatchConflict:
            assert patch is not on[-1]  # the last one always goes
            assert same(before, state(anatomy))
    assert same(start, state(anatomy))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data(), st.sampled_from(KINDS))
def test_composition_is_one_after_the_other(data: st.DataObject, kind: str) -> None:
    anatomy = fresh(kind, torch.bfloat16)
    start = state(anatomy)
    p = patch_of(anatomy, *data.draw(CHOICES))
    if data.draw(st.booleans()):
        with p.applied(anatomy):
            q = patch_of(anatomy, *data.draw(CHOICES))
    else:
        q = patch_of(anatomy, *data.draw(CHOICES))
    try:
        both = compose(p, q)
    except WrongBase:
        return
    p.apply_(anatomy)
    q.apply_(anatomy)
    want = state(anatomy)
    q.undo_(anatomy)
    p.undo_(anatomy)
    with both.applied(anatomy):
        assert same(want, state(anatomy))
    assert same(start, state(anatomy))
