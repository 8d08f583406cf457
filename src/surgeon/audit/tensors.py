"""Single tensors of a checkpoint in whatever dtype they are stored, and slices of them, with the
bytes counted.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..anatomy.shards import Shards, Stored
from ..errors import BadCheckpoint

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Tensors:
    """The tensors of a local folder or of a repository on the Hub.

    `bytes_read` counts what was read of their data.
    """

    def __init__(self, shards: Shards) -> None:
        self.shards = shards

    @property
    def bytes_read(self) -> int:
        return self.shards.bytes_read

    @property
    def name(self) -> str:
        return self.shards.name

    def __contains__(self, name: str) -> bool:
        return name in self.shards.stored

    def __iter__(self) -> Any:
        return iter(self.shards.stored)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shards.stored[name].shape

    def read(self, name: str, index: int | None = None) -> Tensor:
        """The tensor, or its part `index` along the first axis.

        Raises: BadCheckpoint if it is missing, damaged or of unknown dtype.
        """
        if name not in self.shards.stored:
            raise BadCheckpoint(
                f"{self.name} lacks {name}, without which the weight beside it cannot be read;"
                " download it again."
            )
        stored = self.shards.stored[name]
        if stored.dtype not in _DTYPES:
            raise BadCheckpoint(
                f"{self.name} stores {name} as {stored.dtype}, which Surgeon does not read;"
                " dequantize the model first."
            )
        dtype, shape = _DTYPES[stored.dtype], stored.shape
        if stored.stop - stored.start != math.prod(shape) * dtype.itemsize:
            raise BadCheckpoint(
                f"{stored.shard} of {self.name} does not describe {name} soundly; download it"
                " again."
            )
        if index is not None:
            shape = shape[1:]
            start = stored.start + index * math.prod(shape) * dtype.itemsize
            stored = replace(stored, start=start, stop=start + math.prod(shape) * dtype.itemsize)
        data = self._bytes(stored)
        return (
            torch.frombuffer(data, dtype=torch.uint8).view(dtype).reshape(shape)
            if data
            else torch.empty(shape, dtype=dtype)
        )

    @cached_property
    def metadata(self) -> dict[str, str]:
        """What the headers of all shards hold besides tensors."""
        found: dict[str, str] = {}
        for shard in dict.fromkeys(s.shard for s in self.shards.stored.values()):
            length = int.from_bytes(self._bytes(Stored(shard, "U8", (8,), 0, 8)), "little")
            found |= json.loads(self._bytes(Stored(shard, "U8", (length,), 8, 8 + length))).get(
                "__metadata__", {}
            )
        return found

    def _bytes(self, stored: Stored) -> bytearray:
        data = bytearray(stored.stop - stored.start)
        self.shards.read_into(stored, memoryview(data))
        return data
