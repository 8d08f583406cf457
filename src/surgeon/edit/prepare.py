"""What all edits of one model share: contexts, the covariance of its keys, and the Cholesky factor
of that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..anatomy import Anatomy
from ..corpus import Corpus, bos_ids
from ..errors import BadInput
from ..patch import applied_patches
from .cache import CovarianceCache
from .contexts import ContextConfig, prefixes, sampled
from .covariance import (
    TOKENS_PER_DIMENSION,
    CholeskyFactor,
    KeyMoments,
    Progress,
    Sums,
    factor,
    key_moments,
)
from .keys import dense_down

WINDOW = 128


@dataclass(frozen=True)
class PrepareConfig:
    """Settings of the covariance and the contexts."""

    tokens: int | None = field(
        default=None,
        metadata={"help": "keys in the covariance, at least; not given: 10 for each of d_mlp"},
    )
    ridge: float | str = field(
        default=0.01,
        metadata={"help": "ridge, as a share of the covariance's mean diagonal; or ledoit-wolf"},
    )
    contexts: ContextConfig = field(default_factory=ContextConfig)
    seed: int = field(default=0, metadata={"help": "seed of what the model writes"})
    bos: str = field(default="auto", metadata={"help": "whether prompts begin with BOS"})

    def __post_init__(self) -> None:
        if self.tokens is not None and self.tokens < 2:
            raise BadInput(
                f"--tokens {self.tokens} is too few for a covariance; the default is"
                f" {TOKENS_PER_DIMENSION} for each of d_mlp."
            )
        known = self.ridge == "ledoit-wolf" if isinstance(self.ridge, str) else self.ridge > 0
        if not known:
            raise BadInput(
                f"--ridge {self.ridge} is not known; give a share of the mean diagonal above 0,"
                " like 0.01, or ledoit-wolf."
            )


class Preparation:
    """Contexts and covariances of one model as it stands, made when they are first asked for, and
    kept.

    corpus: text for the covariance; None: text that the model writes itself. cache: where
    covariances are kept, under `weights`, the fingerprint of the checkpoint.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        tokenizer: PreTrainedTokenizerBase,
        config: PrepareConfig = PrepareConfig(),
        corpus: Corpus | None = None,
        cache: CovarianceCache | None = None,
        weights: str = "",
        progress: Progress | None = None,
    ) -> None:
        self.anatomy, self.tokenizer, self.config, self.corpus = anatomy, tokenizer, config, corpus
        self.cache, self.weights, self.progress = cache, weights, progress
        self._prefixes: list[str] | None = None
        self._moments: dict[int, KeyMoments] = {}
        self._factors: dict[int, CholeskyFactor] = {}

    @property
    def prefixes(self) -> list[str]:
        """The texts that stand before a prompt; the first is none."""
        if self._prefixes is None:
            self._prefixes = prefixes(
                self.anatomy,
                self.tokenizer,
                self.config.contexts,
                self.config.seed,
                self.config.bos,
            )
        return self._prefixes

    def gather(self, layers: Sequence[int]) -> None:
        """Take the covariances of these layers in one pass over the text, or read them from the
        cache.
        """
        missing = []
        for layer in sorted(set(layers) - set(self._moments)):
            found = None if self.cache is None else self.cache.read(self._key([layer]))
            if found is None:
                missing.append(layer)
            else:
                held: dict[str, Any] = {**found[0], **found[1]}
                self._moments[layer] = KeyMoments(**held)
        if not missing:
            return
        windows = self._windows(max(self._wanted(layer) for layer in missing))
        unfinished = {**self._key(missing), "unfinished": True}

        def keep(done: int, sums: dict[int, Sums]) -> None:
            assert self.cache is not None
            held = {layer: vars(one) for layer, one in sums.items()}
            tensors = {
                f"{layer}.{n}": v
                for layer, one in held.items()
                for n, v in one.items()
                if isinstance(v, torch.Tensor)
            }
            numbers = {
                layer: {n: v for n, v in one.items() if isinstance(v, int | float)}
                for layer, one in held.items()
            }
            self.cache.write(unfinished, tensors, {"done": done, "layers": numbers})

        start = None
        found = None if self.cache is None else self.cache.read(unfinished)
        if found is not None:
            tensors, numbers = found
            sums = {layer: Sums(**numbers["layers"][str(layer)]) for layer in missing}
            for name, tensor in tensors.items():
                at, _, part = name.partition(".")
                setattr(sums[int(at)], part, tensor)
            start = numbers["done"], sums
        self._moments |= key_moments(
            self.anatomy,
            windows,
            missing,
            self.progress,
            None if self.cache is None else keep,
            start,
        )
        if self.cache is not None:
            for layer in missing:
                whole = vars(self._moments[layer])
                tensors = {n: v for n, v in whole.items() if isinstance(v, torch.Tensor)}
                self.cache.write(
                    self._key([layer]),
                    tensors,
                    {n: v for n, v in whole.items() if n not in tensors},
                )
            self.cache.drop(unfinished)

    def moments(self, layer: int) -> KeyMoments:
        self.gather([layer])
        return self._moments[layer]

    def factor(self, layer: int) -> CholeskyFactor:
        if layer not in self._factors:
            self._factors[layer] = factor(self.moments(layer), self.config.ridge)
        return self._factors[layer]

    def half_factor(self, layer: int) -> CholeskyFactor:
        """The factor from the first half of the sample, to see whether the sample is large
        enough.
        """
        moments = self.moments(layer)
        return factor(
            replace(
                moments, gram=moments.half, count=moments.half_count, quartic=moments.quartic / 2
            ),
            self.config.ridge,
        )

    def _wanted(self, layer: int) -> int:
        return (
            self.config.tokens
            or TOKENS_PER_DIMENSION * self.anatomy.view(dense_down(self.anatomy, layer)).shape[1]
        )

    def _key(self, layers: Sequence[int]) -> dict[str, Any]:
        """Everything that decides the covariances: weights, tokenizer, text, layers, how many keys,
        dtype.
        """
        tokens = max(self._wanted(layer) for layer in layers)
        if self.corpus is None:
            text: Any = {
                "seed": self.config.seed,
                "bos": bos_ids(self.tokenizer, self.config.bos),
                "special": sorted(self.tokenizer.all_special_ids),
            }
        else:
            text = hashlib.sha256(self._windows(tokens).numpy().tobytes()).hexdigest()
        return {
            "weights": self.weights,
            "patches": [patch.digest for patch in applied_patches(self.anatomy)],
            "text": text,
            "layers": list(layers),
            "tokens": tokens,
            "dtype": str(next(self.anatomy.model.parameters()).dtype),
            "version": 1,
        }

    def _windows(self, tokens: int) -> Int64[Tensor, "n window"]:
        """Whole windows with at least `tokens` positions that are not first, if the text has
        them.
        """
        if self.corpus is not None:
            width = self.corpus.windows.shape[1] - 1
            return self.corpus.windows[: max(2, -(-tokens // width))]
        longest = getattr(self.anatomy.config, "max_position_embeddings", None) or WINDOW
        width = min(WINDOW, longest)
        new = width - max(1, len(bos_ids(self.tokenizer, self.config.bos)))
        return sampled(
            self.anatomy,
            self.tokenizer,
            max(2, -(-tokens // (width - 1))),
            new,
            self.config.seed,
            self.config.bos,
        )
