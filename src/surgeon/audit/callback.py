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
        parsed = [Entry.parse(entry) if isinstance(entry, str) else entry for entry in entries]
        self.entries = list(dict.fromkeys(parsed))
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
        by_site: dict[Site, list[Entry]] = {}
        for entry in self.entries:
            by_site.setdefault(anatomy.resolve(entry.site), []).append(entry)
        self._watches = [_Watch(anatomy, site, entries) for site, entries in by_site.items()]
        adapted = [str(watch.site) for watch in self._watches if watch.adapters()]
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
        # the trainer has noted its logs before it calls; the same numbers belong into its history
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(drift)

    def drift(self) -> dict[str, float]:
        """The ratios now, by the name they are logged under; empty before training has begun."""
        ratios = {name: r for watch in self._watches for name, r in watch.ratios().items()}
        if len(ratios) <= self.listed:
            return ratios
        before = sum(float(watch.original.abs().sum()) for watch in self._watches)
        left = sum(watch.left() for watch in self._watches)
        furthest = max(ratios.values(), key=lambda ratio: abs(ratio - 1))
        return {f"{PREFIX}/furthest": furthest, f"{PREFIX}/sum": left / before}


class _Watch:
    """The entries of one site in a model in training, and what they were."""

    def __init__(self, anatomy: Anatomy, site: Site, entries: list[Entry]) -> None:
        self.site, self.entries = site, entries
        self.module = anatomy.module(site)
        self.view = anatomy.view(site)
        n_out, n_in = self.view.shape
        outside = [entry for entry in entries if entry.row >= n_out or entry.col >= n_in]
        if outside:
            raise BadInput(
                f"{outside[0]} does not exist: {site} has shape (out {n_out}, in {n_in}), counted"
                " from 0."
            )
        self.rows = torch.tensor([entry.row for entry in entries])
        self.cols = torch.tensor([entry.col for entry in entries])
        # in the stored dtype: putting them back rounds nothing
        self.bits = self.view.get(self.rows, self.cols).clone()
        self.original = self.now()
        zero = self.original.eq(0).nonzero().flatten().tolist()
        if zero:
            raise BadInput(
                f"{entries[zero[0]]} is zero, so its drift has no ratio; name entries that hold"
                " something."
            )

    def now(self) -> Tensor:
        """The entries (n,) as they act: with what adapters add."""
        # in float64, so that a ratio is rounded no further
        values = self.view.get(self.rows, self.cols).double().cpu()
        for adapter in self.adapters():
            delta = self.module.get_delta_weight(adapter).detach()  # type: ignore[operator]
            added = self.view.packing.oriented(delta)[self.rows, self.cols]
            values = values + added.double().cpu()
        return values

    def adapters(self) -> list[str]:
        """The LoRA adapters that act on the module and are not merged into its weight."""
        module: Any = self.module
        if not hasattr(module, "get_delta_weight") or getattr(module, "merged", False):
            return []
        return [name for name in module.active_adapters if name in module.lora_A]

    def ratios(self) -> dict[str, float]:
        names = [f"{PREFIX}/{entry}" for entry in self.entries]
        return dict(zip(names, (self.now() / self.original).tolist(), strict=True))

    def left(self) -> float:
        """What is left of the sum of |w|; what changed its sign counts against it."""
        return float((self.now() * self.original.sign()).sum())

    def restore_(self) -> None:
        with torch.no_grad():
            self.view.set_(self.rows, self.cols, self.bits)


def _plain(model: nn.Module) -> nn.Module:
    """The model inside what wraps it for distributed training or for PEFT."""
    while isinstance(inner := getattr(model, "module", None), nn.Module):
        model = inner
    base = getattr(model, "get_base_model", None)
    plain: nn.Module = base() if callable(base) else model
    return plain
