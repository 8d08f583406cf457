"""The trace of a channel and the attention sink against a plain forward pass."""

import pytest
import torch
from tiny import tiny_model

from surgeon.anatomy import Anatomy
from surgeon.corpus import Corpus
from surgeon.explain import ChannelConfig, attention_sink, channel_trace, geometry
from surgeon.patch import ablate

WINDOWS = torch.randint(3, 99, (3, 12), generator=torch.Generator().manual_seed(0))
CORPUS = Corpus("random", WINDOWS, False)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_the_trace_is_the_residual_stream(model_type):
    model = tiny_model(model_type)
    anatomy = Anatomy.of(model)
    injury = ablate(anatomy, ["L0.mlp.down[4, :]"])
    trace = channel_trace(
        anatomy, [injury], CORPUS, geometry(anatomy, [injury]).lines, ChannelConfig(positions=5)
    )
    (channel,) = trace.channels
    assert (channel.channel, str(channel.written_by), channel.written_at) == (4, "L0.mlp.down", 1)
    for state in ("base", "broken"):
        with injury.applied(anatomy) if state == "broken" else torch.no_grad():
            hidden = model(
                WINDOWS, output_hidden_states=True
            ).hidden_states  # the last one is after the final norm
        traced = channel.states[state]
        for layer, h in enumerate(hidden[:-1]):
            size = h[..., 4].abs()
            assert traced.first[layer] == pytest.approx(size[:, 0].mean().item(), rel=1e-4)
            assert traced.rest[layer] == pytest.approx(size[:, 1:].mean().item(), rel=1e-4)
            assert traced.largest[layer] == pytest.approx(size.max().item(), rel=1e-4)
        after = hidden[1][..., 4].abs()
        assert traced.positions == pytest.approx(after[:, :5].mean(0).tolist(), rel=1e-4)
        assert traced.peak == pytest.approx(after.amax(1).mean().item(), rel=1e-4)
        assert traced.ratio == pytest.approx(traced.peak / channel.states["base"].peak)
    assert len(channel.states["base"].rest) == len(anatomy.layers) + 1


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral"])
def test_the_sink_is_the_share_of_attention_at_position_0(model_type):
    model = tiny_model(model_type)
    anatomy = Anatomy.of(model)
    before = model.config._attn_implementation
    sink = attention_sink(anatomy, {"base": ()}, WINDOWS)
    assert model.config._attn_implementation == before
    model.set_attn_implementation("eager")
    plain = model(WINDOWS, output_attentions=True).attentions
    assert sink.states["base"] == pytest.approx(
        [a[:, :, 1:, 0].mean().item() for a in plain], rel=1e-4
    )
    assert sink.uniform == pytest.approx(sum(1 / q for q in range(2, 13)) / 11)


def test_attention_that_is_not_what_the_model_uses_is_not_reported():
    sink = attention_sink(Anatomy.of(tiny_model("falcon")), {"base": ()}, WINDOWS)
    assert "look ahead" in sink


def test_where_there_is_no_channel_or_no_attention_it_says_why(monkeypatch):
    model = tiny_model("llama")
    anatomy = Anatomy.of(model)
    injury = ablate(anatomy, ["L1.mlp.up[4, :]"])
    before = model.config._attn_implementation

    def refuse(implementation):
        if implementation == "eager":
            raise ValueError("this one only knows [bold]flash[/bold]\nand more")

    monkeypatch.setattr(model, "set_attn_implementation", refuse)
    trace = channel_trace(anatomy, [injury], CORPUS, geometry(anatomy, [injury]).lines)
    assert trace.channels is None
    assert "write the residual stream" in trace.no_channels
    assert trace.attention_sink is None
    assert trace.no_attention_sink.endswith("[bold]flash[/bold]")
    assert model.config._attn_implementation == before
