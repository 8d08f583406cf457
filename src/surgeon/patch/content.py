"""What a patch holds: deltas, and the tensors they were made on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from ..anatomy import Site
from .deltas import Delta, LowRankDelta


@dataclass(frozen=True)
class BaseTensor:
    """The tensor a patch was made on.

    digest: of the matrix (out, in), see `surgeon.anatomy.digest`. result: the same with the patch
    applied; "" if not known. parameter: its name in the model. shape: (out, in). dtype: as in
    "bfloat16". stored: the shape of the parameter, which may hold more than the matrix.
    transposed: whether it holds the matrix as (in, out).
    """

    digest: str
    result: str
    parameter: str
    shape: tuple[int, int]
    dtype: str
    stored: tuple[int, ...]
    transposed: bool


@dataclass(frozen=True, eq=False)
class Content:
    """Deltas, applied in order, and the base tensor of every site they change.

    made_by: what made it, its settings and seed, and the package's version; anything JSON can hold.
    Raises: ValueError if the parts do not fit one another.
    """

    deltas: tuple[Delta, ...]
    base: dict[Site, BaseTensor]
    made_by: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.deltas or {delta.site for delta in self.deltas} != set(self.base):
            raise ValueError(
                "a patch needs at least one delta, and a base tensor for each site it changes and"
                " for no other"
            )
        for delta in self.deltas:
            base = self.base[delta.site]
            delta.check(base.shape)
            if isinstance(delta, LowRankDelta):
                continue
            dtype = dtype_name(delta.old.dtype)
            if dtype != base.dtype:
                raise ValueError(
                    f"a delta of {delta.site} holds {dtype}, its base tensor is {base.dtype}"
                )

    @property
    def sites(self) -> list[Site]:
        return list(self.base)

    def on(self, site: Site) -> list[Delta]:
        """The deltas of one site, in the order they are applied."""
        return [delta for delta in self.deltas if delta.site == site]

    def touched(self, site: Site) -> Bool[Tensor, "out in"]:
        """The entries whose bits the patch changes (for a low-rank term: may change)."""
        shape = self.base[site].shape
        mask = torch.zeros(shape, dtype=torch.bool)
        for delta in self.on(site):
            mask |= delta.touched(shape)
        return mask

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of the deltas, named `<number of the delta>.<part>`."""
        return {
            f"{number}.{name}": tensor
            for number, delta in enumerate(self.deltas)
            for name, tensor in delta.tensors().items()
        }

    def header(self) -> dict[str, Any]:
        """All that is not a tensor, for JSON."""
        return {
            "made_by": self.made_by,
            "deltas": [{"kind": d.kind, "site": str(d.site), **d.settings()} for d in self.deltas],
            "base": {
                str(site): {**vars(base), "shape": list(base.shape), "stored": list(base.stored)}
                for site, base in self.base.items()
            },
        }

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything in the patch."""
        total = hashlib.sha256(json.dumps(self.header(), sort_keys=True).encode())
        for name, tensor in sorted(self.tensors().items()):
            total.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}:".encode())
            # as bytes: numpy has no bfloat16
            total.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        return total.hexdigest()

    def __str__(self) -> str:
        operation = self.made_by.get("operation", "a change")
        where = ", ".join(map(str, self.sites[:3]))
        if len(self.sites) > 3:
            where += f" and {len(self.sites) - 3} more"
        return f"{operation} of {where}, digest {self.digest[:12]}"


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype without `torch.` before it."""
    return str(dtype).removeprefix("torch.")
