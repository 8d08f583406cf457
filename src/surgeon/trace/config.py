"""Settings of a causal trace."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, isfinite

from ..errors import BadInput
from ..settings import setting

KINDS = ("state", "mlp", "attn")
SEVERED = "severed"  # the state, with what `sever` names kept corrupted above it
TRACED = (*KINDS, SEVERED)
METRICS = ("probability", "logit")
PUBLISHED_WINDOW = 10


def kinds_of(text: str) -> tuple[str, ...]:
    """`state,mlp`, each once, in that order."""
    return tuple(dict.fromkeys(kind.strip() for kind in text.split(",") if kind.strip()))


@dataclass(frozen=True)
class TraceConfig:
    """Settings of a trace.

    noise: Gaussian, on the subject's embeddings, in standard deviations of embeddings. replace:
    words in the subject's place instead.
    Source of the defaults: Meng et al. 2022, arXiv:2202.05262, section 2 and appendix B.
    Raises: BadInput for settings that leave nothing to trace.
    """

    noise: float = 3.0
    replace: str | None = None
    samples: int = setting(10, "draws of the noise", low=1)
    window: int | None = setting(
        None,
        "layers whose MLP or attention is restored together, centred at a layer; not given: 10, but"
        " at most a third of the layers",
        low=1,
        metavar="N",
    )
    kinds: tuple[str, ...] = setting(
        KINDS, "what is restored", choices=KINDS, parse=kinds_of, metavar="state,mlp,attn"
    )
    sever: str | None = setting(
        None,
        "also restore states with these kept corrupted above them",
        choices=("mlp", "attn"),
    )
    metric: str = setting(
        "probability",
        "probability of the answer, or logit: its lead over another answer",
        choices=METRICS,
    )
    seed: int = setting(0, "seed of the noise and of the intervals", low=0, high=2**32 - 1)

    def __post_init__(self) -> None:
        if not (self.noise > 0 and isfinite(self.noise)):
            raise BadInput(
                f"noise of {self.noise:g} standard deviations corrupts nothing; use a number above"
                " 0, like 3."
            )
        if self.replace is not None and not self.replace.strip():
            raise BadInput(
                "the words to put in the subject's place are empty; give as many tokens as the"
                " subject has."
            )
        if not self.kinds:
            raise BadInput(f"‹kinds› names nothing to restore; use {', '.join(KINDS)}.")

    def window_of(self, n_layers: int) -> int:
        """The window on a model of this depth.

        Ten layers are a fifth of GPT-2 XL and would be all of a shallow model.

        >>> [TraceConfig().window_of(depth) for depth in (2, 12, 48)]
        [1, 4, 10]
        """
        if self.window is not None:
            return min(self.window, n_layers)
        return min(PUBLISHED_WINDOW, ceil(n_layers / 3))


DEFAULTS = TraceConfig()
