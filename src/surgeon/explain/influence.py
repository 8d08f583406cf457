"""Which tokens an injury changes, position by position, and a test of any story told from such a
ranking.

How this works. Every state of the model runs over the same windows, and for each predicted token
KL(base || state) and the NLL are kept: a table with a row for each token, which also says what the
token is, in which word and which document it stands and how frequent that is (tokens.py). The
tokens that change most are the ranking.

Every ranking on a few lines is about what these lines are about. So a story about words has to
survive the comparison with words of the same documents and the same frequency, and a story about
documents that with words of the same frequency elsewhere; what chance gives is found by
permutation, of words and not of single tokens, since the pieces and repetitions of one word are
alike (story.py, permutation.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from jaxtyping import Float64, Int64
from torch import Tensor

from ..anatomy import Anatomy
from ..corpus import Corpus
from ..errors import BadInput
from ..measure.likelihood import batches, logits_of, require_causal
from ..patch import Patch, stacked
from ..progress import Tell, silent
from ..result import record
from .states import require_stack, states
from .story import InfluenceConfig, Stratum, Tests, WordGroup
from .tokens import Tokens, label_tokens

Columns = dict[str, list[Any]]  # one row a token; the names are the fields of `TokenRow`


@record
class TokenRow:
    """One predicted token: where it stands, what it is, and KL(base || state) and NLL there, in
    nats.

    word_count, token_count: how often its word, and its id, stand in the text.
    """

    window: int
    position: int
    token_id: int
    token: str
    word: str
    context: str
    document: int
    title: str
    word_count: int
    token_count: int
    kl_broken: float
    nll_base: float
    nll_broken: float
    kl_patched: float | None = None
    nll_patched: float | None = None


@record
class Influence:
    """The mean KL(base || state) in nats per token, the tokens that change most, and the tests of
    what might be said of them.

    top_by_document: how many of `top` stand in each. permutations: of each test.
    """

    mean_kl: dict[str, float]
    documents_rule: str
    documents_seen: int
    top: list[TokenRow]
    top_by_document: dict[str, int]
    permutations: int
    groups: list[WordGroup]
    documents: list[Stratum]
    frequencies: list[Stratum]


def influence(
    anatomy: Anatomy,
    tokenizer: transformers.PreTrainedTokenizerBase,
    text: str,
    corpus: Corpus,
    patches: Sequence[Patch],
    groups: Mapping[str, Sequence[str]] | None = None,
    config: InfluenceConfig = InfluenceConfig(),
    seed: int = 0,
    progress: Tell = silent,
) -> tuple[Influence, Columns]:
    """Per-token KL of the patched states on `corpus`, which was cut from `text`, and tests by
    document, by frequency and of `groups`; and the table of all tokens as columns.

    groups: name and words, each word as it stands in the text, in any case.
    Raises: BadInput without patches, for a group none of whose words is there, or a corpus of
    another text; as `Patch.apply_`.
    """
    named = states(patches)
    require_causal(anatomy.model)
    require_stack(anatomy, patches)
    tokens = label_tokens(tokenizer, text, corpus)
    members = {
        name: _members(name, words, tokens, corpus) for name, words in (groups or {}).items()
    }
    kl, nll = token_kl(anatomy, corpus.windows, named, progress)
    columns = _columns(tokens, kl, nll)
    order = kl["broken"].argsort(descending=True, stable=True).tolist()
    top = [
        TokenRow(**{name: values[i] for name, values in columns.items()})
        for i in order[: config.top]
    ]
    tests = Tests(tokens, kl["broken"], config, seed)
    ranking = Influence(
        mean_kl={state: float(values.mean()) for state, values in kl.items()},
        documents_rule=tokens.source.rule,
        documents_seen=len(set(tokens.documents)),
        top=top,
        top_by_document=dict(Counter(row.title for row in top).most_common()),
        permutations=config.permutations,
        groups=tests.words(members),
        documents=tests.documents(),
        frequencies=tests.frequencies(),
    )
    return ranking, columns


def _columns(tokens: Tokens, kl: dict[str, Tensor], nll: dict[str, Tensor]) -> Columns:
    return {
        "window": tokens.windows,
        "position": tokens.positions,
        "token_id": tokens.ids,
        "token": tokens.texts,
        "word": tokens.words,
        "context": tokens.contexts,
        "document": tokens.documents,
        "title": [tokens.source.names[document] for document in tokens.documents],
        "word_count": tokens.counts,
        "token_count": tokens.token_counts,
        **{f"kl_{state}": values.tolist() for state, values in kl.items()},
        **{f"nll_{state}": values.tolist() for state, values in nll.items()},
    }


@torch.no_grad()
def token_kl(
    anatomy: Anatomy,
    windows: Int64[Tensor, "n window"],
    named: Mapping[str, Sequence[Patch]],
    progress: Tell = silent,
) -> tuple[dict[str, Float64[Tensor, " predicted"]], dict[str, Float64[Tensor, " predicted"]]]:
    """KL(base || state) and NLL of each predicted token, in nats, window by window; the states are
    patches by name, "base" first.
    """
    kl: dict[str, list[Tensor]] = {state: [] for state in named if state != "base"}
    nll: dict[str, list[Tensor]] = {state: [] for state in named}
    parts = batches(windows)
    for done, ids in enumerate(parts):
        base = torch.empty(0)
        for state, patches in named.items():
            with stacked(anatomy, patches):
                log_p = F.log_softmax(logits_of(anatomy.model, ids)[:, :-1].float(), -1)
            nll[state].append(
                -log_p.gather(-1, ids[:, 1:, None].to(log_p.device)).flatten().double().cpu()
            )
            if state == "base":
                base = log_p
            else:
                kl[state].append((base.exp() * (base - log_p)).sum(-1).flatten().double().cpu())
        progress("influence", done + 1, len(parts))
    return {s: torch.cat(v) for s, v in kl.items()}, {s: torch.cat(v) for s, v in nll.items()}


def _members(name: str, words: Sequence[str], tokens: Tokens, corpus: Corpus) -> Tensor:
    wanted = {word.strip().casefold() for word in words}
    members = torch.tensor([word in wanted for word in tokens.words])
    if not members.any() or members.all():
        some = "all tokens belong" if members.any() else "no token belongs"
        raise BadInput(
            f"{some} to the group {name!r} ({len(wanted)} words) in the {corpus.windows.shape[0]}"
            f" windows of {corpus.name}, so there is nothing to compare; use other words or more"
            " ‹windows›."
        )
    return members
