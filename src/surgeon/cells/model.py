"""scGPT in plain torch: genes and their binned expression in, expression out; the published
checkpoint's tensor names.

Post-norm blocks with ReLU. Attention is spelled out over `scaled_dot_product_attention`, because
torch's own encoder layer takes a fast path that hides activations from hooks. A set of genes has no
order, so there are no positions.
Source: Cui et al. 2024, doi:10.1038/s41592-024-02201-0; github.com/bowang-lab/scGPT.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from ..anatomy import Layout
from ..errors import BadInput

MAX_VALUE = 512.0  # the published value encoder clips here
LAYOUT = Layout(
    layers="transformer_encoder.layers",
    final_norm=None,
    # q, k and v are rows of the bare parameter `in_proj_weight`, which no module owns as its
    # `weight`
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
    flags: bool = True  # flag_encoder: marks genes to be generated; loaded, used by no reading here
    from_cell: bool = True  # mvc_decoder: values from the cell's state
    n_types: int = 0  # cls_decoder: cell types
    n_layers_types: int = 3

    def __post_init__(self) -> None:
        sizes = (self.n_tokens, self.d_model, self.n_heads, self.d_mlp, self.n_layers)
        if min(sizes) < 1 or self.d_model % self.n_heads or self.n_bins < 3:
            raise BadInput(
                f"no model has {self.n_layers} layers x {self.d_model} channels x {self.n_heads}"
                f" heads, {self.n_tokens} tokens and {self.n_bins} bins; the heads must divide the"
                " channels, and bins be at least 3."
            )


class CellOutput(NamedTuple):
    """What one pass gives.

    `value_pred` is in bins; `logits` over bins where the model has that head, `types` over cell
    types.
    """

    states: Float[Tensor, "cell pos d_model"]
    value_pred: Float[Tensor, "cell pos"]
    logits: Float[Tensor, "cell pos bin"] | None
    types: Float[Tensor, "cell type"] | None


class ScGPT(nn.Module):
    """The model.

    `reading` is "categorical" (a likelihood over bins) or "regression" (a value, and no
    likelihood).
    """

    def __init__(self, config: CellConfig) -> None:
        super().__init__()
        self.shape = config
        self.d_model, self.n_heads = config.d_model, config.n_heads
        d = config.d_model
        self.encoder = _GeneEncoder(config)
        self.value_encoder = _ValueEncoder(d, config.dropout)
        self.transformer_encoder = _Stack(config)
        self.decoder = _Decoder(d, 1)
        self.bin_decoder = _Decoder(d, config.n_bins) if config.categorical else None
        self.flag_encoder = nn.Embedding(2, d) if config.flags else None
        self.mvc_decoder = _FromCell(d) if config.from_cell else None
        self.cls_decoder = (
            _TypeDecoder(d, config.n_types, config.n_layers_types) if config.n_types else None
        )
        nn.init.uniform_(self.encoder.embedding.weight, -0.1, 0.1)

    @property
    def layers(self) -> list[Block]:
        return list(self.transformer_encoder.layers)  # type: ignore[arg-type]

    @property
    def reading(self) -> str:
        return "regression" if self.bin_decoder is None else "categorical"

    def get_input_embeddings(self) -> nn.Module:
        """The gene embedding, for `Anatomy`."""
        return self.encoder.embedding

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
        if values is None:
            values = torch.full(
                genes.shape,
                self.shape.mask_value,
                dtype=self.encoder.enc_norm.weight.dtype,
                device=genes.device,
            )
        states = self.encoder(genes) + self.value_encoder(
            values.to(self.encoder.enc_norm.weight.dtype)
        )
        # (cell, 1, 1, pos): True where a key may be looked at
        visible = None if padding is None or not bool(padding.any()) else ~padding[:, None, None, :]
        for layer in self.transformer_encoder.layers:
            states = layer(states, visible)
        return CellOutput(
            states,
            self.decoder(states).squeeze(-1),
            None if self.bin_decoder is None else self.bin_decoder(states),
            None if self.cls_decoder is None else self.cls_decoder(states[:, 0]),
        )

    def values_from_cell(
        self, genes: Int64[Tensor, "cell pos"], states: Float[Tensor, "cell pos d_model"]
    ) -> Float[Tensor, "cell pos"]:
        """Values as the published second objective reads them: from the state at <cls> and the gene
        alone.

        Raises: BadInput for a model without that decoder.
        """
        if self.mvc_decoder is None:
            raise BadInput(
                "this model has no mvc_decoder, so no values can be read from the cell's state;"
                " read them from the genes'."
            )
        read: Tensor = self.mvc_decoder(states[:, 0], self.encoder(genes))
        return read


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
        packed = F.linear(states, self.in_proj_weight, self.in_proj_bias).view(
            cells, pos, 3, self.n_heads, d // self.n_heads
        )
        q, k, v = packed.permute(2, 0, 3, 1, 4)  # each (cell, head, pos, d_head)
        mixed = F.scaled_dot_product_attention(
            q, k, v, visible, self.dropout if self.training else 0.0
        )
        out: Tensor = self.out_proj(mixed.transpose(1, 2).reshape(cells, pos, d))
        return out


class _Stack(nn.Module):
    def __init__(self, config: CellConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))


class _GeneEncoder(nn.Module):
    def __init__(self, config: CellConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.n_tokens, config.d_model, padding_idx=config.pad_id)
        self.enc_norm = nn.LayerNorm(config.d_model)

    def forward(self, genes: Tensor) -> Tensor:
        out: Tensor = self.enc_norm(self.embedding(genes))
        return out


class _ValueEncoder(nn.Module):
    def __init__(self, d_model: int, dropout: float) -> None:
        super().__init__()
        self.linear1 = nn.Linear(1, d_model)
        self.linear2 = nn.Linear(d_model, d_model)
        self.norm = nn.LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, values: Tensor) -> Tensor:
        hidden = F.relu(self.linear1(values.clamp(max=MAX_VALUE)[..., None]))
        out: Tensor = self.dropout(self.norm(self.linear2(hidden)))
        return out


class _Decoder(nn.Module):
    def __init__(self, d_model: int, n_out: int) -> None:
        super().__init__()
        self.fc = nn.Sequential(
            nn.Linear(d_model, d_model),
            nn.LeakyReLU(),
            nn.Linear(d_model, d_model),
            nn.LeakyReLU(),
            nn.Linear(d_model, n_out),
        )

    def forward(self, states: Tensor) -> Tensor:
        out: Tensor = self.fc(states)
        return out


class _FromCell(nn.Module):
    """The published "inner product" decoder."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.gene2query = nn.Linear(d_model, d_model)
        self.W = nn.Linear(d_model, d_model, bias=False)

    def forward(self, cell: Tensor, genes: Tensor) -> Tensor:
        return torch.einsum("cpd,cd->cp", self.W(torch.sigmoid(self.gene2query(genes))), cell)


class _TypeDecoder(nn.Module):
    def __init__(self, d_model: int, n_types: int, n_layers: int) -> None:
        super().__init__()
        # the published index counts activations and norms too
        blocks: list[Any] = []
        for _ in range(n_layers - 1):
            blocks += [nn.Linear(d_model, d_model), nn.ReLU(), nn.LayerNorm(d_model)]
        self._decoder = nn.ModuleList(blocks)
        self.out_layer = nn.Linear(d_model, n_types)

    def forward(self, cell: Tensor) -> Tensor:
        for layer in self._decoder:
            cell = layer(cell)
        out: Tensor = self.out_layer(cell)
        return out
