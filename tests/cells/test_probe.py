"""The probe of cell types, on embeddings made by hand."""

from __future__ import annotations

import pytest
import torch

from surgeon.cells.probe import Probe


def embeddings(seed: int = 0) -> tuple[torch.Tensor, list[str]]:
    """Three types of 40 cells, each around its own corner, and a type of 2 cells."""
    types = ["a"] * 40 + ["b"] * 40 + ["c"] * 40 + ["rare"] * 2
    corners = torch.eye(8)[:4].repeat_interleave(torch.tensor([40, 40, 40, 2]), 0) * 6
    return corners + torch.randn(122, 8, generator=torch.Generator().manual_seed(seed)), types


def test_separate_types_are_named_and_rare_ones_left_out():
    states, types = embeddings()
    probe = Probe(states, types)
    assert probe.names == ["a", "b", "c"]
    assert probe.left_out == 2
    assert probe.majority == pytest.approx(1 / 3)
    assert probe.frozen(states).accuracy == pytest.approx(1.0)
    assert probe.refitted(states).macro_f1 == pytest.approx(1.0)


def test_a_frozen_probe_loses_what_a_refitted_one_finds_again():
    states, types = embeddings()
    probe = Probe(states, types)
    turned = states.roll(1, dims=1)  # the same information elsewhere
    assert probe.frozen(turned).accuracy < 0.5
    assert probe.refitted(turned).accuracy == pytest.approx(1.0)


def test_what_is_gone_is_found_by_neither():
    states, types = embeddings()
    probe = Probe(states, types)
    noise = torch.randn(states.shape, generator=torch.Generator().manual_seed(9))
    assert max(probe.frozen(noise).accuracy, probe.refitted(noise).accuracy) < 0.6


def test_one_type_is_nothing_to_tell_apart():
    states, _ = embeddings()
    assert not Probe(states, ["a"] * 122).possible
