"""What all edits of one model share: contexts, the covariance of its keys, and the Cholesky factor
of that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import transformers
from jaxtyping import Int64
from torch import Tensor

from ..anatomy import Anatomy
from ..corpus import Corpus, bos_ids
from ..errors import BadInput
from ..patch import applied_patches
from ..progress import Tell, silent
from ..settings import nested, setting
from .cache import CovarianceCache
from .contexts import ContextConfig, prefixes, sampled
from .covariance import (
    LEDOIT_WOLF,
    TOKENS_PER_DIMENSION,
    CholeskyFactor,
    KeyMoments,
    Sums,
    factor,
    key_moments,
)
from .keys import dense_down

WINDOW = 128


def ridge_of(text: str) -> float | str:
    """A ridge as it is written: a number, or the name of a rule."""
    try:
        return float(text)
    except ValueError:
        return text


@dataclass(frozen=True)
class PrepareConfig:
    """Settings of the contexts and the covariance. bos: whether prompts begin with BOS."""

    contexts: ContextConfig = nested(ContextConfig)
    tokens: int | None = setting(
        None,
        f"keys in the covariance, at least; not given: {TOKENS_PER_DIMENSION} for each of d_mlp",
        low=2,
        group="Covariance",
    )
    ridge: float | str = setting(
        0.01,
        "ridge, as a share of the covariance's mean diagonal; or ledoit-wolf",
        parse=ridge_of,
        metavar="F",
        group="Covariance",
    )
    seed: int = setting(
        0, "seed of what the model writes and of the intervals", low=0, high=2**32 - 1
    )
    bos: str = "auto"

    def __post_init__(self) -> None:
        known = self.ridge == LEDOIT_WOLF if isinstance(self.ridge, str) else self.ridge > 0
        if not known:
            raise BadInput(
                f"‹ridge› {self.ridge} is not known; give a share of the mean diagonal above 0,"
                f" like 0.01, or {LEDOIT_WOLF}."
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
        tokenizer: transformers.PreTrainedTokenizerBase,
        config: PrepareConfig = PrepareConfig(),
        corpus: Corpus | None = None,
        cache: CovarianceCache | None = None,
        weights: str = "",
        progress: Tell = silent,
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
        missing = [layer for layer in sorted(set(layers)) if not self._known(layer)]
        if not missing:
            return
        windows = self._windows(max(self._wanted(layer) for layer in missing))
        unfinished = {**self._key(missing), "unfinished": True}
        self._moments |= key_moments(
            self.anatomy,
            windows,
            missing,
            self.progress,
            None if self.cache is None else partial(_keep, self.cache, unfinished),
            None if self.cache is None else _kept(self.cache, unfinished),
        )
        if self.cache is None:
            return
        for layer in missing:
            tensors, numbers = _parts(self._moments[layer])
            self.cache.write(self._key([layer]), tensors, numbers)
        self.cache.drop(unfinished)

    def _known(self, layer: int) -> bool:
        """Whether the moments of a layer are here now, from the cache if it has them."""
        if layer not in self._moments and self.cache is not None:
            cached = self.cache.read(self._key([layer]))
            if cached is not None:
                parts: dict[str, Any] = {**cached[0], **cached[1]}
                self._moments[layer] = KeyMoments(**parts)
        return layer in self._moments

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
            width = self.corpus.windows.shape[1] - 1  # the covariance leaves position 0 out
            return self.corpus.windows[: max(2, -(-tokens // width))]
        longest = getattr(self.anatomy.config, "max_position_embeddings", None) or WINDOW
        width = min(WINDOW, longest)
        # without BOS a text begins with a token of STARTS
        new = width - max(1, len(bos_ids(self.tokenizer, self.config.bos)))
        return sampled(
            self.anatomy,
            self.tokenizer,
            max(2, -(-tokens // (width - 1))),
            new,
            self.config.seed,
            self.config.bos,
        )


# -- a pass that was cut --------------------------------------------------------------------------


def _keep(
    cache: CovarianceCache, key: Mapping[str, Any], done: int, sums: Mapping[int, Sums]
) -> None:
    """Keep the sums of an unfinished pass."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[int, dict[str, int | float]] = {}
    for layer, one in sums.items():
        own, numbers[layer] = _parts(one)
        tensors |= {f"{layer}.{name}": tensor for name, tensor in own.items()}
    cache.write(key, tensors, {"done": done, "layers": numbers})


def _kept(cache: CovarianceCache, key: Mapping[str, Any]) -> tuple[int, dict[int, Sums]] | None:
    """The batches done and the sums of an unfinished pass, if one was kept."""
    cached = cache.read(key)
    if cached is None:
        return None
    tensors, numbers = cached
    sums = {int(layer): Sums(**own) for layer, own in numbers["layers"].items()}
    for name, tensor in tensors.items():
        layer, _, part = name.partition(".")
        setattr(sums[int(layer)], part, tensor)
    return numbers["done"], sums


def _parts(one: KeyMoments | Sums) -> tuple[dict[str, Tensor], dict[str, int | float]]:
    """The tensors and the numbers of which it is made."""
    values = vars(one)
    tensors = {name: v for name, v in values.items() if isinstance(v, Tensor)}
    numbers = {name: v for name, v in values.items() if isinstance(v, int | float)}
    return tensors, numbers
