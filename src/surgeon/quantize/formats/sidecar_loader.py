"""What transformers calls to load a folder that the sidecar export wrote.

    import surgeon.quantize.formats.sidecar_loader
    model = AutoModelForCausalLM.from_pretrained(folder)

How this works. The weights are packed in the file only. transformers reads the file tensor by
tensor, and collects those that `SidecarQuantizer.serialized_names` says belong together; `Unpack`
makes a dense weight of them, the matrices of fused weights in their places, and those of experts
for transformers to merge. When all weights are there, the sidecar patch puts the critical entries
back. What results is a dense model like any other, which can be trained, patched and saved.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ...anatomy import Anatomy, Packing, Site, WeightView
from ...anatomy.load import DTYPES
from ...errors import BadCheckpoint, BadInput
from ...patch import load
from ..grid import Block, Grid
from .packing import pieces
from .sidecar import CORRECTION, METHOD, PARTS, VERSION


@register_quantization_config(METHOD)
class SidecarConfig(QuantizationConfigMixin):
    """The `quantization_config` of config.json.

    packed: the last parts of the names of packed tensors, as "weight". dtype: what the unpacked
    weights are rounded to. correction: digest of the patch, None if no entry is put back.
    """

    # tells transformers that the loaded model is dense, and holds no trace of this configuration
    dequantize = True

    def __init__(
        self,
        bits: int,
        symmetric: bool,
        block: str,
        dtype: str,
        packed: list[str],
        correction: str | None = None,
        version: int = VERSION,
        quant_method: str = METHOD,
        **made_with: Any,
    ) -> None:
        if version != VERSION or dtype not in DTYPES:
            raise BadCheckpoint(
                f"this checkpoint has sidecar format {version!r} with {dtype} weights, and this"
                f" Surgeon reads format {VERSION}; use the version that wrote it."
            )
        self.quant_method: Any = quant_method
        self.bits, self.symmetric, self.block, self.dtype = bits, symmetric, block, dtype
        self.packed, self.correction, self.version = packed, correction, version
        self.made_with = made_with

    @property
    def grid(self) -> Grid:
        return Grid(self.bits, self.symmetric, Block.parse(self.block))


@register_quantizer(METHOD)
class SidecarQuantizer(HfQuantizer):
    """Unpacks each matrix as it is read, and applies the correction at the end."""

    requires_calibration = True
    quantization_config: SidecarConfig

    def __init__(self, quantization_config: SidecarConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.places: dict[str, list[tuple[Site, Packing]]] = {}
        self.serialized_names = {
            leaf: [f"{leaf}_{part}" for part in PARTS] for leaf in quantization_config.packed
        }
        # dense ones too, for those of experts may have to be merged
        if "weight" in self.serialized_names:
            self.serialized_names["weight"].insert(0, "weight")

    def validate_environment(self, device_map: Any = None, **kwargs: Any) -> None:
        if (
            self.quantization_config.correction is not None
            and isinstance(device_map, dict)
            and "disk" in device_map.values()
        ):
            raise BadInput(
                "a sidecar's correction checks and changes weights in memory, so none can be on"
                " disk; use cpu or cuda."
            )

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Raises: BadInput for one that is narrower than the weights, in which the correction could
        not be checked.
        """
        own = DTYPES[self.quantization_config.dtype]
        if (
            self.quantization_config.correction is not None
            and torch.promote_types(dtype, own) != dtype
        ):
            raise BadInput(
                f"this checkpoint is corrected in {own}, which {dtype} does not hold; load it as"
                f" dtype={own}, then change it."
            )
        return dtype

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        # the model is being built on meta, where row numbers would be lost
        with torch.device("cpu"):
            anatomy = Anatomy.of(model)
        for site, address in anatomy.addresses.items():
            self.places.setdefault(address.parameter, []).append((site, address.packing))

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        # saved as any dense model, not turned back into packed names
        model._weight_conversions = None
        digest = self.quantization_config.correction
        if digest is not None:
            path = _beside(model, CORRECTION)
            patch = load(path)
            if patch.digest != digest:
                raise BadCheckpoint(
                    f"{path} is not the correction that config.json names ({digest[:12]}); write"
                    " the folder again."
                )
            patch.apply_(Anatomy.of(model), allow_tied=True)
        return model

    def get_load_operations(self) -> dict[str, type[ConversionOps]]:
        return {"dequantize": Unpack}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


class Unpack(ConversionOps):
    """Tensors of the file to dense weights of the model; dense ones pass."""

    def __init__(self, hf_quantizer: SidecarQuantizer) -> None:
        # by this name transformers sees that tensors are not to be cast before
        self.hf_quantizer = hf_quantizer

    def convert(
        self,
        input_dict: dict[str, Any],
        *args: Any,
        full_layer_name: str = "",
        model: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Dense weights from the parts of one tensor, or of the experts of a layer, under their
        names in the file.
        """
        parameter = model.get_parameter(full_layer_name)
        by_stem: dict[str, dict[str, list[Tensor]]] = {}
        for key, value in input_dict.items():
            stem, _, part = key.rpartition("_")
            stem, part = (stem, part) if part in PARTS else (key, "")
            by_stem.setdefault(stem, {})[part] = value if isinstance(value, list) else [value]
        result = {}
        for stem, tensors in by_stem.items():
            alone = stem in self.hf_quantizer.quantization_config.packed
            dense = tensors.get("") or [
                self._unpack(
                    dict(zip(tensors, one, strict=True)),
                    full_layer_name if alone else None,
                    parameter,
                )
                for one in zip(*tensors.values(), strict=True)
            ]
            dense = [d.to(parameter.dtype) for d in dense]
            # one weight gets its full name; experts keep the names that the merging operations
            # after this one know
            result[full_layer_name if alone else stem] = dense[0] if alone else dense
        return result

    def _unpack(self, parts: dict[str, Tensor], name: str | None, parameter: Tensor) -> Tensor:
        config = self.hf_quantizer.quantization_config
        matrices = [q.dequantize().to(DTYPES[config.dtype]) for q in pieces(parts, config.grid)]
        if name is None:  # one expert, to be merged with the others
            return matrices[0]
        tensor = torch.empty(
            parameter.shape, dtype=DTYPES[config.dtype], device=parts["codes"].device
        )
        for (site, packing), matrix in zip(self.hf_quantizer.places[name], matrices, strict=True):
            WeightView(site, tensor, packing).assign_(matrix)
        return tensor


def _beside(model: Any, name: str) -> Path:
    """A file of the model's folder, or of its repository on the Hub."""
    from transformers.utils.hub import cached_file

    revision = getattr(model.config, "_commit_hash", None)
    path = cached_file(
        model.name_or_path, name, revision=revision, _raise_exceptions_for_missing_entries=False
    )
    if path is None:
        raise BadCheckpoint(
            f"{model.name_or_path} lacks {name}, which puts its critical entries back; copy it from"
            " where it was written."
        )
    return Path(path)
