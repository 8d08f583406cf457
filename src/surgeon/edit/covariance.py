"""Second moments of the keys of a layer, streamed over text, and what is solved with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from ..anatomy import Anatomy
from ..errors import BadInput, SurgeonError
from ..measure.likelihood import batches
from ..progress import Tell, silent
from ..tap import Tap, by_position
from .keys import dense_down

TOKENS_PER_DIMENSION = 10
LEDOIT_WOLF = "ledoit-wolf"  # the ridge that the sample itself asks for
CHECKPOINTS = 10  # times that an unfinished pass is kept


@dataclass(frozen=True, eq=False)
class KeyMoments:
    """Sums over `count` keys k of one layer. Shapes: gram (d_mlp, d_mlp) of k k'; half, the same
    over the first half of the keys.

    quartic: sum of |k|^4, for Ledoit-Wolf. half_count: keys in `half`. first_norm, norm: RMS norm
    of the keys at position 0, which are left out of all else, and of the others.
    """

    gram: Float64[Tensor, "d_mlp d_mlp"]
    half: Float64[Tensor, "d_mlp d_mlp"]
    count: int
    half_count: int
    quartic: float
    first_norm: float

    @property
    def d_mlp(self) -> int:
        return self.gram.shape[0]

    @property
    def mean_square(self) -> float:
        """Mean of |k|^2."""
        return float(self.gram.trace()) / self.count

    @property
    def covariance(self) -> Float64[Tensor, "d_mlp d_mlp"]:
        """E[k k'], not centred, as in Meng et al. 2022."""
        return self.gram / self.count

    def shrinkage(self) -> float:
        """The share of mu I that Ledoit & Wolf 2004 mix into the covariance; 0 to 1."""
        c = self.covariance
        mu = float(c.trace()) / self.d_mlp
        spread = float((c - mu * torch.eye(self.d_mlp, dtype=c.dtype)).pow(2).sum())
        noise = (self.quartic / self.count - float(c.pow(2).sum())) / self.count
        return min(1.0, max(0.0, noise / spread)) if spread > 0 else 1.0


@dataclass(frozen=True, eq=False)
class CholeskyFactor:
    """C with its ridge, as a lower Cholesky factor. Shapes: lower (d_mlp, d_mlp), float64."""

    lower: Float64[Tensor, "d_mlp d_mlp"]
    ridge: float

    @classmethod
    def of(
        cls, covariance: Float64[Tensor, "d_mlp d_mlp"], ridge: float, shrink: float = 0.0
    ) -> CholeskyFactor:
        """The factor of (1 - shrink) C + ridge I.

        Raises: SurgeonError if that is not positive definite.
        """
        mixed = (1 - shrink) * covariance
        mixed.diagonal().add_(ridge)
        lower, info = torch.linalg.cholesky_ex(mixed)
        if int(info):
            raise SurgeonError(
                f"the covariance of the keys is not positive definite with a ridge of {ridge:.3g}:"
                " some directions were never seen; use more ‹tokens› or a larger ‹ridge›."
            )
        return cls(lower, ridge)

    def solve(self, keys: Float64[Tensor, "d_mlp n"]) -> Float64[Tensor, "d_mlp n"]:
        """C^-1 keys."""
        return torch.cholesky_solve(keys, self.lower)

    @cached_property
    def condition(self) -> float:
        """Condition number of C with its ridge."""
        values = torch.linalg.svdvals(self.lower)
        return float((values[0] / values[-1]) ** 2)


def factor(moments: KeyMoments, ridge: float | str) -> CholeskyFactor:
    """C with `ridge` times its mean diagonal added, or shrunk as Ledoit & Wolf 2004 have it
    ("ledoit-wolf").
    """
    mean = moments.mean_square / moments.d_mlp
    if ridge == LEDOIT_WOLF:
        share = moments.shrinkage()
        return CholeskyFactor.of(moments.covariance, share * mean, share)
    return CholeskyFactor.of(moments.covariance, float(ridge) * mean)


@torch.no_grad()
def key_moments(
    anatomy: Anatomy,
    windows: Int64[Tensor, "n window"],
    layers: Sequence[int],
    progress: Tell = silent,
    keep: Callable[[int, dict[int, Sums]], None] | None = None,
    start: tuple[int, dict[int, Sums]] | None = None,
) -> dict[int, KeyMoments]:
    """Moments of the keys of `layers` over `windows`, in one pass that ends after the last of them;
    position 0 is left out.

    Products of one batch are taken in float32 (float64 for a float64 model) and summed in float64.
    keep: called now and then with the batches done and the sums so far; start: what it was called
    with, to go on from there.
    Raises: BadInput for a layer without a dense MLP, or fewer than 2 windows.
    """
    if len(windows) < 2:
        raise BadInput(
            "the covariance of the keys needs at least two windows of text; give a longer"
            " ‹covariance_text› or a smaller ‹window›."
        )
    sites = {layer: dense_down(anatomy, layer) for layer in sorted(set(layers))}
    device = next(anatomy.model.parameters()).device
    begin, sums = start or (0, {layer: Sums() for layer in sites})
    parts = batches(windows)
    if len(parts) == 1:  # then there would be no first half to hold the whole against
        parts = list(windows.tensor_split(2))
    for done, ids in enumerate(parts[begin:], begin + 1):
        with Tap() as tap:
            for layer, site in sites.items():
                tap.on_input(anatomy.module(site), partial(sums[layer].take, len(ids)))
            tap.stop_after(anatomy.layers[max(sites)])
            tap.run(anatomy.model, input_ids=ids.to(device), use_cache=False)
        if 2 * done >= len(parts):
            for one in sums.values():
                one.mark_half()
        progress("covariance", done, len(parts))
        if keep and done < len(parts) and done % max(1, len(parts) // CHECKPOINTS) == 0:
            keep(done, sums)
    return {layer: one.moments() for layer, one in sums.items()}


@dataclass(eq=False)
class Sums:
    """The running sums of one layer."""

    gram: Tensor | None = None
    half: Tensor | None = None
    count: int = 0
    half_count: int = 0
    firsts: int = 0
    quartic: float = 0.0
    first_square: float = 0.0

    def take(self, batch: int, x: Tensor) -> None:
        """Add the keys of a batch of windows."""
        x = by_position(x, batch).to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        # position 0 is the attention sink: its key is unlike all others, and would outweigh them
        keys = x[:, 1:].flatten(0, 1)
        product = (keys.T @ keys).to("cpu", torch.float64)
        self.gram = product if self.gram is None else self.gram + product
        self.count += len(keys)
        self.quartic += float(keys.double().pow(2).sum(-1).pow(2).sum())
        self.first_square += float(x[:, 0].double().pow(2).sum())
        self.firsts += len(x)

    def mark_half(self) -> None:
        if self.half is None:
            assert self.gram is not None
            self.half, self.half_count = self.gram.clone(), self.count

    def moments(self) -> KeyMoments:
        assert self.gram is not None
        assert self.half is not None
        return KeyMoments(
            self.gram,
            self.half,
            self.count,
            self.half_count,
            self.quartic,
            (self.first_square / self.firsts) ** 0.5,
        )
