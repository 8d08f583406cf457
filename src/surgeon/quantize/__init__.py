"""Compression that keeps the critical entries alive: round-to-nearest with clipping and hold-out,
and its exports.
"""

from .activations import ActivationConfig, quantize_activation, quantized_activations
from .compare import (
    ActivationResult,
    ActivationRow,
    Row,
    Treatment,
    activation_table,
    pareto,
    sweep,
    table,
    treatments,
)
from .config import CLIPS, METHODS, QuantizeConfig
from .formats import (
    EXPORTS,
    Export,
    ExportPlan,
    Source,
    TensorTypes,
    export_compressed,
    export_dense,
    export_sidecar,
    export_torchao,
    tensor_types,
    write_folder,
)
from .grid import Block, Grid, Quantized, quantize_matrix
from .holdout import MatrixReport, Treated, treat
from .quantize import (
    Quantization,
    QuantizeResult,
    input_mean_squares,
    prepare,
    quantize_,
    quantized,
    quantized_sites,
)
from .smooth import Smoothing, smoothing

__all__ = [
    "CLIPS",
    "EXPORTS",
    "METHODS",
    "ActivationConfig",
    "ActivationResult",
    "ActivationRow",
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
    "Treatment",
    "activation_table",
    "export_compressed",
    "export_dense",
    "export_sidecar",
    "export_torchao",
    "input_mean_squares",
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
    "tensor_types",
    "treat",
    "treatments",
    "write_folder",
]
