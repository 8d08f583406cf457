"""The module against torch's own encoder, written with the published names, and its map."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from surgeon import Anatomy, injured, prove
from surgeon.cells import LAYOUT, CellConfig, ScGPT
from surgeon.errors import BadInput
from surgeon.tap import Tap

SMALL = CellConfig(
    n_tokens=30, d_model=16, n_heads=4, d_mlp=24, n_layers=3, pad_id=27, categorical=True
)


def small(**other: object) -> ScGPT:
    torch.manual_seed(0)
    return ScGPT(CellConfig(**{**SMALL.__dict__, **other})).eval().requires_grad_(False)  # type: ignore[arg-type]


def cells() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    genes = torch.randint(0, 27, (3, 9), generator=generator)
    values = torch.randint(0, 51, (3, 9), generator=generator).float()
    padding = torch.zeros(3, 9, dtype=torch.bool)
    padding[1, 6:], padding[2, 4:] = True, True
    genes[padding] = 27
    return genes, values, padding


def reference(model: ScGPT) -> nn.TransformerEncoder:
    """torch's own post-norm encoder with the very same tensors under the very same names."""
    layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.2, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()
    prefix = "transformer_encoder."
    encoder.load_state_dict(
        {k.removeprefix(prefix): v for k, v in model.state_dict().items() if k.startswith(prefix)},
        strict=True,
    )
    return encoder


def test_states_equal_torchs_own_encoder():
    model = small()
    genes, values, padding = cells()
    with torch.no_grad():
        start = model.encoder(genes) + model.value_encoder(values[..., None])
        expected = reference(model)(start, src_key_padding_mask=padding)
    found = model(genes, values, padding).states
    assert torch.allclose(found[~padding], expected[~padding], atol=1e-5)


def test_order_and_padding_do_not_matter():
    model = small()
    genes, values, _ = cells()
    order = torch.tensor([0, 5, 3, 8, 1, 2, 7, 6, 4])
    plain = model(genes, values).states
    assert torch.allclose(
        model(genes[:, order], values[:, order]).states, plain[:, order], atol=1e-5
    )
    longer = [
        torch.cat([x, torch.full((3, 4), fill, dtype=x.dtype)], 1)
        for x, fill in ((genes, 27), (values, -2.0))
    ]
    padding = torch.arange(13).expand(3, 13) >= 9
    assert torch.allclose(model(*longer, padding).states[:, :9], plain, atol=1e-5)


def test_heads_and_names():
    model = small()
    genes, values, padding = cells()
    out = model(genes, values, padding)
    assert out.logits is not None
    shapes = (out.states.shape, out.value_pred.shape, out.logits.shape)
    assert shapes == ((3, 9, 16), (3, 9), (3, 9, 51))
    assert model.reading == "categorical"
    regress = small(categorical=False)
    assert (regress.reading, regress(genes, values).logits) == ("regression", None)


def test_the_published_names_of_the_whole_human_checkpoint():
    with torch.device("meta"):
        state = ScGPT(CellConfig()).state_dict()
    block = [
        f"{name}.{kind}"
        for name in ("self_attn.out_proj", "linear1", "linear2", "norm1", "norm2")
        for kind in ("weight", "bias")
    ] + [
        "self_attn.in_proj_weight",
        "self_attn.in_proj_bias",
    ]
    wanted = {f"transformer_encoder.layers.{i}.{name}" for i in range(12) for name in block}
    for name in (
        "encoder.enc_norm",
        "value_encoder.linear1",
        "value_encoder.linear2",
        "value_encoder.norm",
    ):
        wanted |= {f"{name}.weight", f"{name}.bias"}
    wanted |= {f"decoder.fc.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")}
    assert set(state) == wanted | {"encoder.embedding.weight"}
    assert sum(t.numel() for t in state.values()) == pytest.approx(51e6, rel=0.02)


def test_no_such_shape():
    with pytest.raises(BadInput, match="divide"):
        CellConfig(d_model=10, n_heads=4)


def test_hooks_see_every_layer():
    model = small()
    genes, values, padding = cells()
    seen = []
    with Tap() as tap, torch.inference_mode():
        for layer in model.layers:
            tap.on_input(layer.linear2, lambda x: seen.append(x.shape))
            tap.on_output(layer.self_attn.out_proj, lambda x: seen.append(x.shape))
        tap.run(model, genes, values, padding)
    assert seen == [(3, 9, 16), (3, 9, 24)] * 3


def test_the_map_is_proved_and_patches_work():
    model = small()
    anatomy = Anatomy.of(model, LAYOUT)
    proved = prove(anatomy, range(3))
    assert {s.role for s in proved} >= {"mlp.down", "mlp.up", "attn.out"}
    genes, values, padding = cells()
    before = model(genes, values, padding).states
    with injured(anatomy, ["L1.mlp.down[3, 7]"]):
        assert model.layers[1].linear2.weight[3, 7] == 0
        assert not torch.equal(model(genes, values, padding).states, before)
    assert torch.equal(model(genes, values, padding).states, before)
