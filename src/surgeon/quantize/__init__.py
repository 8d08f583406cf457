"""Compression that keeps the critical entries alive: round-to-nearest with clipping and hold-out,
and its exports.
"""

from .activations import ActivationConfig, quantize_activation, quantized_activations
from .checkpoint import Source, check_target, unfinished, write_folder
from .compare import Row, pareto, sweep, table
from .compare_activations import ActivationResult, activation_table, tensor_table
from .compressed import export_compressed
from .config import CLIPS, METHODS, QuantizeConfig
from .dense import export_dense
from .export import Export, ExportPlan
from .gguf_types import TensorTypes, tensor_types
from .grid import Block, Grid, Quantized, quantize_matrix
from .holdout import MatrixReport, Treated, treat
from .peers import has_gptq, missing_peers
from .quantize import (
    Quantization,
    QuantizeResult,
    input_mean_squares,
    prepare,
    quantize_,
    quantized,
    quantized_sites,
)
from .sidecar import export_sidecar
from .smooth import Smoothing, smoothing
from .torchao_export import export_torchao

# what `surgeon quantize --export` knows, by name
EXPORTS: dict[str, Export] = {
    "dense": export_dense,
    "compressed-tensors": export_compressed,
    "sidecar": export_sidecar,
    "torchao": export_torchao,
}

__all__ = [
    "CLIPS",
    "EXPORTS",
    "METHODS",
    "ActivationConfig",
    "ActivationResult",
    "Block",
    "Export",
    "ExportPlan",
    "Grid",
    "MatrixReport",
    "Quantization",
    "QuantizeConfig",
    "QuantizeResult",
    "Quantized",
    "Row",
    "Smoothing",
    "Source",
    "TensorTypes",
    "Treated",
    "activation_table",
    "check_target",
    "export_compressed",
    "export_dense",
    "export_sidecar",
    "export_torchao",
    "has_gptq",
    "input_mean_squares",
    "missing_peers",
    "pareto",
    "prepare",
    "quantize_",
    "quantize_activation",
    "quantize_matrix",
    "quantized",
    "quantized_activations",
    "quantized_sites",
    "smoothing",
    "sweep",
    "table",
    "tensor_table",
    "tensor_types",
    "treat",
    "unfinished",
    "write_folder",
]
