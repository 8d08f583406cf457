"""One model's matrices by site, from wherever they are: a plain or quantized checkpoint, a GGUF
file, an adapter over a base.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from ..anatomy import Anatomy, Packing, Site, WeightView
from ..anatomy.folder import Shards, config_json
from ..anatomy.hub import open_shards
from ..anatomy.load import read_config, unloaded_anatomy
from ..anatomy.names import TensorNames
from ..errors import BadCheckpoint, SurgeonError
from .packed import FORMATS, Format, Settings, torchao


class Weights(ABC):
    """Matrices by site.

    `name` is what messages call the model; `bytes_read` counts what was read of its data.
    """

    name: str
    anatomy: Anatomy

    @property
    @abstractmethod
    def bytes_read(self) -> int: ...

    @abstractmethod
    def matrix(self, site: Site) -> Float[Tensor, "out in"]:
        """The site's matrix in float32.

        Raises: BadCheckpoint if it is not there or cannot be read; UnknownSite.
        """


@dataclass(frozen=True)
class Plugin:
    """A format that another part of the package writes: a weight is stored as `<name><main>` and
    more.

    read: the site's matrix, given the name and which of the sites it is that are stored under it.
    """

    main: str
    read: Callable[[Checkpoint, str, Site, int], Tensor]


class Checkpoint(Weights):
    """Safetensors in a folder or on the Hub, plain or quantized; only the tensors of the sites that
    are asked for are read.
    """

    def __init__(
        self, name: str, like: Anatomy | None = None, plugins: Mapping[str, Plugin] | None = None
    ) -> None:
        """like: the map of a model that this one may share it with, to save drawing it again.
        plugins: formats by `quant_method`.

        Raises: BadInput, BadCheckpoint.
        """
        self.name = name
        self.tensors = open_shards(name)
        self.folder = self.tensors.folder
        config = read_config(self.folder)
        self.settings = _settings(self.folder)
        same = like is not None and _shape(like.model.config) == _shape(config)
        self.anatomy = like if same and like is not None else unloaded_anatomy(self.folder, config)
        self.plugin = (plugins or {}).get(str(self.settings.get("quant_method")))
        self.formats = {w: f for f in FORMATS for w in self._stored_as(f)}
        self.flattened = (
            _flattened(self.tensors) if self.settings.get("quant_method") == "torchao" else {}
        )
        self.plugged = (
            [n.removesuffix(p.main) for n in self.tensors if n.endswith(p.main)]
            if (p := self.plugin)
            else []
        )
        self.names = TensorNames(
            self.anatomy, {*self.tensors, *self.formats, *self.flattened, *self.plugged}
        )

    @property
    def bytes_read(self) -> int:
        return self.tensors.bytes_read

    def matrix(self, site: Site) -> Float[Tensor, "out in"]:
        name, packing = self.names.find(site)
        try:
            if self.plugin is not None and name in self.plugged:
                return self.plugin.read(
                    self, name, site, self._sharing(name, site).index(site)
                ).float()
            stored, packing = self._read(name, packing)
        except (SurgeonError, MemoryError):
            raise
        # tensors that do not belong together, or that their library refuses, in as many ways as
        # there are formats
        except Exception as error:
            raise BadCheckpoint(
                f"{self.name} stores {site} in a form that cannot be read:"
                f" {str(error).partition(chr(10))[0]}."
            ) from error
        return WeightView(site, stored, packing).read().float()

    def _read(self, name: str, packing: Packing) -> tuple[Tensor, Packing]:
        if name in self.flattened:
            return torchao(self.tensors, *self.flattened[name]), packing
        if name in self.formats:
            form = self.formats[name]
            read = form.read(self.tensors, name.removesuffix(".weight"), self.settings)
            return read, replace(packing, transposed=False) if form.as_linear else packing
        if packing.expert is not None:  # of a stacked tensor only that expert's bytes
            return self.tensors.read(name, packing.expert), replace(packing, expert=None)
        stored = self.tensors.read(name)
        if not stored.is_floating_point():
            raise BadCheckpoint(
                f"{self.name} stores {name} as {stored.dtype} without the scales that belong to it;"
                " dequantize it first."
            )
        return stored.float(), packing

    def _sharing(self, name: str, site: Site) -> list[Site]:
        """The sites that are stored under one name, in the order of the map."""
        return [
            s
            for s in self.anatomy.addresses
            if s.layer == site.layer and self.names.find(s)[0] == name
        ]

    def _stored_as(self, form: Format) -> list[str]:
        """The weights of the checkpoint that are stored in this format, by the names they would
        have in a plain one.
        """
        stems = [n.removesuffix(form.main) for n in self.tensors if n.endswith(form.main)]
        plain = "" if form.main.startswith("_") else ".weight"
        return [f"{stem}{plain}" for stem in stems if f"{stem}{form.sign}" in self.tensors]


def _settings(folder: Path) -> Settings:
    config = config_json(folder)
    settings = (
        config.get("quantization_config")
        or config.get("text_config", {}).get("quantization_config")
        or config.get("compression_config")
    )
    return dict(settings or {})


def _shape(config: Any) -> dict[str, Any]:
    """What of a configuration decides the map of the model."""
    no_matter = (
        "quantization_config",
        "dtype",
        "torch_dtype",
        "transformers_version",
        "_name_or_path",
        "use_cache",
    )
    return {k: v for k, v in config.to_dict().items() if k not in no_matter}


def _flattened(tensors: Shards) -> dict[str, tuple[list[str], Settings]]:
    """The weights that torchao took apart: the tensors of each, and what its header says of it."""
    flattened = {}
    try:
        for name in json.loads(tensors.metadata.get("tensor_names", "[]")):
            about = json.loads(tensors.metadata.get(name, "{}"))
            if "_tensor_data_names" not in about:
                continue
            stem, _, leaf = name.rpartition(".")
            parts = [f"{stem}._{leaf}_{part}" for part in about["_tensor_data_names"]]
            flattened[name] = (
                [p for p in parts if p in tensors],
                {"tensor_names": json.dumps([name]), name: tensors.metadata[name]},
            )
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise BadCheckpoint(
            f"the metadata of {tensors.name} do not say how torchao stored it; write it again."
        ) from error
    return flattened
