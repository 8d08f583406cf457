"""A patch as a PEFT LoRA adapter: W + B @ A with scaling 1.

A change of one row has exactly rank 1: it is e_row d', so B = e_row and A = d'. A change of more
rows takes one rank for each row or each column, whichever are fewer.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from .. import files
from ..anatomy import Site
from ..errors import Refused
from .deltas import LowRankDelta
from .patch import Patch


def to_lora(patch: Patch) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What adapter_config.json and adapter_model.safetensors hold.

    The adapter is for the model with all patches applied that this one builds on. It has the
    largest rank among the matrices, with zeros in the others.
    Raises: Refused for a patch of weights that PEFT has no such adapter for: norms, embeddings,
    parts of fused matrices, two fused parameters of one module.

    >>> import surgeon
    >>> anatomy = surgeon.Anatomy.of(surgeon.load_model("patient").model)
    >>> config, tensors = to_lora(surgeon.ablate(anatomy, ["L0.mlp.down[88, :]"]))
    >>> config["r"], config["target_modules"], [tuple(t.shape) for t in tensors.values()]
    (1, ['model.layers.0.mlp.down_proj'], [(1, 512), (128, 1)])
    """
    owners: dict[str, dict[Site, tuple[Tensor, Tensor]]] = defaultdict(dict)
    for site in patch.sites:
        _check(site, patch)
        owners[patch.base[site].parameter][site] = _factors(patch, site)
    rank = max(a.shape[0] for parts in owners.values() for a, _ in parts.values())
    modules: list[str] = []
    parameters: list[str] = []
    tensors: dict[str, Tensor] = {}
    for parameter, parts in owners.items():
        site = next(iter(parts))
        base, module = patch.base[site], parameter.rpartition(".")[0]
        if site.expert is None:
            modules.append(module)
            a, b = parts[site]
            tensors |= _named(module, _padded(a, rank), _padded(b.T, rank).T)
        else:
            if any(p.rpartition(".")[0] == module for p in parameters):
                raise Refused(
                    f"the patch changes two fused parameters of {module}, which an adapter cannot;"
                    " export a patch of each."
                )
            parameters.append(parameter)
            experts = base.stored[0]
            n_out, n_in = base.shape
            # PEFT's order: A (experts * rank, in) by expert, B (out, rank * experts) by rank
            stack_a = torch.zeros(experts, rank, n_in)
            stack_b = torch.zeros(n_out, rank, experts)
            for part, (a, b) in parts.items():
                stack_a[part.expert, : len(a)] = a
                stack_b[:, : len(a), part.expert] = b
            tensors |= _named(module, stack_a.flatten(0, 1), stack_b.flatten(1))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": rank,  # PEFT scales by alpha / r, which is 1 then
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": (
            bool(modules) and all(b.transposed for s, b in patch.base.items() if s.expert is None)
        ),
        "target_modules": modules,
        "target_parameters": parameters or None,
        "inference_mode": True,
    }
    return config, tensors


def export_lora(patch: Patch, folder: Path) -> dict[str, Any]:
    """Write the adapter to the new folder `folder`, and return its configuration.

    On failure nothing is there.

    Raises: BadInput if the folder exists or cannot be made; SurgeonError for a full disk; as
    `to_lora`.
    """
    files.check_new_folder(folder)
    config, tensors = to_lora(patch)
    with files.writing_folder(folder) as part:
        save_file(tensors, part / "adapter_model.safetensors")
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (part / "adapter_config.json").write_text(text)
    return config


def _check(site: Site, patch: Patch) -> None:
    base = patch.base[site]
    if site.role in ("embed", "final_norm") or site.role.startswith("norm."):
        raise Refused(
            f"{site} is no projection, and a LoRA adapter changes only those; apply the patch"
            " instead."
        )
    whole = base.stored[-2:] if not base.transposed else base.stored[-2:][::-1]
    if whole != base.shape:
        raise Refused(
            f"{site} is part of the fused matrix {base.parameter}, for which there is no such"
            " adapter; apply the patch instead."
        )


def _factors(patch: Patch, site: Site) -> tuple[Float[Tensor, "r in"], Float[Tensor, "out r"]]:
    """A and B whose product B @ A is the sum of the site's deltas.

    Low-rank terms keep their factors. What is left, with rows R and columns C, is I[:, R] @ its
    rows or its columns @ I[C], whichever has the smaller rank.
    """
    parts = []
    change = torch.zeros(patch.base[site].shape, dtype=torch.float64)
    for delta in patch.on(site):
        if isinstance(delta, LowRankDelta):
            parts.append((delta.right.float(), delta.left.float()))
        else:
            at = delta.points()
            change[at] += delta.new.double() - delta.old.double()
    rows = change.any(1).nonzero().flatten()
    cols = change.any(0).nonzero().flatten()
    if len(rows) and len(rows) <= len(cols):
        parts.append((change[rows].float(), torch.eye(change.shape[0])[:, rows]))
    elif len(rows):
        parts.append((torch.eye(change.shape[1])[cols], change[:, cols].float()))
    return torch.cat([a for a, _ in parts]), torch.cat([b for _, b in parts], 1)


def _padded(rows: Float[Tensor, "r n"], rank: int) -> Float[Tensor, "rank n"]:
    zeros = rows.new_zeros(rank - rows.shape[0], rows.shape[1])
    return torch.cat([rows, zeros])


def _named(module: str, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    prefix = f"base_model.model.{module}"
    return {
        f"{prefix}.lora_A.weight": a.contiguous(),
        f"{prefix}.lora_B.weight": b.contiguous(),
    }
