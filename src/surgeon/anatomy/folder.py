"""The one reader of checkpoint folders: which files are the model, and their tensors one by one.

A checkpoint is a config.json beside weights as safetensors. `model_files` decides which of a
folder's files are the model, for every verb: those that its index names, else model.safetensors.
transformers, which loads models into memory, prefers model.safetensors; so a folder that has both
is refused unless both mean the same file, and what is loaded and what is read here are the same.

The header of each file is read once and checked in full: every tensor's dtype, shape and place,
without gaps or overlaps from the end of the header to the end of the file. After that a tensor is
a shape and a span of bytes. Spans are read with plain reads, not through a memory map: mapped pages
count against a limit of the address space in full, and against one of resident memory as long as a
tensor lives in them. `hub.RemoteShards` reads the same spans over the network.

What is read of a file in its order, from the first byte on, goes into its SHA-256 on the way, so
that the fingerprint of a checkpoint that was read through costs no second reading.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import BadCheckpoint, PackedWeight

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
# by the names of the safetensors format
PLAIN = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES = {
    **PLAIN,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "C64": torch.complex64,
    "BOOL": torch.bool,
}
# the format has some more, in which a number is no whole byte, or which nothing here computes with
_BITS = {name: dtype.itemsize * 8 for name, dtype in DTYPES.items()} | {
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F4": 4,
}
_LONGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors library
_CHUNK = 2**24  # bytes that are copied or hashed at a time
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


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
    """The tensors of some safetensors files of a folder, by name, in the order of the files.

    name: what messages call the model. stored: what the headers say of each tensor. metadata: what
    they hold besides. `bytes_read` counts what was read of tensors.
    """

    def __init__(self, name: str, folder: Path, files: Iterable[str]) -> None:
        """Raises: BadCheckpoint if one of `files` is damaged or cannot be read."""
        self.name, self.folder, self.files = name, folder, list(files)
        self.bytes_read = 0
        # of each file the SHA-256 up to a byte
        self._hashed = {file: (hashlib.sha256(), 0) for file in self.files}
        self.stored: dict[str, Stored] = {}
        self.metadata: dict[str, str] = {}
        for file in self.files:
            self._take_header(file)

    @classmethod
    def of(cls, name: str, folder: Path) -> Shards:
        """The weights of a local checkpoint. Raises: BadCheckpoint."""
        return cls(name, folder, model_files(folder))

    def __contains__(self, name: str) -> bool:
        return name in self.stored

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def within(self, shard: str) -> list[str]:
        """The names of the tensors of one file, in its order."""
        return [name for name, stored in self.stored.items() if stored.shard == shard]

    def fingerprint(self) -> str | None:
        """See `fingerprint`; None where that cannot be told. What was not hashed is read now."""
        total = hashlib.sha256((self.folder / CONFIG).read_bytes())
        for shard in self.files:
            for _ in self._chunks(shard, self._hashed[shard][1]):
                pass
            total.update(self._hashed[shard][0].digest())
        return total.hexdigest()

    def copy(self, shard: str, target: Path) -> None:
        """Write the bytes of a file to another. Raises: BadCheckpoint if it cannot be read."""
        with target.open("wb") as file:
            for chunk in self._chunks(shard, 0):
                file.write(chunk)

    def dtype(self) -> torch.dtype:
        """The dtype of the first tensor of plain numbers. Raises: PackedWeight if there is none."""
        for stored in self.stored.values():
            if stored.dtype in PLAIN:
                return PLAIN[stored.dtype]
        raise PackedWeight(
            f"{self.name} holds no plain floating-point tensors, so it is quantized; give the"
            " original weights."
        )

    def read(self, name: str, index: int | None = None) -> Tensor:
        """The tensor, or its part `index` along the first axis, in its own dtype.

        Raises: BadCheckpoint if it is missing, cut off or of a dtype that is not read.
        """
        if name not in self.stored:
            raise BadCheckpoint(
                f"{self.name} lacks {name}, without which the weight beside it cannot be read;"
                " download it again."
            )
        stored = self.stored[name]
        if stored.dtype not in DTYPES:
            raise BadCheckpoint(
                f"{self.name} stores {name} as {stored.dtype}, which Surgeon does not read;"
                " dequantize the model first."
            )
        shape, start = stored.shape, stored.start
        if index is not None:
            shape = shape[1:]
            start += index * math.prod(shape) * DTYPES[stored.dtype].itemsize
        tensor = torch.empty(shape, dtype=DTYPES[stored.dtype])
        if tensor.numel():
            self._read_into(tensor.view(-1).view(torch.uint8).numpy().data, stored.shard, start)
        self.bytes_read += tensor.nbytes
        return tensor

    def read_plain(self, name: str) -> Tensor:
        """As `read`. Raises: PackedWeight also if it holds no plain floating-point numbers."""
        self.check_plain(name)
        return self.read(name)

    def check_plain(self, name: str) -> None:
        """Raises: PackedWeight if the tensor holds no plain floating-point numbers."""
        if name in self.stored and self.stored[name].dtype not in PLAIN:
            raise PackedWeight(
                f"{self.name} stores {name} as {self.stored[name].dtype}, which is quantized; give"
                " the original weights."
            )

    # -- bytes ---------------------------------------------------------------------------------

    def _place(self, shard: str, start: int, stop: int) -> tuple[Path, int]:
        """A local file with bytes start..stop of a shard, and where they begin in it."""
        return self.folder / shard, start

    def _size(self, shard: str) -> int | None:
        """Of a shard, in bytes; None if it is not known."""
        return (self.folder / shard).stat().st_size

    def _read_into(self, whole: memoryview, shard: str, start: int) -> None:
        buffer, stop = whole, start + len(whole)
        path, offset = self._place(shard, start, stop)
        try:
            with path.open("rb", buffering=0) as file:
                file.seek(offset)
                while len(buffer):
                    count = file.readinto(buffer)
                    if not count:
                        raise BadCheckpoint(
                            f"{shard} of {self.name} ends before byte {stop}; download it again."
                        )
                    buffer = buffer[count:]
        except OSError as error:
            raise BadCheckpoint(
                f"{shard} of {self.name} cannot be read: {error.strerror}."
            ) from error
        digest, reached = self._hashed[shard]
        if start <= reached < stop:
            digest.update(whole[reached - start :])
            self._hashed[shard] = digest, stop

    def _chunks(self, shard: str, start: int) -> Iterator[bytearray]:
        """The bytes of a local shard from `start` to its end."""
        size = (self.folder / shard).stat().st_size
        for begin in range(start, size, _CHUNK):
            yield self._span(shard, begin, min(begin + _CHUNK, size))

    def _span(self, shard: str, start: int, stop: int) -> bytearray:
        data = bytearray(stop - start)
        self._read_into(memoryview(data), shard, start)
        return data

    # -- headers -------------------------------------------------------------------------------

    def _take_header(self, shard: str) -> None:
        """Add what the header of `shard` says to `stored` and `metadata`."""
        try:
            size = self._size(shard)
            if size is not None and size < 8:
                raise ValueError("it has no header")
            begin = 8 + int.from_bytes(self._span(shard, 0, 8), "little")
            if begin > _LONGEST_HEADER or (size is not None and begin > size):
                raise ValueError("its header does not end in it")
            header = json.loads(self._span(shard, 8, begin))
            metadata = header.pop("__metadata__", {})
            if not all(isinstance(value, str) for value in metadata.values()):
                raise ValueError("its metadata are no texts")
            tensors = {name: _stored(shard, begin, name, about) for name, about in header.items()}
            end = _end(begin, tensors)
        except OSError as error:
            raise BadCheckpoint(
                f"{shard} of {self.name} cannot be read: {error.strerror}."
            ) from error
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
            why = f": {error}" if type(error) is ValueError else ""
            raise BadCheckpoint(
                f"{shard} of {self.name} is damaged or not a safetensors file{why}; download or"
                " write it again."
            ) from error
        if size is not None and size != end:
            raise BadCheckpoint(
                f"{shard} of {self.name} is truncated or damaged: its header promises {end} bytes,"
                f" and it has {size}; download it again."
            )
        self.stored |= tensors
        self.metadata |= metadata


def _stored(shard: str, begin: int, name: str, about: dict[str, Any]) -> Stored:
    """What a header says of one tensor, data beginning at byte `begin`.

    Raises: ValueError for what is not sound; TypeError or KeyError for what is no description.
    """
    dtype, shape, (start, stop) = about["dtype"], about["shape"], about["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(f"it has no dtype {dtype} for {name}")
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"{shape} is no shape for {name}")
    if type(start) is not int or type(stop) is not int:
        raise ValueError(f"{name} does not lie at whole bytes")
    if (stop - start) * 8 != math.prod(shape) * _BITS[dtype]:
        raise ValueError(f"{name}, {shape} of {dtype}, cannot have {stop - start} bytes")
    return Stored(shard, dtype, tuple(shape), begin + start, begin + stop)


def _end(begin: int, tensors: dict[str, Stored]) -> int:
    """Where the last tensor ends. Raises: ValueError unless each begins where another ends."""
    end = begin
    for stored in sorted(tensors.values(), key=lambda s: (s.start, s.stop)):
        if stored.start != end:
            raise ValueError("its tensors overlap or leave gaps")
        end = stored.stop
    return end


def check_folder(folder: Path) -> Path:
    """Return `folder` if it is a readable safetensors checkpoint.

    Raises: BadCheckpoint, with what to do.
    """
    Shards.of(str(folder), folder)
    return folder


def model_files(
    folder: Path, name: str | None = None, there: Collection[str] | None = None
) -> list[str]:
    """The files of `folder` that are the model, in order.

    name, there: what messages call the model, and its files, where those of the folder are not all.
    Raises: BadCheckpoint, with what to do.
    """
    name = str(folder) if name is None else name
    there = _listed(folder) if there is None else there
    if CONFIG not in there:
        raise BadCheckpoint(f"{name} has no config.json, so it is not a transformers checkpoint.")
    own = config_json(folder).get("transformers_weights")
    if own not in (None, SINGLE, INDEX):
        raise BadCheckpoint(
            f"the config.json of {name} names weights of its own, {own}, which Surgeon does not"
            " follow; load the model with transformers and save it again."
        )
    if INDEX in there:
        return _indexed(folder, name, there)
    if SINGLE in there:
        return [SINGLE]
    others = sorted(f for f in there if fnmatch(f, "*.safetensors") and not f.startswith("."))
    if others:
        raise BadCheckpoint(
            f"{name} has neither {SINGLE} nor {INDEX}, so it does not say that"
            f" {', '.join(others[:3])} are the model; rename a single file, or save the model again"
            " with transformers."
        )
    raise _no_safetensors(name, there)


def _listed(folder: Path) -> set[str]:
    if not folder.is_dir():
        raise BadCheckpoint(
            f"{folder} is a file; MODEL is the folder that holds config.json and the weights."
        )
    try:
        return {p.name for p in folder.iterdir() if p.is_file()}
    except OSError as error:
        raise BadCheckpoint(f"the folder {folder} cannot be read: {error.strerror}.") from error


def _indexed(folder: Path, name: str, there: Collection[str]) -> list[str]:
    """The shards that the index names."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        shards = sorted(set(index["weight_map"].values()))
        outside = any(Path(s).name != s for s in shards)
        if not shards:
            raise ValueError("it names no shard")
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise BadCheckpoint(f"{INDEX} of {name} is not a safetensors index: {error!r}.") from error
    if outside:
        raise BadCheckpoint(f"{INDEX} of {name} points outside its folder.")
    if missing := [s for s in shards if s not in there]:
        raise BadCheckpoint(
            f"{name} lacks the shards {', '.join(missing[:3])} that its index names; download them"
            " again."
        )
    if SINGLE in there and shards != [SINGLE]:
        raise BadCheckpoint(
            f"{name} has both {SINGLE} and an index that names other shards"
            f" ({', '.join(shards[:3])}), and only one of them can be the model; move the other"
            " away."
        )
    return shards


