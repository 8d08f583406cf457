"""scGPT in plain torch: genes and their binned expression in, expression out; the published
checkpoint's tensor names.

Post-norm blocks with ReLU. Attention is spelled out over `scaled_dot_product_attention`, because
torch's own encoder layer takes a fast path that hides activations from hooks. A set of genes has no
order, so there are no positions. Published heads that no masked likelihood needs (cell types,
values from the cell's state, flags) are no part of the module.
Source: Cui et al. 2024, doi:10.1038/s41592-024-02201-0; github.com/bowang-lab/scGPT.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from ..anatomy import Anatomy, Layout
from ..errors import BadInput

MAX_VALUE = 512.0  # the published value encoder clips here
LAYOUT = Layout(
    layers="transformer_encoder.layers",
    final_norm=None,
    # q, k and v are rows of the bare parameter `in_proj_weight`, which is no module's `weight`
    roles={"attn.out": "self_attn.out_proj", "mlp.up": "linear1", "mlp.down": "linear2"},
)


@dataclass(frozen=True)
class CellConfig:
    """The shape of a model, and how values are written for it.

    The defaults are the published whole-human shape.
    """

    n_tokens: int = 60697
    d_model: int = 512
    n_heads: int = 8
    d_mlp: int = 512
    n_layers: int = 12
    n_bins: int = 51
    pad_id: int = 60694
    pad_value: float = -2.0
    mask_value: float = -1.0
    dropout: float = 0.2
    categorical: bool = False  # a head over the bins, which gives a likelihood

    def __post_init__(self) -> None:
        sizes = (self.n_tokens, self.d_model, self.n_heads, self.d_mlp, self.n_layers)
        if min(sizes) < 1 or self.d_model % self.n_heads or self.n_bins < 3:
            raise BadInput(
                f"no model has {self.n_layers} layers x {self.d_model} channels x {self.n_heads}"
                f" heads, {self.n_tokens} tokens and {self.n_bins} bins; the heads must divide the"
                " channels, and bins be at least 3."
            )


class CellOutput(NamedTuple):
    """What one pass gives: `value_pred` in bins; `logits` over bins, of a model with that head."""

    states: Float[Tensor, "cell pos d_model"]
    value_pred: Float[Tensor, "cell pos"]
    logits: Float[Tensor, "cell pos bin"] | None


class ScGPT(nn.Module):
    """The model.

    `reading` is "categorical" (a likelihood over bins) or "regression" (a value, and no
    likelihood).
    """

    def __init__(self, config: CellConfig) -> None:
        super().__init__()
        self.shape = config
        d = config.d_model
        # every name is a published one
        embedding = nn.Embedding(config.n_tokens, d, padding_idx=config.pad_id)
        self.encoder = _sequence(embedding=embedding, enc_norm=nn.LayerNorm(d))
        self.value_encoder = _sequence(
            linear1=nn.Linear(1, d),
            activation=nn.ReLU(),
            linear2=nn.Linear(d, d),
            norm=nn.LayerNorm(d),
            dropout=nn.Dropout(config.dropout),
        )
        blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.transformer_encoder = nn.ModuleDict({"layers": blocks})
        self.decoder = _decoder(d, 1)
        self.bin_decoder = _decoder(d, config.n_bins) if config.categorical else None
        nn.init.uniform_(embedding.weight, -0.1, 0.1)

    @property
    def layers(self) -> list[Block]:
        return list(self.transformer_encoder["layers"].children())  # type: ignore[arg-type]

    @property
    def reading(self) -> str:
        return "regression" if self.bin_decoder is None else "categorical"

    @property
    def anatomy(self) -> Anatomy:
        """The map of the model: its sites, for patches and for measurements."""
        return Anatomy.of(self, LAYOUT)

    def get_input_embeddings(self) -> nn.Embedding:
        """The gene embedding, for `Anatomy`."""
        return self.encoder[0]  # type: ignore[return-value]

    def forward(
        self,
        genes: Int64[Tensor, "cell pos"],
        values: Float[Tensor, "cell pos"] | None = None,
        padding: Bool[Tensor, "cell pos"] | None = None,
    ) -> CellOutput:
        """Read cells.

        values: bins, `mask_value` where hidden; without them all are hidden. padding: True at
        places that hold no gene.
        """
        like = self.get_input_embeddings().weight
        genes = genes.to(like.device)
        if values is None:
            values = torch.full(genes.shape, self.shape.mask_value)
        heights = values.to(like).clamp(max=MAX_VALUE)[..., None]
        states = self.encoder(genes) + self.value_encoder(heights)
        # (cell, 1, 1, pos): True where a key may be looked at
        visible = None
        if padding is not None and bool(padding.any()):
            visible = ~padding[:, None, None, :].to(like.device)
        for layer in self.layers:
            states = layer(states, visible)
        return CellOutput(
            states,
            self.decoder(states).squeeze(-1),
            None if self.bin_decoder is None else self.bin_decoder(states),
        )


class Block(nn.Module):
    """One encoder block: attention, norm, MLP, norm."""

    def __init__(self, config: CellConfig) -> None:
        super().__init__()
        d = config.d_model
        self.self_attn = Attention(d, config.n_heads, config.dropout)
        self.linear1 = nn.Linear(d, config.d_mlp)
        self.linear2 = nn.Linear(config.d_mlp, d)
        self.norm1 = nn.LayerNorm(d)
        self.norm2 = nn.LayerNorm(d)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, states: Float[Tensor, "cell pos d_model"], visible: Tensor | None = None
    ) -> Float[Tensor, "cell pos d_model"]:
        states = self.norm1(states + self.dropout(self.self_attn(states, visible)))
        hidden = self.dropout(F.relu(self.linear1(states)))
        out: Tensor = self.norm2(states + self.dropout(self.linear2(hidden)))
        return out


class Attention(nn.Module):
    """Self-attention with the parameter names of `nn.MultiheadAttention`: q, k and v stacked in
    `in_proj_weight`.
    """

    def __init__(self, d_model: int, n_heads: int, dropout: float) -> None:
        super().__init__()
        self.n_heads, self.dropout = n_heads, dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * d_model, d_model))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * d_model))
        self.out_proj = nn.Linear(d_model, d_model)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self, states: Float[Tensor, "cell pos d_model"], visible: Tensor | None = None
    ) -> Float[Tensor, "cell pos d_model"]:
        cells, pos, d = states.shape
        packed = F.linear(states, self.in_proj_weight, self.in_proj_bias)
        packed = packed.view(cells, pos, 3, self.n_heads, d // self.n_heads)
        q, k, v = packed.permute(2, 0, 3, 1, 4)  # each (cell, head, pos, d_head)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, visible, dropout)
        out: Tensor = self.out_proj(mixed.transpose(1, 2).reshape(cells, pos, d))
        return out


def _decoder(d_model: int, n_out: int) -> nn.Sequential:
    return _sequence(
        fc=nn.Sequential(
            nn.Linear(d_model, d_model),
            nn.LeakyReLU(),
            nn.Linear(d_model, d_model),
            nn.LeakyReLU(),
            nn.Linear(d_model, n_out),
        )
    )


def _sequence(**modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(modules))
