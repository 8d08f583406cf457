"""Quantized checkpoints as files: what is written, and what is read again.

dense                plain safetensors in the checkpoint's own dtype, for any loader
compressed           pack-quantized of compressed-tensors, which transformers and vLLM read
torchao              safetensors of torchao, which transformers reads
sidecar              packed codes, and a patch that puts the critical entries back
sidecar_loader       what transformers calls to read those
packing              codes without gaps between their bits
packed               what the exports of packed weights have in common
export               the plan of an export, and the folder, written shard by shard
gguf_types           flags for llama-quantize, which writes GGUF itself
"""

from .compressed import export_compressed
from .dense import export_dense
from .export import RECORD, Export, ExportPlan, Source, write_folder
from .gguf_types import TYPES, TensorTypes, tensor_types
from .packed import KEEP
from .sidecar import export_sidecar
from .torchao import export_torchao

# every export, by the name that users know
EXPORTS: dict[str, Export] = {
    "dense": export_dense,
    "compressed-tensors": export_compressed,
    "sidecar": export_sidecar,
    "torchao": export_torchao,
}

__all__ = [
    "EXPORTS",
    "KEEP",
    "RECORD",
    "TYPES",
    "Export",
    "ExportPlan",
    "Source",
    "TensorTypes",
    "export_compressed",
    "export_dense",
    "export_sidecar",
    "export_torchao",
    "tensor_types",
    "write_folder",
]
