"""Covariances on disk: one safetensors file each, named by a hash of everything that decides its
content, so files can be shared.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .. import files

_KEY = "surgeon"  # safetensors writes several metadata keys in random order, so there is only one


def default_folder() -> Path:
    """$SURGEON_CACHE, else `surgeon` in the user's cache folder."""
    own = os.environ.get("SURGEON_CACHE")
    if own:
        return Path(own)
    users = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return users / "surgeon" / "covariance"


@dataclass(frozen=True)
class CovarianceCache:
    """Files in `folder`. Raises: BadInput where the folder cannot be made or written."""

    folder: Path

    def path(self, key: Mapping[str, Any]) -> Path:
        """key: whatever decides the content, as JSON can hold it."""
        return self.folder / f"{hashlib.sha256(_text(key).encode()).hexdigest()[:32]}.safetensors"

    def read(self, key: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and numbers kept under `key`; None if there are none, or the file is damaged or
        of another key.
        """
        try:
            with safe_open(self.path(key), "pt") as file:
                about = json.loads((file.metadata() or {})[_KEY])
                # the name is a hash of the key, cut short; the key itself decides
                if about["key"] != json.loads(_text(key)):
                    return None
                names = file.keys()
                return {name: file.get_tensor(name) for name in names}, about["numbers"]
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return None

    def write(
        self, key: Mapping[str, Any], tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]
    ) -> None:
        """Keep tensors and numbers under `key`. Raises: BadInput, SurgeonError."""
        files.make_folder(self.folder)
        raw = safetensors.torch.save(dict(tensors), {_KEY: _text({"key": key, "numbers": numbers})})
        files.write_bytes(self.path(key), raw)

    def drop(self, key: Mapping[str, Any]) -> None:
        self.path(key).unlink(missing_ok=True)


def _text(value: Mapping[str, Any]) -> str:
    return json.dumps(value, sort_keys=True)
