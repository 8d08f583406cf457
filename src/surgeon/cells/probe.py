"""A probe of cell types on the model's embeddings of cells: frozen (fitted on the intact model) and
refitted on the broken one.

The frozen probe asks whether what others built on the embeddings still works; the refitted one
whether the cell type is still in them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..result import record
from .extra import needs
from .likelihood import CHUNK
from .model import ScGPT
from .tokenise import Batch

LEAST = 4  # cells of a type, for it to be in both halves twice


@torch.no_grad()
def embeddings(model: ScGPT, batch: Batch) -> Float[Tensor, "cell d_model"]:
    """The state of each cell at <cls>, the first position, with nothing masked."""
    pieces = [batch.of(piece) for piece in batch.pieces(CHUNK)]
    return torch.cat([model(p.genes, p.values, p.padding).states[:, 0] for p in pieces])


@record
class ProbeScore:
    """Accuracy and macro-F1 on the test half of the cells."""

    accuracy: float
    macro_f1: float


@record
class IntactProbe(ProbeScore):
    """The probe of the intact model: beside its score that of always naming the commonest type, how
    many types it tells apart, and how many cells are of a type too rare for that.
    """

    majority: float
    types: int
    cells_left_out: int


class Probe:
    """A logistic regression from standardised embeddings to cell types, fitted on half of the cells
    of each type.

    states: the intact model's embeddings. Types of fewer than four cells are left out; `left_out`
    counts their cells.
    Raises: MissingExtra without scikit-learn.
    """

    def __init__(
        self, states: Float[Tensor, "cell d_model"], types: Sequence[str], seed: int = 0
    ) -> None:
        counts = Counter(types)
        self.names = sorted(name for name, n in counts.items() if n >= LEAST)
        self.used = torch.tensor([name in self.names for name in types])
        self.labels = np.array([name for name in types if name in self.names])
        self.left_out = int((~self.used).sum())
        self.train = self._halves(seed)
        self._fitted = self._fit(states) if len(self.names) > 1 else None

    @property
    def possible(self) -> bool:
        """Whether there are two types to tell apart."""
        return self._fitted is not None

    @property
    def majority(self) -> float:
        """The accuracy of always naming the commonest type, on the test half."""
        _, counts = np.unique(self.labels[~self.train], return_counts=True)
        return float(counts.max() / counts.sum())

    def frozen(self, states: Float[Tensor, "cell d_model"]) -> ProbeScore:
        """The probe of the intact model on these embeddings of the same cells."""
        return self._score(self._fitted, states)

    def refitted(self, states: Float[Tensor, "cell d_model"]) -> ProbeScore:
        """A probe fitted anew on the training half of these embeddings."""
        return self._score(self._fit(states), states)

    def intact(self, states: Float[Tensor, "cell d_model"]) -> IntactProbe:
        """Its score on the embeddings it was made for, with what that is to be held against."""
        score = self.frozen(states)
        types, left_out = len(self.names), self.left_out
        return IntactProbe(score.accuracy, score.macro_f1, self.majority, types, left_out)

    def _halves(self, seed: int) -> np.ndarray:
        """True for the training half, drawn within each type."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.labels), generator=generator).numpy()
        train = np.zeros(len(self.labels), dtype=bool)
        for name in self.names:
            train[order[self.labels[order] == name][::2]] = True
        return train

    def _fit(self, states: Tensor) -> Any:
        linear, pipeline, scaling = needs(
            "a probe of cell types",
            "sklearn.linear_model",
            "sklearn.pipeline",
            "sklearn.preprocessing",
        )
        regression = linear.LogisticRegression(C=0.1, max_iter=5000)
        model = pipeline.make_pipeline(scaling.StandardScaler(), regression)
        return model.fit(self._half(states, self.train), self.labels[self.train])

    def _score(self, fitted: Any, states: Tensor) -> ProbeScore:
        from sklearn.metrics import accuracy_score, f1_score

        truth = self.labels[~self.train]
        said = fitted.predict(self._half(states, ~self.train))
        macro = f1_score(truth, said, average="macro", labels=self.names, zero_division=0)
        return ProbeScore(float(accuracy_score(truth, said)), float(macro))

    def _half(self, states: Tensor, half: np.ndarray) -> Any:
        return states.detach().cpu().double()[self.used].numpy()[half]
