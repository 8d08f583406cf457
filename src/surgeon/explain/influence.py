"""Which tokens an injury changes, and a test of any story told from such a ranking."""

# How this works.
#
# Every token is scored by KL(base || changed) of the distribution that predicts it. The ranking by
# this score invites stories: "words of the sea are hit hardest". But a ranking on a few lines is
# always about what these lines are about. (The first article of the WikiText-2 validation split is
# about lobsters, and every per-token ranking on it is marine.)
#
# So each token is labelled with its word, its document and how frequent the word is (tokens.py). A
# story about words has to survive the comparison with other words of the same documents and the
# same frequency, by permutation of words within those strata; and documents are compared with each
# other at equal frequency (story.py, permutation.py).

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float64, Int64
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..anatomy import Anatomy
from ..corpus import Corpus
from ..errors import BadInput
from ..measure.likelihood import batches, logits_of, require_causal
from ..patch import Patch
from .states import Progress, require_stack, stacked, states
from .story import DEFAULTS, InfluenceConfig, Stratum, Tests, WordGroup
from .tokens import Tokens, label_tokens

PerToken = dict[str, Float64[Tensor, " predicted"]]  # by state


@dataclass(frozen=True, eq=False)
class Influence:
    """KL(base || changed) of every predicted token, in nats, what the token is, and the tests.

    Shapes: kl[state], nll[state] (n,) in the order of `tokens`. States are "broken" and maybe
    "patched"; for nll also "base".
    """

    corpus: Corpus
    tokens: Tokens
    kl: dict[str, Float64[Tensor, " n"]]
    nll: dict[str, Float64[Tensor, " n"]]
    words: list[WordGroup]
    documents: list[Stratum]
    frequencies: list[Stratum]
    config: InfluenceConfig

    @property
    def top(self) -> list[int]:
        """The tokens that change most, as indices."""
        order = self.kl["broken"].argsort(descending=True, stable=True)
        return order[: self.config.top].tolist()

    def columns(self) -> dict[str, list[Any]]:
        """One row a token, as plain columns of one length, for a table."""
        t = self.tokens
        return {
            "window": t.windows,
            "position": t.positions,
            "token_id": t.ids,
            "token": t.texts,
            "word": t.words,
            "context": t.contexts,
            "document": t.documents,
            "title": [t.source.names[d] for d in t.documents],
            "word_count": t.counts,
            "token_count": t.token_counts,
            **{f"kl_{state}": values.tolist() for state, values in self.kl.items()},
            **{f"nll_{state}": values.tolist() for state, values in self.nll.items()},
        }

    def rows(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Some rows of the table."""
        columns = self.columns()
        return [{name: values[i] for name, values in columns.items()} for i in indices]

    def to_json(self) -> dict[str, Any]:
        titles = self.tokens.source.names
        of_top = Counter(titles[self.tokens.documents[i]] for i in self.top)
        return {
            "mean_kl": {state: float(values.mean()) for state, values in self.kl.items()},
            "documents_rule": self.tokens.source.rule,
            "documents_seen": len(set(self.tokens.documents)),
            "top": self.rows(self.top),
            "top_by_document": dict(of_top.most_common()),
            "permutations": self.config.permutations,
            "groups": [group.to_json() for group in self.words],
            "documents": [document.to_json() for document in self.documents],
            "frequencies": [each.to_json() for each in self.frequencies],
        }


def influence(
    anatomy: Anatomy,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    corpus: Corpus,
    patches: Sequence[Patch],
    groups: Mapping[str, Sequence[str]] | None = None,
    config: InfluenceConfig = DEFAULTS,
    progress: Progress | None = None,
) -> Influence:
    """Per-token KL of the patched states, and tests by document, by frequency and of `groups`.

    corpus: it was cut from `text`. groups: name and words, each word as it stands in the text, in
    any case.
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
    tests = Tests(tokens, kl["broken"], config)
    return Influence(
        corpus,
        tokens,
        kl,
        nll,
        tests.words(members),
        tests.documents(),
        tests.frequencies(),
        config,
    )


@torch.no_grad()
def token_kl(
    anatomy: Anatomy,
    windows: Int64[Tensor, "n window"],
    named: Mapping[str, Sequence[Patch]],
    progress: Progress | None = None,
) -> tuple[PerToken, PerToken]:
    """KL(base || state) and NLL of each predicted token, in nats, window by window.

    named: the patches of each state, "base" first.
    """
    kl: dict[str, list[Tensor]] = {state: [] for state in named if state != "base"}
    nll: dict[str, list[Tensor]] = {state: [] for state in named}
    parts = batches(windows)
    for done, ids in enumerate(parts):
        base = torch.empty(0)
        for state, patches in named.items():
            with stacked(anatomy, patches):
                logits = logits_of(anatomy.model, ids)[:, :-1].float()
            log_p = F.log_softmax(logits, -1)
            next_ids = ids[:, 1:, None].to(log_p.device)
            nll[state].append(-log_p.gather(-1, next_ids).flatten().double().cpu())
            if state == "base":
                base = log_p
            else:
                divergence = (base.exp() * (base - log_p)).sum(-1)
                kl[state].append(divergence.flatten().double().cpu())
        if progress:
            progress("influence", done + 1, len(parts))
    return (
        {state: torch.cat(values) for state, values in kl.items()},
        {state: torch.cat(values) for state, values in nll.items()},
    )


def _members(name: str, words: Sequence[str], tokens: Tokens, corpus: Corpus) -> Bool[Tensor, " n"]:
    """Which tokens belong to a group of words."""
    wanted = {word.strip().casefold() for word in words}
    members = torch.tensor([word in wanted for word in tokens.words])
    if not members.any() or members.all():
        how_many = "all tokens belong" if members.any() else "no token belongs"
        raise BadInput(
            f"{how_many} to the group {name!r} ({len(wanted)} words) in the"
            f" {corpus.windows.shape[0]} windows of {corpus.name}, so there is nothing to compare;"
            " use other words or more ‹windows›."
        )
    return members