def _no_safetensors(name: str, there: Collection[str]) -> BadCheckpoint:
    pickled = [f for pattern in _PICKLES for f in sorted(there) if fnmatch(f, pattern)]
    if pickled:
        return BadCheckpoint(
            f"{name} holds only pickled weights ({', '.join(pickled[:3])}), which can run code when"
            " opened, so Surgeon does not. Convert them once in a place you trust:"
            " AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)."
        )
    return BadCheckpoint(f"{name} holds no *.safetensors weights.")


def config_json(folder: Path) -> dict[str, Any]:
    """The folder's config.json as it is written. Raises: BadCheckpoint if it is no JSON object."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadCheckpoint(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise BadCheckpoint(f"{path} is not a valid JSON file: {error}.") from error
    if not isinstance(config, dict):
        raise BadCheckpoint(f"{path} holds no JSON object, so it describes no model.")
    return config


def fingerprint(folder: Path) -> str:
    """SHA-256 over config.json and every weight file: two folders share it only if they hold the
    same model.
    """
    return str(Shards.of(str(folder), folder).fingerprint())


def overwrite(shard: Path, stored: Stored, tensor: Tensor) -> None:
    """Write the tensor's bytes over those that a copy of its shard holds, so that order, metadata
    and all other tensors stay as they are.
    """
    raw = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    with shard.open("r+b") as file:
        file.seek(stored.start)
        file.write(raw.data)
