"""Models of gene expression: scGPT, Geneformer and cell sentences; what they cannot live without,
beside nulls that can say no.
"""

from .checkpoint import LoadedCells, load_cells, make_vocab, save_cells
from .data import Expression, expression, read_cells
from .likelihood import Marginal, MaskedNLL, fit_marginal, masked_nll, masks
from .map import CellMap, MapConfig, map_damage
from .model import LAYOUT, CellConfig, CellOutput, ScGPT
from .stage import Stage, StageConfig, open_stage
from .tokenise import Batch, TokenConfig, tokenise
from .train import CellTraining, TrainConfig, Trained, train

__all__ = [
    "LAYOUT",
    "Batch",
    "CellConfig",
    "CellMap",
    "CellOutput",
    "CellTraining",
    "Expression",
    "LoadedCells",
    "MapConfig",
    "Marginal",
    "MaskedNLL",
    "ScGPT",
    "Stage",
    "StageConfig",
    "TokenConfig",
    "TrainConfig",
    "Trained",
    "expression",
    "fit_marginal",
    "load_cells",
    "make_vocab",
    "map_damage",
    "masked_nll",
    "masks",
    "open_stage",
    "read_cells",
    "save_cells",
    "tokenise",
    "train",
]
