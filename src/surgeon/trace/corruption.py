"""The corrupted run: noise on the embeddings of the subject's tokens, or other tokens there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import transformers
from jaxtyping import Float
from torch import Tensor, nn

from ..anatomy import Anatomy
from ..errors import BadInput
from ..subject import SLOT, SubjectPrompt, locate
from .config import TraceConfig

CHUNK = 4096  # tokens that are embedded at once


@dataclass(frozen=True)
class Spread:
    """Standard deviation of the entries of embeddings, and of which embeddings it is.

    >>> import surgeon
    >>> anatomy = Anatomy.of(surgeon.load_model("patient").model)
    >>> Spread.of_vocabulary(anatomy)
    Spread(value=0.57..., of='all tokens')
    """

    value: float
    of: str

    @classmethod
    def of_vocabulary(cls, anatomy: Anatomy) -> Spread:
        """Of every token.

        For a single prompt: its own few tokens say little about a spread.
        """
        embed = embedding_of(anatomy)
        weight = embed.get_parameter("weight")
        every_id = torch.arange(len(weight), device=weight.device)
        return cls(_std(embed, every_id), "all tokens")

    @classmethod
    def of_subjects(cls, anatomy: Anatomy, located: Sequence[SubjectPrompt]) -> Spread:
        """Of the tokens of these subjects, as often as they occur, as in the published code.

        Of all tokens if there is just one subject.
        """
        if len({prompt.subject for prompt in located}) < 2:
            return cls.of_vocabulary(anatomy)
        embed = embedding_of(anatomy)
        ids = [i for prompt in located for i in prompt.ids[prompt.start : prompt.stop]]
        device = embed.get_parameter("weight").device
        std = _std(embed, torch.tensor(ids, device=device))
        return cls(std, f"the tokens of {len(located)} subjects")


def embedding_of(anatomy: Anatomy) -> nn.Module:
    """The module that looks up the embeddings of tokens."""
    embed: nn.Module = anatomy.model.get_input_embeddings()  # type: ignore[operator]
    return embed


@torch.no_grad()
def _std(embed: nn.Module, ids: Tensor) -> float:
    count, total, squares = 0, 0.0, 0.0
    # in pieces, since a vocabulary in float64 is large
    for piece in torch.split(ids, CHUNK):
        # through the module, since some scale what they look up
        x = embed(piece).double()
        count += x.numel()
        total += float(x.sum())
        squares += float(x.square().sum())
    variance = squares / count - (total / count) ** 2
    return float(max(0.0, variance) ** 0.5)


@torch.no_grad()
def corrupted(
    anatomy: Anatomy,
    tokenizer: transformers.PreTrainedTokenizerBase,
    prompt: SubjectPrompt,
    template: str,
    config: TraceConfig,
    sigma: float,
) -> Float[Tensor, "sample pos d_embed"]:
    """What leaves the input embedding in the corrupted runs.

    One row for each draw of the noise, or a single one for a replacement.
    template: the prompt as it was given, maybe with `{}`. sigma: of the noise, absolute.
    Raises: BadInput for a replacement of another number of tokens, or one that changes nothing or
    more than the subject.
    """
    embed = embedding_of(anatomy)
    device = embed.get_parameter("weight").device
    if config.replace is not None:
        ids = _replaced(tokenizer, prompt, template, config.replace)
        return torch.as_tensor(embed(torch.tensor([ids], device=device)))
    clean: Tensor = embed(torch.tensor([prompt.ids], device=device))
    embedded = clean.repeat(config.samples, 1, 1)
    subject = embedded[:, prompt.start : prompt.stop]
    # drawn on the CPU, so that a seed means the same noise on every device
    generator = torch.Generator().manual_seed(config.seed)
    noise = sigma * torch.randn(subject.shape, generator=generator)
    subject += noise.to(embedded)
    return embedded


def _replaced(
    tokenizer: transformers.PreTrainedTokenizerBase,
    prompt: SubjectPrompt,
    template: str,
    words: str,
) -> tuple[int, ...]:
    """The ids of the prompt with `words` in the subject's place."""
    marked = template if SLOT in template else template.replace(prompt.subject, SLOT, 1)
    other = locate(tokenizer, marked, words, "yes" if prompt.bos else "no")
    there, here = other.subject_tokens, prompt.subject_tokens
    if len(there) != len(here):
        raise BadInput(
            f"{words!r} has {len(there)} tokens there ({', '.join(map(repr, there))})"
            f" and the subject {prompt.subject!r} has {len(here)} ({', '.join(map(repr, here))});"
            " replace it with words of as many tokens."
        )
    around, around_other = (
        ids[: prompt.start] + ids[prompt.stop :] for ids in (prompt.ids, other.ids)
    )
    if other.start != prompt.start or around != around_other:
        raise BadInput(
            f"with {words!r} in the subject's place other tokens of the prompt change as well;"
            " choose other words."
        )
    if other.ids == prompt.ids:
        raise BadInput(
            f"{words!r} has the tokens of the subject itself, so nothing would be corrupted;"
            " choose other words."
        )
    return other.ids
