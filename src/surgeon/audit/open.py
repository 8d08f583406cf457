"""BASE and OTHER by name: a checkpoint, a GGUF file, or an adapter folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..errors import BadInput
from .adapter import CONFIG, Adapter
from .gguf_file import GgufFile
from .weights import Checkpoint, Plugin, Weights


def open_pair(
    base: str, other: str, plugins: Mapping[str, Plugin] | None = None
) -> tuple[Checkpoint, Weights]:
    """Both models, opened without reading a weight.

    base: `patient`, a folder, or a Hub id. other: the same, a .gguf file, or the folder of a LoRA
    adapter made on the base. plugins: formats that other parts of the package write, by their
    `quant_method`. Raises: BadInput, BadCheckpoint, MissingExtra.
    """
    if base.lower().endswith(".gguf") or (Path(base) / CONFIG).is_file():
        raise BadInput(
            f"BASE must be a model with a config.json, and {base} is none; give the model that"
            " OTHER was made from."
        )
    first = Checkpoint(base, plugins=plugins)
    path = Path(other)
    if other.lower().endswith(".gguf"):
        if not path.is_file():
            raise BadInput(f"there is no file {other}; give the GGUF file to be audited.")
        return first, GgufFile(path, first.anatomy)
    # trainers may put the base's config.json beside an adapter, but not its weights
    if (path / CONFIG).is_file() and not any(path.glob("model*.safetensors")):
        return first, Adapter(path, first)
    return first, Checkpoint(other, first.anatomy, plugins)
