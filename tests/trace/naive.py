"""A causal trace written out: one plain forward pass a site and sample, with hooks and module names
of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# where the layers are, and the modules whose output an MLP and an attention add to the residual
# stream
PARTS = {
    "gpt2": ("transformer.h", "mlp", "attn"),
    "gptj": ("transformer.h", "mlp", "attn"),
    "falcon": ("transformer.h", "mlp", "self_attention"),
    # its blocks add the residual stream themselves
    "bloom": ("transformer.h", "mlp.dense_4h_to_h", "self_attention.dense"),
    "gpt_neox": ("gpt_neox.layers", "mlp", "attention"),
    "opt": ("model.decoder.layers", "fc2", "self_attn"),
    **dict.fromkeys(
        (
            "llama",
            "mistral",
            "qwen2",
            "qwen3",
            "gemma2",
            "gemma3_text",
            "phi",
            "phi3",
            "olmo",
            "olmo2",
            "mixtral",
            "olmoe",
            "qwen3_moe",
            "gpt_oss",
            "patient",
        ),
        ("model.layers", "mlp", "self_attn"),
    ),
}
Change = Callable[[Tensor], Tensor | None]


def parts(model: nn.Module, model_type: str) -> dict[str, list[nn.Module]]:
    path, mlp, attn = PARTS[model_type]
    layers = list(model.get_submodule(path))
    return {
        "state": layers,
        "mlp": [x.get_submodule(mlp) for x in layers],
        "attn": [x.get_submodule(attn) for x in layers],
    }


@torch.no_grad()
def run(model: nn.Module, ids: Tensor, changes: list[tuple[nn.Module, Change]]) -> Tensor:
    """Last logits (d_vocab,) of one row, each module's output, as (pos, channels), passed through
    its function in turn.
    """
    handles = []
    for module, change in changes:

        def hook(_: nn.Module, args: Any, output: Any, change: Change = change) -> Any:
            value = output[0] if isinstance(output, tuple) else output
            new = change(value.clone().view(ids.shape[1], -1))
            if new is None:
                return None
            new = new.view_as(value)
            return (new, *output[1:]) if isinstance(output, tuple) else new

        handles.append(module.register_forward_hook(hook))
    try:
        return model(input_ids=ids, use_cache=False).logits[0, -1]
    finally:
        for handle in handles:
            handle.remove()


class Naive:
    """noise (sample, subject token, channel) is added to the embeddings from position `start`
    on.
    """

    def __init__(
        self, model: nn.Module, model_type: str, ids: list[int], start: int, noise: Tensor
    ) -> None:
        self.model, self.ids, self.start, self.noise = model, torch.tensor([ids]), start, noise
        self.parts = parts(model, model_type)
        self.n_layers = len(self.parts["state"])
        self.clean: dict[tuple[str, int], Tensor] = {}
        self.clean_logits = run(model, self.ids, self._keeping(self.clean))
        self.corrupt: list[dict[tuple[str, int], Tensor]] = []
        self.corrupt_logits = []
        for sample in range(len(noise)):
            self.corrupt.append({})
            self.corrupt_logits.append(
                run(model, self.ids, [self._noisy(sample), *self._keeping(self.corrupt[-1])])
            )

    def restored(
        self,
        kind: str,
        layers: range,
        position: int,
        sample: int,
        sever: tuple[str, range] | None = None,
    ) -> Tensor:
        """Last logits of one corrupted run with `kind` of these layers as in the clean run, at one
        position.
        """
        changes = [self._noisy(sample), *(self._put(kind, i, position, self.clean) for i in layers)]
        if sever is not None:
            changes += [self._put(sever[0], i, position, self.corrupt[sample]) for i in sever[1]]
        return run(self.model, self.ids, changes)

    def _noisy(self, sample: int) -> tuple[nn.Module, Change]:
        def change(y: Tensor) -> Tensor:
            y[self.start : self.start + self.noise.shape[1]] += self.noise[sample].to(y.dtype)
            return y

        return self.model.get_input_embeddings(), change

    def _keeping(self, into: dict[tuple[str, int], Tensor]) -> list[tuple[nn.Module, Change]]:
        def keeper(key: tuple[str, int]) -> Change:
            return lambda y: into.__setitem__(key, y)

        return [
            (module, keeper((kind, i)))
            for kind, modules in self.parts.items()
            for i, module in enumerate(modules)
        ]

    def _put(
        self, kind: str, layer: int, position: int, source: dict[tuple[str, int], Tensor]
    ) -> tuple[nn.Module, Change]:
        def change(y: Tensor) -> Tensor:
            y[position] = source[kind, layer][position]
            return y

        return self.parts[kind][layer], change
