"""Settings of a causal trace."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil, isfinite

from ..errors import BadInput

KINDS = ("state", "mlp", "attn")
METRICS = ("probability", "logit")
PUBLISHED_WINDOW = 10


@dataclass(frozen=True)
class TraceConfig:
    """Settings of a trace.

    Source of the defaults: Meng et al. 2022, arXiv:2202.05262, section 2 and appendix B.
    Raises: BadInput for a setting that leaves nothing to trace.
    """

    noise: float = field(
        default=3.0,
        metadata={
            "help": (
                "Gaussian noise on the subject's embeddings, in standard deviations of embeddings"
            )
        },
    )
    replace: str | None = field(
        default=None, metadata={"help": "put these words in the subject's place instead of noise"}
    )
    samples: int = field(default=10, metadata={"help": "draws of the noise"})
    window: int | None = field(
        default=None,
        metadata={
            "help": (
                "layers whose MLP or attention is restored together, centred at a layer; default:"
                " 10, but a third of the layers"
            )
        },
    )
    kinds: tuple[str, ...] = field(
        default=KINDS, metadata={"help": "what is restored: state, mlp, attn"}
    )
    sever: str | None = field(
        default=None,
        metadata={"help": "mlp or attn: also restore states with these kept corrupted above them"},
    )
    metric: str = field(
        default="probability",
        metadata={"help": "probability of the answer, or logit: its lead over another answer"},
    )
    seed: int = field(default=0, metadata={"help": "seed of the noise"})

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise BadInput(f"‹samples› {self.samples} leaves nothing to average; use at least 1.")
        if self.window is not None and self.window < 1:
            raise BadInput(f"‹window› {self.window} restores nothing; use at least 1 layer.")
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
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown or not self.kinds:
            raise BadInput(
                f"{', '.join(unknown) or 'nothing'} cannot be restored; use {', '.join(KINDS)}."
            )
        if self.sever not in (None, "mlp", "attn"):
            raise BadInput(f"‹sever› {self.sever} is not known; use mlp or attn.")
        if self.metric not in METRICS:
            raise BadInput(f"‹metric› {self.metric} is not known; use {' or '.join(METRICS)}.")

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
