"""What distillation trains, and where training stands.

How this works. A `Part` is what is trained of one matrix: the allowed entries themselves, or the
two factors of a change of low rank. A `Run` holds the parts with their optimizer, the step, the
looks taken so far and the values of the best of them. At each look all of that is written to the
checkpoint, with a key of everything the run depends on; a run that finds its own checkpoint goes
on from there and ends with the same bytes as if it had never stopped. A sparse change narrows as
training goes: all entries may change at first, fewer by a constant factor at each step, until the
k that matter most are left.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from math import cos, inf, pi
from pathlib import Path
from typing import Any

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
from ..result import record
from .config import DistilConfig
from .target import Change, Changes, Target

# A look is as good as the best if its loss is so much above it at most. The later one is kept: it
# has seen more, and at a lower rate.
TIE = 0.02
NARROWED = 0.6  # share of the steps after which a sparse change is down to its k entries
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what AdamW keeps of a tensor


@record
class Look:
    """One look at held-out text: the loss, the NLL in nats per token, and the share of the damage
    recovered there, None where the injury does none.
    """

    step: int
    loss: float
    nll: float
    recovered: float | None


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
        self.trained = self._factors(start, seed) if rank else self._entries(start)
        for tensor in self.trained:
            tensor.requires_grad_(True)

    def _entries(self, start: Change | None) -> list[Tensor]:
        matrix = self.matrix if start is None else start.matrix
        return [matrix[self.rows, self.cols].to(self.before)]

    def _factors(self, start: Change | None, seed: int) -> list[Tensor]:
        """(rows, rank) and (rank, columns), those of `start` or with a product of 0."""
        rows, cols = self.target.rows, self.target.cols
        if start is None or start.factors is None:
            generator = torch.Generator().manual_seed(seed)
            noise = torch.randn(self.rank, len(cols), generator=generator)
            return [self.before.new_zeros(len(rows), self.rank), noise.to(self.before)]
        left, right = (factor.to(self.before) for factor in start.factors)
        left, right = left[rows], right[:, cols]
        # one step of the optimizer then changes the product by about as much as one of a single
        # entry
        size = right.pow(2).mean(1, keepdim=True).sqrt().clamp_min(1e-12)
        return [left * size.T, right / size]

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
        assert self.parameter.grad is not None
        grad = self.parameter.grad.flatten()[self.positions].to(self.before)
        with torch.enable_grad():
            self.values().backward(grad)  # type: ignore[no-untyped-call]

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
        self.trained = [tensor for part in parts for tensor in part.trained]
        groups = [
            {"params": part.trained, "lr": config.lr or config.relative_lr * part.scale}
            for part in parts
        ]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay)
        self.peaks = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.step, self.looked, self.since, self.best_step = 0, -1, 0, 0
        self.best_loss: float | None = None
        self.best = self._copies()
        self.curve: list[Look] = []
        if checkpoint is not None and checkpoint.exists():
            self._read(checkpoint)

    @property
    def due(self) -> bool:
        """Whether the held-out slice is to be looked at now."""
        ends = self.step == self.config.steps
        return self.looked < self.step and (ends or self.step % self.config.every == 0)

    @property
    def over(self) -> bool:
        return self.step >= self.config.steps or 0 < self.config.patience <= self.since

    def look(self, loss: float, nll: float, recovered: float | None) -> None:
        """Note the held-out loss of the model as it stands, and save."""
        self.looked = self.step
        self.curve.append(Look(self.step, loss, nll, recovered))
        # while a sparse change is still narrowed down, no step is one to keep
        if self._allowed() <= self._wanted():
            self._consider(loss)
        if self.checkpoint is not None:
            self._write(self.checkpoint)

    def _consider(self, loss: float) -> None:
        """Keep the step if it is as good as the best so far; without patience, always."""
        always, least = not self.config.patience, inf if self.best_loss is None else self.best_loss
        if always or loss <= (1 + TIE) * least:
            self.best_step, self.best = self.step, self._copies()
        self.since = 0 if always or loss < least else self.since + 1
        self.best_loss = min(loss, least)

    def _copies(self) -> list[Tensor]:
        return [tensor.detach().clone() for tensor in self.trained]

    def says(self) -> str:
        look = self.curve[-1]
        share = "" if look.recovered is None else f", recovered {look.recovered:.3f}"
        return f"distil: loss {look.loss:.4f}, NLL {look.nll:.4f}{share}"

    def advance(self) -> None:
        """One step of the optimizer, along the gradients that lie on the model's weights."""
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * self._rate()
        for part in self.parts:
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
        weight = torch.cat([self._importance(part) for part in self.parts])
        drop = torch.ones_like(weight, dtype=torch.bool)
        drop[weight.topk(self._allowed()).indices] = False
        drops = torch.split(drop, [len(part.before) for part in self.parts])
        for part, dropped in zip(self.parts, drops, strict=True):
            part.trained[0][dropped] = part.before[dropped]

    def _importance(self, part: Part) -> Tensor:
        gradient: Tensor = self.optimizer.state[part.trained[0]]["exp_avg_sq"].sqrt()
        return (part.values() - part.before).abs() * gradient

    # -- the checkpoint ------------------------------------------------------------------------

    def _state(self) -> dict[str, Any]:
        names = ("step", "looked", "since", "best_step", "best_loss", "key")
        curve = [vars(look) for look in self.curve]
        return {name: getattr(self, name) for name in names} | {"curve": curve}

    def _write(self, path: Path) -> None:
        tensors: dict[str, Tensor] = {}
        for i, tensor in enumerate(self.trained):
            state = self.optimizer.state.get(tensor, {})
            tensors |= {f"{i}.value": tensor.detach().cpu(), f"{i}.best": self.best[i].cpu()}
            tensors |= {f"{i}.{name}": state[name].cpu() for name in MOMENTS if name in state}
        raw = safetensors.torch.save(tensors, {"surgeon": json.dumps(self._state())})
        files.write_bytes(path, raw)

    def _read(self, path: Path) -> None:
        try:
            with safe_open(path, "pt") as file:
                state = json.loads(file.metadata()["surgeon"])
                names = file.keys()
                tensors = {name: file.get_tensor(name) for name in names}
            if state["key"] != self.key:
                raise BadInput(
                    f"{path} is the checkpoint of another repair; give the settings it was begun"
                    " with, or another file."
                )
            state["curve"] = [Look(**look) for look in state["curve"]]
            for i, tensor in enumerate(self.trained):
                tensor.data.copy_(tensors[f"{i}.value"])
                self.best[i].copy_(tensors[f"{i}.best"])
                if f"{i}.step" in tensors:
                    moments = {name: tensors[f"{i}.{name}"].to(tensor.device) for name in MOMENTS}
                    # the count of steps stays on the CPU, where AdamW has it
                    self.optimizer.state[tensor] = {**moments, "step": tensors[f"{i}.step"]}
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
