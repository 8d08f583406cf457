"""A callback for transformers' Trainer: the drift of the critical entries in its logs, and, if
wanted, no drift at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_callback import TrainerCallback

from ..anatomy import Anatomy, Entry, Site
from ..errors import BadInput

PREFIX = "critical"


class CriticalWeights(TrainerCallback):  # type: ignore[misc]
    """Logs `critical/<entry>`, the ratio of each entry to what it was when training began, wherever
    the trainer logs.

        trainer = Trainer(..., callbacks=[CriticalWeights(["L0.mlp.down[24, 177]"], freeze=True)])

    entries: addresses or `Entry`s; of more than `listed` only the ratio furthest from 1 is logged,
    and what is left of their sum. freeze: after each step of the optimizer the entries get their
    exact bits back; nothing else of the matrix is held. Of a matrix with LoRA on it the sum of base
    and adapter is watched, which cannot be frozen.
    """

    def __init__(
        self, entries: Sequence[Entry | str], freeze: bool = False, listed: int = 8
    ) -> None:
        """Raises: BadInput if there are no entries, or one has not the form of an address."""
        self.entries = list(
            dict.fromkeys(Entry.parse(e) if isinstance(e, str) else e for e in entries)
        )
        if not self.entries:
            raise BadInput(
                "no critical entries were given; name at least one, like L0.mlp.down[24, 177]."
            )
        self.freeze, self.listed = freeze, listed
        self._watches: list[_Watch] = []

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        if model is None:
            raise BadInput(
                "the trainer gave the callback no model; use it with transformers' Trainer."
            )
        anatomy = Anatomy.of(_plain(model))
        sites = dict.fromkeys(anatomy.resolve(e.site) for e in self.entries)
        self._watches = [
            _Watch(anatomy, site, [e for e in self.entries if e.site == site]) for site in sites
        ]
        adapted = [str(w.site) for w in self._watches if w.adapters()]
        if self.freeze and adapted:
            raise BadInput(
                f"{', '.join(adapted)} is trained through an adapter, which moves all of its"
                " entries together; do not freeze it."
            )

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.freeze:
            for watch in self._watches:
                watch.restore_()

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        drift = self.drift()
        if logs is not None:
            logs.update(drift)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(drift)

    def drift(self) -> dict[str, float]:
        """The ratios now, by the name they are logged under; empty before training has begun."""
        ratios: dict[str, float] = {}
        for watch in self._watches:
            ratios |= watch.ratios()
        if len(ratios) <= self.listed:
            return ratios
        before = sum(float(w.original.abs().sum()) for w in self._watches)
        left = sum(float((w.now() * w.original.sign()).sum()) for w in self._watches)
        return {
            f"{PREFIX}/furthest": max(ratios.values(), key=lambda r: abs(r - 1)),
            f"{PREFIX}/sum": left / before,
        }


class _Watch:
    """The entries of one site in a model in training, and what they were."""

    def __init__(self, anatomy: Anatomy, site: Site, entries: list[Entry]) -> None:
        self.site, self.entries = site, entries
        self.module = anatomy.module(site)
        self.view = anatomy.view(site)
        n_out, n_in = self.view.shape
        if wrong := [e for e in entries if e.row >= n_out or e.col >= n_in]:
            raise BadInput(
                f"{wrong[0]} does not exist: {site} has shape (out {n_out}, in {n_in}), counted"
                " from 0."
            )
        self.rows, self.cols = (
            torch.tensor([e.row for e in entries]),
            torch.tensor([e.col for e in entries]),
        )
        self.bits = self.view.get(self.rows, self.cols).clone()
        self.original = self.now()
        if zero := [e for e, w in zip(entries, self.original.tolist(), strict=True) if w == 0]:
            raise BadInput(
                f"{zero[0]} is zero, so its drift has no ratio; name entries that hold something."
            )

    def now(self) -> Tensor:
        """The entries (n,) as they act: with what adapters add."""
        values = self.view.get(self.rows, self.cols).double().cpu()
        for adapter in self.adapters():
            delta = self.module.get_delta_weight(adapter).detach()  # type: ignore[operator]
            values = values + self.view.packing.oriented(delta)[self.rows, self.cols].double().cpu()
        return values

    def adapters(self) -> list[str]:
        """The LoRA adapters that act on the module and are not merged into its weight."""
        if not hasattr(self.module, "get_delta_weight") or getattr(self.module, "merged", False):
            return []
        return [a for a in self.module.active_adapters if a in self.module.lora_A]  # type: ignore[union-attr, operator]

    def ratios(self) -> dict[str, float]:
        return {
            f"{PREFIX}/{e}": r
            for e, r in zip(self.entries, (self.now() / self.original).tolist(), strict=True)
        }

    def restore_(self) -> None:
        with torch.no_grad():
            self.view.set_(self.rows, self.cols, self.bits)


def _plain(model: nn.Module) -> nn.Module:
    """The model inside what wraps it for distributed training or for PEFT."""
    while isinstance(inner := getattr(model, "module", None), nn.Module):
        model = inner
    base = getattr(model, "get_base_model", None)
    found: nn.Module = base() if callable(base) else model
    return found
