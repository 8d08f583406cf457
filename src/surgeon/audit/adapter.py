"""A PEFT LoRA adapter over a base: its matrices are the base's plus what the adapter adds."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from ..anatomy import Address, Shards, Site, WeightView
from ..errors import BadCheckpoint, BadInput
from .weights import Weights

CONFIG, FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_FACTORS = (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B"))


class Adapter(Weights):
    """W + scaling B A for every matrix that the adapter changes; rsLoRA, DoRA, rank and alpha
    patterns, whole saved modules included.
    """

    def __init__(self, folder: Path, base: Weights) -> None:
        """Raises: BadCheckpoint if it is damaged; BadInput for adapters of another kind than
        LoRA.
        """
        self.name, self.base, self.anatomy = str(folder), base, base.anatomy
        try:
            self.config: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            kind = self.config["peft_type"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BadCheckpoint(
                f"{folder / CONFIG} cannot be read as an adapter's configuration: {error!r}."
            ) from error
        if kind != "LORA":
            raise BadInput(
                f"{folder} is a {kind} adapter, and audit adds up only LoRA; merge it into the"
                " model with PEFT, then audit that."
            )
        if not (folder / FILE).is_file():
            raise BadCheckpoint(f"{folder} has no {FILE}; save the adapter as safetensors.")
        self.tensors = Shards(str(folder), folder, [FILE])
        if not any(".lora_" in n for n in self.tensors):
            raise BadCheckpoint(f"{folder / FILE} holds no LoRA factors; save the adapter again.")

    @property
    def bytes_read(self) -> int:
        """Without what was read of the base."""
        return self.tensors.bytes_read

    def matrix(self, site: Site) -> Float[Tensor, "out in"]:
        site = self.anatomy.resolve(site)
        address = self.anatomy.addresses[site]
        module = f"{_PREFIX}{address.module}"
        # modules that were trained whole, and embeddings, which PEFT saves beside their factors
        saved = next(
            (
                n
                for s in ("modules_to_save.", "", "base_layer.")
                if (n := f"{module}.{s}weight") in self.tensors
            ),
            None,
        )
        weight = (
            self.base.matrix(site)
            if saved is None
            else WeightView(site, self.tensors.read(saved).float(), address.packing).read()
        )
        if f"{module}.base_layer.lora_A.weight" in self.tensors:
            raise BadInput(
                f"{self.name} changes two parameters of {address.module}; merge it into the model"
                " with PEFT, then audit that."
            )
        names = next((n for n in _FACTORS if f"{module}.{n[0]}" in self.tensors), None)
        wanted = tuple(self.config.get("target_parameters") or ())
        if names is None or (site.expert is not None and not address.parameter.endswith(wanted)):
            return weight
        a, b = (self.tensors.read(f"{module}.{n}").float() for n in names)
        try:
            return self._directed(module, address, weight, self._change(site, address, a, b))
        except (RuntimeError, IndexError) as error:
            shapes = " and ".join(str(tuple(t.shape)) for t in (a, b))
            raise BadInput(
                f"{self.name} has factors of shape {shapes} for {site}, so it was made on another"
                f" model than {self.base.name}."
            ) from error

    def _change(
        self, site: Site, address: Address, a: Tensor, b: Tensor
    ) -> Float[Tensor, "out in"]:
        """The site's part of scaling B A."""
        # PEFT's order: A (experts * r, in) by expert, B (out, r * experts) by rank
        if site.expert is not None:
            experts = self.anatomy.model.get_parameter(address.parameter).shape[0]
            a, b = (
                a.view(experts, -1, a.shape[1])[site.expert],
                b.view(len(b), -1, experts)[:, :, site.expert],
            )
        whole: Tensor = self._scaling(address, len(a)) * (b @ a)
        return whole if address.packing.rows is None else whole[address.packing.rows]

    def _scaling(self, address: Address, rank: int) -> float:
        alpha = float(
            _by_pattern(
                self.config.get("alpha_pattern"), address, self.config.get("lora_alpha", rank)
            )
        )
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def _directed(self, module: str, address: Address, weight: Tensor, change: Tensor) -> Tensor:
        """DoRA gives every output channel a length of its own; without it the change is simply
        added.
        """
        name = f"{module}.lora_magnitude_vector"
        name = name if name in self.tensors else f"{name}.weight"
        if name not in self.tensors:
            return weight + change
        length = self.tensors.read(name).float().flatten()
        length = length if address.packing.rows is None else length[address.packing.rows]
        changed = weight + change
        scaled: Tensor = changed * (length / changed.norm(dim=1))[:, None]
        return scaled


def _by_pattern(patterns: dict[str, Any] | None, address: Address, default: Any) -> Any:
    """PEFT's rule: the first pattern that the end of the module's name matches."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", address.module):
            return value
    return default
