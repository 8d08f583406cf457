"""GGUF files, read and dequantized by the `gguf` package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..anatomy import Anatomy, Packing, Site, WeightView
from ..anatomy.gguf_names import gguf_spellings
from ..errors import BadCheckpoint, BadInput, MissingExtra
from .weights import Weights

# llama.cpp's converter reorders the rows of q and k of these, pairing the channels that rotate
# together
_PERMUTED = ("llama",)
_IN_ORDER = (
    "qwen2",
    "qwen3",
    "qwen2moe",
    "qwen3moe",
    "gemma",
    "gemma2",
    "gemma3",
    "phi2",
    "phi3",
    "gpt2",
    "olmo2",
    "gpt-oss",
    "smollm3",
)


class GgufFile(Weights):
    """The matrices of a GGUF file; `anatomy` is the map of the model that it was made from, which a
    GGUF file does not hold.
    """

    def __init__(self, path: Path, anatomy: Anatomy) -> None:
        """Raises: BadCheckpoint if it is no such file; BadInput for an architecture without a
        table; MissingExtra without `gguf`.
        """
        try:
            import gguf
        except ImportError as error:
            raise MissingExtra("a GGUF file", "quantize") from error
        self.name, self.anatomy, self.gguf, self._bytes_read = str(path), anatomy, gguf, 0
        try:
            reader = gguf.GGUFReader(path)
            self.architecture = str(reader.fields["general.architecture"].contents())
            self.depth = int(reader.fields[f"{self.architecture}.block_count"].contents())
        # the reader checks little, and any of its steps breaks on a damaged file
        except Exception as error:
            raise BadCheckpoint(
                f"{path} is damaged or no GGUF file ({error}); write it again."
            ) from error
        known = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
        if self.architecture not in known:
            raise BadInput(
                f"{path} holds a {self.architecture} model, for which the gguf package has no"
                " names; install a newer one."
            )
        self.tensors: dict[str, Any] = {t.name: t for t in reader.tensors}
        self.names = gguf.get_tensor_name_map(known[self.architecture], self.depth)

    @property
    def bytes_read(self) -> int:
        return self._bytes_read

    def matrix(self, site: Site) -> Float[Tensor, "out in"]:
        address = self.anatomy.addresses[self.anatomy.resolve(site)]
        tensor, apart = self._find(site, address.parameter)
        try:
            numbers = self.gguf.dequantize(tensor.data, tensor.tensor_type)
        # what the package raises for a type that it knows by name and size alone
        except NotImplementedError as error:
            raise BadCheckpoint(
                f"{self.name} stores {site} as {tensor.tensor_type.name}, which the gguf package"
                " cannot read."
            ) from error
        self._bytes_read += int(tensor.n_bytes)
        # a copy, since numpy may give a view of the mapped file, which is read-only
        stored = torch.from_numpy(numbers.copy()).float()
        # (out, in) throughout, but for the embedding, which is (token, channel) here as well
        packing = Packing(
            address.packing.expert, site.role == "embed", None if apart else address.packing.rows
        )
        return self._in_order(site, WeightView(site, stored, packing).read())

    def _find(self, site: Site, parameter: str) -> tuple[Any, bool]:
        """The tensor that holds the site, and whether it holds nothing else where the model has one
        for several roles.
        """
        if site.role.startswith("norm.") or site.role == "final_norm":
            raise BadInput(
                f"{site} is a norm, which GGUF files hold changed; in these audit reads projections"
                " and embeddings."
            )
        for spelled, apart in gguf_spellings(parameter, site):
            name = self.names.get_name(spelled)
            if name is not None and f"{name}.weight" in self.tensors:
                return self.tensors[f"{name}.weight"], apart
        if site.role == "unembed" and self.anatomy.tied_to(site):
            return self.tensors["token_embd.weight"], False
        raise BadInput(
            f"{self.name} has no tensor for {site} ({parameter}); it is not this model, or stores"
            " that matrix otherwise."
        )

    def _in_order(self, site: Site, matrix: Tensor) -> Tensor:
        if (
            site.role not in ("attn.q", "attn.k", "attn.v")
            or tuple(matrix.shape) != self.anatomy.view(site).shape
        ):
            return matrix
        if self.architecture in _PERMUTED:
            if site.role == "attn.v":
                return matrix
            config = self.anatomy.config
            heads = (
                config.num_attention_heads if site.role == "attn.q" else config.num_key_value_heads
            )
            # there the two channels that rotate together are neighbours, here half a head apart
            return matrix.view(heads, -1, 2, matrix.shape[1]).transpose(1, 2).reshape(matrix.shape)
        if self.architecture not in _IN_ORDER:
            raise BadInput(
                f"{site}: how a GGUF file of {self.architecture} orders the rows of q, k and v is"
                " not known here; audit others."
            )
        return matrix
