"""Patches as files: safetensors, with one metadata key that holds everything else as JSON.

The same patch gives the same bytes; a file that was changed in any way is refused, by a checksum
over all it holds.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import safetensors.torch

from .. import files
from ..anatomy import Site
from ..errors import BadInput, BadPatch
from .deltas import KINDS, Delta
from .patch import BaseTensor, Patch

_VERSION = 1
# safetensors writes several metadata keys in random order, so there is only this one
_KEY = "surgeon"


def save(patch: Patch, path: str | Path) -> None:
    """Write `patch` to `path`; on failure nothing is there that was not before.

    Raises: BadInput if the folder is missing or cannot be written; SurgeonError if writing fails,
    as on a full disk.
    """
    files.write_bytes(Path(path), to_bytes(patch))


def to_bytes(patch: Patch) -> bytes:
    """The patch as it stands in its file."""
    header = {**patch.header(), "version": _VERSION, "sha256": patch.digest}
    tensors = {name: t.contiguous() for name, t in patch.tensors().items()}
    return safetensors.torch.save(tensors, {_KEY: json.dumps(header, sort_keys=True)})


def load(path: str | Path) -> Patch:
    """Read a patch.

    Raises: BadInput if there is no such file; BadPatch if it is damaged, or is not a patch.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise BadInput(
            f"cannot read the patch {path}: {error.strerror}; give a file that Surgeon wrote."
        ) from error
    try:
        header = _header(raw)
        version = header["version"]
        if version == _VERSION:
            tensors = safetensors.torch.load(raw)
            bases = {
                Site.parse(site): BaseTensor(
                    **{**base, "shape": tuple(base["shape"]), "stored": tuple(base["stored"])}
                )
                for site, base in header["base"].items()
            }
            deltas = tuple(_delta(i, delta, tensors) for i, delta in enumerate(header["deltas"]))
            patch = Patch(deltas, bases, header["made_by"])
            if patch.digest != header["sha256"] or set(patch.tensors()) != set(tensors):
                raise ValueError("its checksum does not fit what it holds")
            return patch
    # a damaged file can break any step, and whatever is raised is about this file
    except Exception as error:
        raise BadPatch(
            f"{path} is damaged or is not a patch ({error or type(error).__name__}); write it"
            " again."
        ) from error
    raise BadPatch(
        f"{path} has patch format {version!r}, and this Surgeon reads format {_VERSION}; use the"
        " version that wrote it."
    )


def _header(raw: bytes) -> dict[str, Any]:
    if len(raw) < 8:
        raise ValueError("it is cut short")
    (length,) = struct.unpack("<Q", raw[:8])
    header: dict[str, Any] = json.loads(json.loads(raw[8 : 8 + length])["__metadata__"][_KEY])
    return header


def _delta(index: int, settings: dict[str, Any], tensors: dict[str, Any]) -> Delta:
    prefix = f"{index}."
    own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    return KINDS[settings["kind"]].read(Site.parse(settings["site"]), settings, own)
