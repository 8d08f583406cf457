"""Injuries by mode, and a channel held while they are in place."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_model

from surgeon.anatomy import Anatomy, Entry, Region, Site
from surgeon.errors import BadInput, UnknownSite
from surgeon.patch import ablate, injured, record_channel, restored_channel
from surgeon.tap import Tap

DOWN = Site(1, "mlp.down")
IDS = torch.arange(1, 13).view(2, 6)


@pytest.mark.parametrize(
    ("mode", "want"), [("zero", 0.0), ("mean", None), ("scale:0.5", 0.5), ("flip", -1.0)]
)
def test_modes(mode: str, want: float | None) -> None:
    anatomy = Anatomy.of(tiny_model("gpt2"))
    old = anatomy.view(DOWN).read().clone()
    with injured(anatomy, [f"{DOWN}[4, :]", Entry(DOWN, 0, 1), Region(DOWN, 0, 1)], mode):
        new = anatomy.view(DOWN).read().clone()
    assert torch.equal(anatomy.view(DOWN).read(), old)
    mask = torch.zeros_like(old, dtype=torch.bool)
    mask[4], mask[0, 1] = True, True
    assert torch.equal(new[~mask], old[~mask])
    if want is None:
        torch.testing.assert_close(new[mask], old.mean().expand(int(mask.sum())))
    else:
        torch.testing.assert_close(new[mask], want * old[mask])


@pytest.mark.parametrize(("model_type", "zero"), [("llama", 0.0), ("gpt2", 0.0), ("gemma2", -1.0)])
def test_a_norms_scale_is_meant_whatever_it_stores(model_type: str, zero: float) -> None:
    """The channel behind the norm is zero, or half of what it was, at every token."""
    model = tiny_model(model_type)
    anatomy = Anatomy.of(model)
    site = Site(None, "final_norm")
    assert anatomy.stored_zero(site) == zero
    assert anatomy.stored_zero(DOWN) == 0.0
    bias = anatomy.module(site).bias[3].item() if model_type == "gpt2" else 0.0

    def channel() -> torch.Tensor:
        leaving: list[torch.Tensor] = []
        with Tap() as tap, torch.no_grad():
            tap.on_output(anatomy.module(site), leaving.append)
            model(IDS)
        return leaving[0][..., 3] - bias

    intact = channel()
    for mode, share in (("zero", 0.0), ("scale:0.5", 0.5), ("flip", -1.0)):
        with injured(anatomy, ["final_norm[3, 0]"], mode):
            torch.testing.assert_close(channel(), share * intact)
    assert torch.equal(channel(), intact)


def test_spread_keeps_the_sum_of_each_row() -> None:
    anatomy = Anatomy.of(tiny_model("llama"))
    old = anatomy.view(DOWN).read().clone()
    at = [Entry(DOWN, 4, 1), Entry(DOWN, 4, 2), Entry(DOWN, 7, 1)]
    with injured(anatomy, at, "spread:3"):
        new = anatomy.view(DOWN).read().clone()
    assert new[4, 1] == new[4, 2] == new[7, 1] == 0
    torch.testing.assert_close(new.sum(1), old.sum(1))
    gain = (new - old)[7].clone()
    gain[1] = 0
    rest = old[7].abs().clone()
    rest[1] = 0
    assert set(gain.nonzero().flatten().tolist()) == set(rest.topk(3).indices.tolist())
    torch.testing.assert_close(gain[gain != 0], (old[7, 1] / 3).expand(3))
    with pytest.raises(BadInput, match="smaller N"):
        ablate(anatomy, at, "spread:48")


@pytest.mark.parametrize(
    "mode",
    [
        "",
        "nul",
        "zero:1",
        "scale",
        "scale:",
        "scale:x",
        "scale:inf",
        "scale:nan",
        "spread",
        "spread:0",
        "spread:1.5",
    ],
)
def test_unknown_modes_list_the_known_ones(mode: str) -> None:
    anatomy = Anatomy.of(tiny_model("llama"))
    with pytest.raises(BadInput, match=r"zero.*mean.*scale:F.*flip.*spread:N"):
        ablate(anatomy, [f"{DOWN}[0, 0]"], mode)


def test_bad_regions() -> None:
    anatomy = Anatomy.of(tiny_model("llama"))
    with pytest.raises(BadInput, match="no entries"):
        ablate(anatomy, [])
    with pytest.raises(UnknownSite):
        ablate(anatomy, ["L9.mlp.down[0, 0]"])
    with pytest.raises(BadInput, match="does not exist"):
        ablate(anatomy, [Region(DOWN, 99, None)])


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "mixtral", "gpt_oss", "bert"])
def test_restoring_the_channel_undoes_an_injury_of_its_row(kind: str) -> None:
    anatomy = Anatomy.of(tiny_model(kind))
    site = anatomy.downs(1)[0]
    model = anatomy.model
    with torch.no_grad():
        clean = model(IDS).logits
        values = record_channel(anatomy, site, 5, IDS)
        assert values.shape == IDS.shape
        with injured(anatomy, [f"{s}[5, :]" for s in anatomy.downs(1)]):
            hurt = model(IDS).logits
            with restored_channel(anatomy, site, 5, values):
                healed = model(IDS).logits
                with pytest.raises(BadInput, match="recorded"):
                    model(IDS[:1])
        assert torch.equal(model(IDS).logits, clean)
    assert not torch.allclose(hurt, clean, atol=1e-4)
    torch.testing.assert_close(healed, clean)


def test_channels_that_do_not_exist() -> None:
    anatomy = Anatomy.of(tiny_model("llama"))
    with pytest.raises(BadInput, match="no output channel 32"):
        record_channel(anatomy, DOWN, 32, IDS)
