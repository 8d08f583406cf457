"""Adam, written out: a request that is done must stay where it is, and a matrix is written through
its view.
"""

from __future__ import annotations

import torch
from torch import Tensor

# how much of each moment a new gradient is; as in Kingma & Ba 2014, arXiv:1412.6980
MEAN, SQUARE = 0.1, 0.001


class Adam:
    """The moments of one tensor."""

    def __init__(self, like: Tensor, eps: float) -> None:
        self.mean, self.square = torch.zeros_like(like), torch.zeros_like(like)
        self.eps, self.steps = eps, 0

    def stride(self, gradient: Tensor) -> Tensor:
        """The direction to go against, about 1 in size: what the learning rate multiplies."""
        self.steps += 1
        self.mean.lerp_(gradient, MEAN)
        self.square.lerp_(gradient**2, SQUARE)
        mean = self.mean / (1 - (1 - MEAN) ** self.steps)
        square = self.square / (1 - (1 - SQUARE) ** self.steps)
        stride: Tensor = mean / (square.sqrt() + self.eps)
        return stride
