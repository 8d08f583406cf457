"""Single tensors of a safetensors checkpoint, read where they lie, without mapping or opening a
shard as a whole.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import BadCheckpoint, PackedWeight
from .load import check_folder, fingerprint, read_header, weight_files

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies: bytes start..stop of a shard; dtype as the safetensors format writes it
    ("BF16").
    """

    shard: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class Shards:
    """The tensors of a checkpoint folder by name. `bytes_read` counts what was read of them.

    Read with plain reads, not through a memory map: mapped pages count against a limit of the
    address space in full, and against one of resident memory as long as a tensor lives in them.
    """

    def __init__(self, name: str, folder: Path, stored: dict[str, Stored]) -> None:
        self.name, self.folder, self.stored = name, folder, stored
        self.bytes_read = 0

    @classmethod
    def of(cls, name: str, folder: Path) -> Shards:
        """The shards of a local folder. Raises: BadCheckpoint."""
        check_folder(folder)
        stored: dict[str, Stored] = {}
        for shard in weight_files(folder):
            with shard.open("rb") as file:
                begin = 8 + int.from_bytes(file.read(8), "little")
            stored |= described(shard.name, begin, read_header(shard))
        return cls(name, folder, stored)

    def fingerprint(self) -> str | None:
        """SHA-256 of the configuration and every weight file, see `load.fingerprint`; None where
        that cannot be told.
        """
        return fingerprint(self.folder)

    def dtype(self) -> torch.dtype:
        """The dtype of the first tensor of numbers. Raises: PackedWeight if there is none."""
        for tensor in self.stored.values():
            if tensor.dtype in _DTYPES:
                return _DTYPES[tensor.dtype]
        raise PackedWeight(
            f"{self.name} holds no plain floating-point tensors, so it is quantized; give the"
            " original weights."
        )

    def read(self, name: str) -> Tensor:
        """The tensor, in its own dtype.

        Raises: BadCheckpoint if it cannot be read, PackedWeight if it holds no plain numbers.
        """
        tensor = self.stored[name]
        if tensor.dtype not in _DTYPES:
            raise PackedWeight(
                f"{self.name} stores {name} as {tensor.dtype}, which is quantized; give the"
                " original weights."
            )
        dtype = _DTYPES[tensor.dtype]
        if tensor.stop - tensor.start != math.prod(tensor.shape) * dtype.itemsize:
            raise BadCheckpoint(
                f"{tensor.shard} of {self.name} does not describe {name} soundly; download it"
                " again."
            )
        data = torch.empty(tensor.shape, dtype=dtype)
        self.read_into(tensor, data.view(-1).view(torch.uint8).numpy().data)
        return data

    def read_into(self, tensor: Stored, left: memoryview) -> None:
        """Read the tensor's bytes, as they are stored, into a buffer of their length.

        Raises: BadCheckpoint if they cannot be read.
        """
        path, offset = self.place(tensor)
        self.bytes_read += len(left)
        try:
            with path.open("rb", buffering=0) as file:
                while len(left):
                    count = os.preadv(file.fileno(), [left], offset)
                    if count == 0:
                        raise BadCheckpoint(
                            f"{tensor.shard} of {self.name} ends before byte {tensor.stop};"
                            " download it again."
                        )
                    left, offset = left[count:], offset + count
        except OSError as error:
            raise BadCheckpoint(
                f"{tensor.shard} of {self.name} cannot be read: {error.strerror}."
            ) from error

    def place(self, tensor: Stored) -> tuple[Path, int]:
        """A local file with the tensor's bytes, and where they begin in it."""
        return self.folder / tensor.shard, tensor.start


def described(shard: str, begin: int, header: dict[str, Any]) -> dict[str, Stored]:
    """The tensors that a shard's header lists, their data beginning at byte `begin`.

    Raises: BadCheckpoint if it is no such header.
    """
    try:
        return {
            name: Stored(
                shard,
                t["dtype"],
                tuple(t["shape"]),
                begin + t["data_offsets"][0],
                begin + t["data_offsets"][1],
            )
            for name, t in header.items()
            if name != "__metadata__"
        }
    except (KeyError, TypeError, IndexError) as error:
        raise BadCheckpoint(
            f"{shard} is damaged or not a safetensors file; download or write it again."
        ) from error
