"""Second moments through the model, against keys recorded one window at a time; and their cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import tiny_model
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from surgeon.anatomy import Anatomy
from surgeon.edit import CovarianceCache, Preparation, PrepareConfig, dense_down, key_moments
from surgeon.edit.covariance import Sums
from surgeon.errors import BadInput
from surgeon.settings import configured
from surgeon.tap import Tap


def recorded(anatomy: Anatomy, windows: Tensor, layer: int) -> Tensor:
    """Every key (n, pos, d_mlp), window by window, from a whole pass."""
    keys: list[Tensor] = []
    for ids in windows:
        with Tap() as tap, torch.no_grad():
            tap.on_input(
                anatomy.module(dense_down(anatomy, layer)),
                lambda x: keys.append(x.clone().double().view(1, -1, x.shape[-1])),
            )
            tap.run(anatomy.model, input_ids=ids[None], use_cache=False)
    return torch.cat(keys)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "opt", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_are_those_of_the_keys(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    anatomy = Anatomy.of(tiny_model(kind).to(dtype))
    windows = torch.randint(3, 90, (6, 10), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("surgeon.measure.likelihood.TOKENS_PER_BATCH", 20)
    by_layer = key_moments(anatomy, windows, [1, 0])
    for layer, moments in by_layer.items():
        keys = recorded(anatomy, windows, layer)
        rest = keys[:, 1:].flatten(0, 1)
        tolerance = (
            {"rtol": 2e-2, "atol": 2e-2}
            if dtype == torch.bfloat16
            else {"rtol": 1e-4, "atol": 1e-5}
        )
        torch.testing.assert_close(moments.gram, rest.T @ rest, **tolerance)
        half = keys[:4, 1:].flatten(0, 1)  # 3 batches of two windows; the half ends with the second
        torch.testing.assert_close(moments.half, half.T @ half, **tolerance)
        assert (moments.count, moments.half_count) == (54, 36)
        assert moments.first_norm == pytest.approx(
            float(keys[:, 0].pow(2).sum(1).mean().sqrt()), rel=2e-2
        )
        assert moments.mean_square == pytest.approx(float(rest.pow(2).sum(1).mean()), rel=2e-2)


def test_layers_that_have_no_key() -> None:
    anatomy = Anatomy.of(tiny_model("mixtral"))
    with pytest.raises(BadInput, match="mixture of experts"):
        dense_down(anatomy, 0)
    with pytest.raises(BadInput, match="does not exist"):
        dense_down(anatomy, 9)
    with pytest.raises(BadInput, match="two windows"):
        key_moments(Anatomy.of(tiny_model("llama")), torch.ones(1, 5, dtype=torch.long), [0])


class Interrupted(Exception):
    pass


@pytest.mark.slow
def test_a_pass_that_was_cut_goes_on(
    patient: tuple[Anatomy, PreTrainedTokenizerBase],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("surgeon.measure.likelihood.TOKENS_PER_BATCH", 512)
    config = PrepareConfig(tokens=3000)
    whole = Preparation(*patient, config).moments(1)
    calls = 0
    take = Sums.take

    def failing(self: Sums, batch: int, x: Tensor) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise Interrupted
        take(self, batch, x)

    cache = CovarianceCache(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(Sums, "take", failing)
        broken = Preparation(*patient, config, cache=cache, weights="w")
        with pytest.raises(Interrupted):
            broken.moments(1)
    assert len(list(tmp_path.iterdir())) == 1
    calls = 0

    def counting(self: Sums, batch: int, x: Tensor) -> None:
        nonlocal calls
        calls += 1
        take(self, batch, x)

    with monkeypatch.context() as patched:
        patched.setattr(Sums, "take", counting)
        again = Preparation(*patient, config, cache=cache, weights="w").moments(1)
    assert 0 < calls < 6
    assert torch.equal(again.gram, whole.gram)
    assert torch.equal(again.half, whole.half)
    assert (again.count, again.half_count, again.quartic, again.first_norm) == (
        whole.count,
        whole.half_count,
        whole.quartic,
        whole.first_norm,
    )
    (kept,) = tmp_path.iterdir()
    raw = kept.read_bytes()

    with monkeypatch.context() as patched:  # now nothing runs at all
        patched.setattr(Sums, "take", failing)
        cached = Preparation(*patient, config, cache=cache, weights="w").moments(1)
    assert torch.equal(cached.gram, whole.gram)
    for other in (PrepareConfig(tokens=3001), PrepareConfig(tokens=3000, seed=1)):
        Preparation(*patient, other, cache=cache, weights="w").moments(1)
    Preparation(*patient, config, cache=cache, weights="other").moments(1)
    assert len(list(tmp_path.iterdir())) == 4
    kept.write_bytes(raw[:-9])  # a damaged file is made again
    assert torch.equal(
        Preparation(*patient, config, cache=cache, weights="w").moments(1).gram, whole.gram
    )
    assert kept.read_bytes() == raw


@pytest.mark.parametrize("settings", [{"tokens": 1}, {"ridge": 0.0}, {"ridge": "much"}])
def test_settings_that_cannot_be_used(settings: dict[str, float | str]) -> None:
    with pytest.raises(BadInput):
        configured(PrepareConfig, settings)
