"""Tiny random models of every supported architecture, made offline from their configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel

from surgeon.anatomy import Anatomy

_LLAMA: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT2: dict[str, Any] = {
    "vocab_size": 99,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_NEOX = {k: v for k, v in _LLAMA.items() if k not in ("num_key_value_heads", "pad_token_id")}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": {**_LLAMA, "head_dim": 8},
    "gemma2": {**_LLAMA, "head_dim": 8},
    "gemma3_text": {**_LLAMA, "head_dim": 8},
    "phi": _LLAMA,
    "phi3": _LLAMA,
    "olmo": _LLAMA,
    "olmo2": _LLAMA,
    "gpt2": _GPT2,
    "gpt_neox": _NEOX,
    "gptj": {**_GPT2, "rotary_dim": 4},
    "opt": {
        **{k: v for k, v in _NEOX.items() if k != "intermediate_size"},
        "ffn_dim": 48,
        "word_embed_proj_dim": 32,
        "pad_token_id": 0,
    },
    "falcon": {**_NEOX, "new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 48},
    "bloom": {
        "vocab_size": 99,
        "hidden_size": 32,
        "n_layer": 3,
        "n_head": 4,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
    "mixtral": {**_LLAMA, "num_local_experts": 4},
    "olmoe": {**_LLAMA, "num_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        **_LLAMA,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "head_dim": 8,
        "mlp_only_layers": [1],
    },
    "gpt_oss": {
        **_LLAMA,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "bert": _NEOX,
}


def tiny_model(
    model_type: str, seed: int = 0, scale: float | None = 0.2, **overrides: Any
) -> PreTrainedModel:
    """A model whose random weights are large enough that every part matters, biases included;
    without `scale`, as transformers makes it.
    """
    config = AutoConfig.for_model(model_type, **{**CONFIGS[model_type], **overrides})
    torch.manual_seed(seed)
    auto = AutoModelForMaskedLM if model_type == "bert" else AutoModelForCausalLM
    model = auto.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if scale is None:
                break
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
            elif name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.requires_grad_(False)


def saved(model: PreTrainedModel, folder: Path) -> str:
    model.save_pretrained(folder)
    return str(folder)


def planted(row: int = 5, col: int = 7) -> Anatomy:
    """A tiny llama whose channel `row` is far above the others from layer 1 on, by one entry."""
    anatomy = Anatomy.of(tiny_model("llama"))
    view = anatomy.view("L1.mlp.down")
    view.set_(torch.tensor([row]), torch.tensor([col]), torch.tensor([200.0]))
    return anatomy
