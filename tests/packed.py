"""What an export that keeps whole matrices is to compute, made in memory."""

from __future__ import annotations

from dataclasses import replace

from transformers import PreTrainedModel

from surgeon.anatomy import Anatomy, Entry
from surgeon.quantize import QuantizeConfig, quantize_, quantize_matrix

LINEAR = [
    "llama",
    "qwen3",
    "gemma2",
    "phi",
    "phi3",
    "olmo2",
    "gpt_neox",
    "gptj",
    "opt",
    "bloom",
    "bert",
]  # plain Linear layers


def in_memory(
    model: PreTrainedModel, config: QuantizeConfig, critical: tuple[Entry, ...], keep: str
) -> PreTrainedModel:
    """What the export is to compute: all matrices clipped and rounded, the critical ones at 8 bits
    or as they were.
    """
    anatomy = Anatomy.of(model)
    own = {e.site: anatomy.view(e.site).read().clone() for e in critical}
    quantize_(anatomy, replace(config, method="clip"))
    for site, matrix in own.items():
        anatomy.view(site).assign_(
            matrix
            if keep == "dense"
            else quantize_matrix(matrix, replace(config.grid, bits=8)).dequantize()
        )
    return model
