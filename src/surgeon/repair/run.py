"""What distillation trains, and where training stands: the optimizer, the best step so far, the
checkpoint.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from math import cos, pi
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .. import files
from ..anatomy import Anatomy, digest
from ..errors import BadInput
from ..patch import Patch
from ..patch.deltas import wide
from .target import Change, Changes, Target

if TYPE_CHECKING:
    from .distil import DistilConfig

# A look is as good as the best if its loss is so much above it at most. The later one is kept: it
# has seen more, and at a lower rate.
TIE = 0.02
NARROWED = 0.6  # share of the steps after which a sparse change is down to its k entries


class Part:
    """The trainable values of one target."""

    def __init__(
        self,
        anatomy: Anatomy,
        target: Target,
        matrix: Tensor,
        start: Change | None,
        rank: int,
        scale: float,
        seed: int,
    ) -> None:
        self.target, self.matrix, self.scale, self.rank = target, matrix, scale, rank
        self.view = anatomy.view(target.site)
        self.rows, self.cols = (i.to(matrix.device) for i in target.mask.nonzero(as_tuple=True))
        self.positions = self.view.positions(self.rows, self.cols)
        self.parameter = anatomy.model.get_parameter(anatomy.addresses[target.site].parameter)
        self.before = matrix[self.rows, self.cols].to(wide(matrix.dtype))
        if not rank:
            self.trained = [
                (matrix if start is None else start.matrix)[self.rows, self.cols].to(self.before)
            ]
        elif start is not None and start.factors is not None:
            left, right = (f.to(self.before) for f in start.factors)
            left, right = left[target.rows], right[:, target.cols]
            # one step of the optimizer then changes the product by about as much as one of a single
            # entry
            size = right.pow(2).mean(1, keepdim=True).sqrt().clamp_min(1e-12)
            self.trained = [left * size.T, right / size]
        else:
            noise = torch.randn(
                rank, len(target.cols), generator=torch.Generator().manual_seed(seed)
            )
            self.trained = [self.before.new_zeros(len(target.rows), rank), noise.to(self.before)]
        for tensor in self.trained:
            tensor.requires_grad_(True)

    def values(self) -> Float[Tensor, " n"]:
        if self.rank:
            return self.before + (self.trained[0] @ self.trained[1]).flatten()
        return self.trained[0]

    @torch.no_grad()
    def write_(self) -> None:
        self.view.set_(self.rows, self.cols, self.values())

    def take_gradient(self) -> None:
        """Hand the gradient of the stored tensor on to what is trained.

        Rounding to its dtype is passed straight through.
        """
        grad = self.parameter.grad
        assert grad is not None
        with torch.enable_grad():
            self.values().backward(grad.flatten()[self.positions].to(self.before))  # type: ignore[no-untyped-call]

    def shrink_(self, by: float) -> None:
        """Take every change `by` towards 0, and no further: the proximal step of an L1 penalty."""
        change = self.trained[0] - self.before
        self.trained[0].copy_(self.before + change.sign() * (change.abs() - by).clamp_min(0))

    @torch.no_grad()
    def change(self) -> Change:
        if not self.rank:
            matrix = self.matrix.clone()
            matrix[self.rows, self.cols] = self.trained[0].to(matrix.dtype)
            return Change(matrix)
        left = self.before.new_zeros(self.matrix.shape[0], self.trained[0].shape[1])
        right = self.before.new_zeros(self.trained[1].shape[0], self.matrix.shape[1])
        left[self.target.rows], right[:, self.target.cols] = self.trained
        return Change.low_rank(self.target.site, self.matrix, left.cpu(), right.cpu())


class Run:
    """Where training stands."""

    def __init__(
        self, parts: Sequence[Part], config: DistilConfig, key: str, checkpoint: Path | None
    ) -> None:
        self.parts, self.config, self.key, self.checkpoint = parts, config, key, checkpoint
        self.trained = [t for part in parts for t in part.trained]
        self.optimizer = torch.optim.AdamW(
            [{"params": p.trained, "lr": config.lr or config.relative_lr * p.scale} for p in parts],
            weight_decay=config.weight_decay,
        )
        self.peaks = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.step, self.looked, self.since, self.best_step = 0, -1, 0, 0
        self.best_loss: float | None = None
        self.best = [t.detach().clone() for t in self.trained]
        self.curve: list[list[float | None]] = []
        if checkpoint is not None and checkpoint.exists():
            self._read(checkpoint)

    @property
    def due(self) -> bool:
        """Whether the held-out slice is to be looked at now."""
        return self.looked < self.step and (
            self.step % self.config.every == 0 or self.step == self.config.steps
        )

    @property
    def over(self) -> bool:
        return self.step >= self.config.steps or 0 < self.config.patience <= self.since

    def look(self, loss: float, nll: float, recovered: float | None) -> None:
        """Note the held-out loss of the model as it stands, and save."""
        self.looked = self.step
        self.curve.append([float(self.step), loss, nll, recovered])
        if (
            self._allowed() <= self._wanted()
        ):  # while a sparse change is still narrowed down, no step is one to keep
            least = self.best_loss if self.best_loss is not None else float("inf")
            if loss <= (1 + TIE) * least or not self.config.patience:
                self.best_step, self.best = self.step, [t.detach().clone() for t in self.trained]
            self.since = 0 if loss < least or not self.config.patience else self.since + 1
            self.best_loss = min(loss, least)
        if self.checkpoint is not None:
            self._write(self.checkpoint)

    def says(self) -> str:
        _, loss, nll, recovered = self.curve[-1]
        return f"distil: loss {loss:.4f}, NLL {nll:.4f}" + (
            "" if recovered is None else f", recovered {recovered:.3f}"
        )

    def advance(self) -> None:
        """One step of the optimizer, along the gradients that lie on the model's weights."""
        for group, peak, part in zip(
            self.optimizer.param_groups, self.peaks, self.parts, strict=True
        ):
            group["lr"] = peak * self._rate()
            part.take_gradient()
        for part in self.parts:  # only now: experts share a parameter
            part.parameter.grad = None
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        with torch.no_grad():
            if self.config.l1:
                for group, part in zip(self.optimizer.param_groups, self.parts, strict=True):
                    part.shrink_(self.config.l1 * group["lr"])
            if self.config.sparse_k:
                self._drop()

    def _rate(self) -> float:
        """The learning rate of this step as a share of its peak."""
        left, config = 1 - self.step / self.config.steps, self.config
        if config.schedule == "cosine":
            return 0.5 * (1 - cos(pi * left))
        return min(1.0, left / config.cooldown) if config.cooldown else 1.0

    def kept(self) -> Sequence[Part]:
        """The parts, with the values of the best step."""
        for tensor, best in zip(self.trained, self.best, strict=True):
            tensor.data.copy_(best)
        return self.parts

    def _wanted(self) -> int:
        n = sum(len(part.before) for part in self.parts)
        return min(self.config.sparse_k, n) or n

    def _allowed(self) -> int:
        """How many entries may change after this step: all at first, fewer by a constant factor a
        step, k in the end.
        """
        n = sum(len(part.before) for part in self.parts)
        done = min(1.0, self.step / max(1.0, NARROWED * self.config.steps))
        return int(n * (self._wanted() / n) ** done + 0.5)

    def _drop(self) -> None:
        """Take back all but the allowed changes: those that matter least, |change| times the RMS
        gradient (Le Cun et al. 1990).

        So weighed, a neuron that is rescaled, and its weights with it, keeps its place.
        """
        weight = torch.cat(
            [
                (p.values() - p.before).abs()
                * self.optimizer.state[p.trained[0]]["exp_avg_sq"].sqrt()
                for p in self.parts
            ]
        )
        drop = torch.ones_like(weight, dtype=torch.bool)
        drop[weight.topk(self._allowed()).indices] = False
        for part, off in zip(
            self.parts, torch.split(drop, [len(p.before) for p in self.parts]), strict=True
        ):
            part.trained[0][off] = part.before[off]

    # -- the checkpoint ------------------------------------------------------------------------

    def _state(self) -> dict[str, Any]:
        names = ("step", "looked", "since", "best_step", "best_loss", "curve", "key")
        return {name: getattr(self, name) for name in names}

    def _write(self, path: Path) -> None:
        tensors: dict[str, Tensor] = {}
        for i, tensor in enumerate(self.trained):
            state = self.optimizer.state.get(tensor, {})
            tensors |= {f"{i}.value": tensor.detach().cpu(), f"{i}.best": self.best[i].cpu()}
            tensors |= {
                f"{i}.{name}": state[name].cpu()
                for name in ("step", "exp_avg", "exp_avg_sq")
                if name in state
            }
        raw = safetensors.torch.save(tensors, {"surgeon": json.dumps(self._state())})
        files.write_bytes(path, raw)

    def _read(self, path: Path) -> None:
        try:
            with safe_open(path, "pt") as file:
                state = json.loads(file.metadata()["surgeon"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if state["key"] != self.key:
                raise BadInput(
                    f"{path} is the checkpoint of another repair; give the settings it was begun"
                    " with, or another file."
                )
            for i, tensor in enumerate(self.trained):
                tensor.data.copy_(tensors[f"{i}.value"])
                self.best[i].copy_(tensors[f"{i}.best"])
                if f"{i}.step" in tensors:
                    names = ("exp_avg", "exp_avg_sq")
                    moments = {name: tensors[f"{i}.{name}"].to(tensor.device) for name in names}
                    self.optimizer.state[tensor] = {"step": tensors[f"{i}.step"], **moments}
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise BadInput(
                f"{path} is damaged or is no checkpoint of a repair; delete it to begin anew."
            ) from error
        for name, value in state.items():
            setattr(self, name, value)


def key_of(
    injury: Patch,
    targets: Sequence[Target],
    windows: Sequence[Tensor],
    start: Changes | None,
    settings: Any,
) -> str:
    """A name for a run: two with the same key end with the same bytes."""
    total = hashlib.sha256(json.dumps([injury.digest, settings], sort_keys=True).encode())
    for tensor in (*windows, *(t.mask for t in targets)):
        total.update(f"{tuple(tensor.shape)}:".encode() + tensor.numpy().tobytes())
    for site, change in (start or {}).items():
        total.update(f"{site}:{digest(change.matrix)}".encode())
    return total.hexdigest()
