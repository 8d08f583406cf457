"""The corrupted run: noise on the embeddings of the subject's tokens, or other tokens in their
place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..anatomy import Anatomy
from ..errors import BadInput
from ..subject import SLOT, SubjectPrompt, locate
from .config import TraceConfig

CHUNK = 4096  # tokens that are embedded at once


@dataclass(frozen=True)
class Spread:
    """Standard deviation of the entries of embeddings, and of which embeddings it is."""

    value: float
    of: str

    @classmethod
    def of_vocabulary(cls, anatomy: Anatomy) -> Spread:
        """Of every token: what there is when one prompt is traced, whose own few tokens say little
        about a spread.
        """
        embed = embedding_of(anatomy)
        weight = embed.get_parameter("weight")
        return cls(_std(embed, torch.arange(len(weight), device=weight.device)), "all tokens")

    @classmethod
    def of_subjects(cls, anatomy: Anatomy, located: Sequence[SubjectPrompt]) -> Spread:
        """Of the tokens of these subjects, as often as they occur, as in the published code; of all
        tokens if there is one subject.
        """
        if len({p.subject for p in located}) < 2:
            return cls.of_vocabulary(anatomy)
        embed = embedding_of(anatomy)
        ids = [i for p in located for i in p.ids[p.start : p.stop]]
        return cls(
            _std(embed, torch.tensor(ids, device=embed.get_parameter("weight").device)),
            f"the tokens of {len(located)} subjects",
        )


def embedding_of(anatomy: Anatomy) -> nn.Module:
    embed: nn.Module = anatomy.model.get_input_embeddings()  # type: ignore[operator]
    return embed


@torch.no_grad()
def _std(embed: nn.Module, ids: Tensor) -> float:
    # through the module, since some scale what they look up; in pieces, since a vocabulary in
    # float64 is large
    count, total, square = 0, 0.0, 0.0
    for part in torch.split(ids, CHUNK):
        x = embed(part).double()
        count, total, square = (
            count + x.numel(),
            total + float(x.sum()),
            square + float(x.square().sum()),
        )
    return float(max(0.0, square / count - (total / count) ** 2) ** 0.5)


@torch.no_grad()
def corrupted(
    anatomy: Anatomy,
    tokenizer: PreTrainedTokenizerBase,
    prompt: SubjectPrompt,
    template: str,
    config: TraceConfig,
    sigma: float,
) -> Float[Tensor, "sample pos d_embed"]:
    """What leaves the input embedding in the corrupted runs: one row for each draw of the noise, or
    one for a replacement.

    Raises: BadInput for a replacement of another number of tokens, or one that changes nothing or
    more than the subject.
    """
    embed = embedding_of(anatomy)
    device = embed.get_parameter("weight").device
    if config.replace is not None:
        return torch.as_tensor(
            embed(
                torch.tensor(
                    [_replaced(tokenizer, prompt, template, config.replace)], device=device
                )
            )
        )
    generator = torch.Generator().manual_seed(config.seed)
    embedded: Tensor = embed(torch.tensor([prompt.ids], device=device)).repeat(config.samples, 1, 1)
    noise = sigma * torch.randn(
        config.samples, prompt.stop - prompt.start, embedded.shape[2], generator=generator
    )
    embedded[:, prompt.start : prompt.stop] += noise.to(embedded)
    return embedded


def _replaced(
    tokenizer: PreTrainedTokenizerBase, prompt: SubjectPrompt, template: str, words: str
) -> tuple[int, ...]:
    marked = template if SLOT in template else template.replace(prompt.subject, SLOT, 1)
    other = locate(tokenizer, marked, words, "yes" if prompt.bos else "no")
    if len(other.subject_tokens) != len(prompt.subject_tokens):
        raise BadInput(
            f"{words!r} has {len(other.subject_tokens)} tokens there"
            f" ({', '.join(map(repr, other.subject_tokens))}) and the subject {prompt.subject!r}"
            f" has {len(prompt.subject_tokens)} ({', '.join(map(repr, prompt.subject_tokens))});"
            " replace it with words of as many tokens."
        )
    around = [ids[: prompt.start] + ids[prompt.stop :] for ids in (prompt.ids, other.ids)]
    if other.start != prompt.start or around[0] != around[1]:
        raise BadInput(
            f"with {words!r} in the subject's place other tokens of the prompt change as well;"
            " choose other words."
        )
    if other.ids == prompt.ids:
        raise BadInput(
            f"{words!r} has the tokens of the subject itself, so nothing would be corrupted; choose"
            " other words."
        )
    return other.ids
