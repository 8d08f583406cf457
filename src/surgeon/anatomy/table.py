"""Architectures as data: where each `config.model_type` keeps its layers and projections.

A location is `module path [/ part]`, relative to one decoder layer. The part says which output
channels of a fused weight are meant:

    gate_up:0, gate_up:1    the first or the second half
    even, odd               every other one (gpt_oss)
    qkv:0 to qkv:2          q, k or v, stacked as [q; k; v]; k and v are smaller than q under
                            grouped-query attention
    groups:0 to groups:2    q, k or v, interleaved as (group, [queries..., k, v], d_head); a group
                            is one key-value head

Experts are parameters with a leading axis of experts, not modules: `mlp.experts.down_proj`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """Where one architecture keeps its parts.

    layers: path of the ModuleList of decoder layers. final_norm: path of the norm after them.
    roles: role to location in a layer. experts: the same for fused experts. expert_orientation:
    how a fused parameter stores each expert's matrix, "out_in" or "in_out". transposed: locations
    whose class stores its weight as (in, out); Conv1D is known and need not be named.

    >>> TABLE["phi3"].roles["mlp.up"]
    'mlp.gate_up_proj/gate_up:1'
    """

    layers: str
    final_norm: str | None
    roles: dict[str, str]
    experts: dict[str, str] | None = None
    expert_orientation: str = "out_in"
    transposed: frozenset[str] = frozenset()


_LLAMA_ATTN = {f"attn.{r}": f"self_attn.{r}_proj" for r in "qkv"} | {"attn.out": "self_attn.o_proj"}
_LLAMA_MLP = {f"mlp.{r}": f"mlp.{r}_proj" for r in ("gate", "up", "down")}
_LLAMA = Layout("model.layers", "model.norm", _LLAMA_ATTN | _LLAMA_MLP)
_MOE = Layout(
    "model.layers",
    "model.norm",
    # with the dense roles too: some layers of qwen3_moe have no experts
    _LLAMA_ATTN | {"mlp.router": "mlp.gate"} | _LLAMA_MLP,
    {
        "mlp.gate": "mlp.experts.gate_up_proj/gate_up:0",
        "mlp.up": "mlp.experts.gate_up_proj/gate_up:1",
        "mlp.down": "mlp.experts.down_proj",
    },
)


def _interleaved(module: str) -> dict[str, str]:
    fused = {f"attn.{r}": f"{module}.query_key_value/groups:{i}" for i, r in enumerate("qkv")}
    return fused | {"attn.out": f"{module}.dense"}


_4H_MLP = {"mlp.up": "mlp.dense_h_to_4h", "mlp.down": "mlp.dense_4h_to_h"}

TABLE: dict[str, Layout] = {
    **dict.fromkeys(
        (
            "llama",
            "mistral",
            "qwen2",
            "qwen3",
            "gemma",
            "gemma2",
            "gemma3_text",
            "olmo",
            "olmo2",
            "smollm3",
        ),
        _LLAMA,
    ),
    "phi": Layout(
        "model.layers",
        "model.final_layernorm",
        {f"attn.{r}": f"self_attn.{r}_proj" for r in "qkv"}
        | {"attn.out": "self_attn.dense", "mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2"},
    ),
    "phi3": Layout(
        "model.layers",
        "model.norm",
        {f"attn.{r}": f"self_attn.qkv_proj/qkv:{i}" for i, r in enumerate("qkv")}
        | {"attn.out": "self_attn.o_proj", "mlp.down": "mlp.down_proj"}
        | {f"mlp.{r}": f"mlp.gate_up_proj/gate_up:{i}" for i, r in enumerate(("gate", "up"))},
    ),
    "gpt2": Layout(
        "transformer.h",
        "transformer.ln_f",
        {f"attn.{r}": f"attn.c_attn/qkv:{i}" for i, r in enumerate("qkv")}
        | {"attn.out": "attn.c_proj", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"},
    ),
    "gpt_neox": Layout(
        "gpt_neox.layers", "gpt_neox.final_layer_norm", _interleaved("attention") | _4H_MLP
    ),
    "gptj": Layout(
        "transformer.h",
        "transformer.ln_f",
        {f"attn.{r}": f"attn.{r}_proj" for r in "qkv"}
        | {"attn.out": "attn.out_proj", "mlp.up": "mlp.fc_in", "mlp.down": "mlp.fc_out"},
    ),
    "opt": Layout(
        "model.decoder.layers",
        "model.decoder.final_layer_norm",
        {f"attn.{r}": f"self_attn.{r}_proj" for r in "qkv"}
        | {"attn.out": "self_attn.out_proj", "mlp.up": "fc1", "mlp.down": "fc2"},
    ),
    **dict.fromkeys(
        ("falcon", "bloom"),
        Layout("transformer.h", "transformer.ln_f", _interleaved("self_attention") | _4H_MLP),
    ),
    **dict.fromkeys(("mixtral", "olmoe", "qwen3_moe"), _MOE),
    "gpt_oss": Layout(
        "model.layers",
        "model.norm",
        _LLAMA_ATTN | {"mlp.router": "mlp.router"},
        {
            "mlp.gate": "mlp.experts.gate_up_proj/even",
            "mlp.up": "mlp.experts.gate_up_proj/odd",
            "mlp.down": "mlp.experts.down_proj",
        },
        expert_orientation="in_out",
    ),
    "bert": Layout(
        "bert.encoder.layer",
        None,
        {
            f"attn.{r}": f"attention.self.{n}"
            for r, n in (("q", "query"), ("k", "key"), ("v", "value"))
        }
        | {
            "attn.out": "attention.output.dense",
            "mlp.up": "intermediate.dense",
            "mlp.down": "output.dense",
        },
    ),
}
