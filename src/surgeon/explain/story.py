"""A test of any story told from a ranking of tokens.

Words are compared with other words of the same documents and frequency, documents with others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from ..errors import BadInput
from .permutation import band, document_null, holm, naive_null, p_value, stratified_test
from .tokens import Tokens, class_name, frequency_class

LEVEL = 0.05


@dataclass(frozen=True)
class InfluenceConfig:
    """Settings of the ranking and of the tests. Raises: BadInput for too small a number."""

    top: int = field(default=20, metadata={"help": "tokens in the ranking"})
    permutations: int = field(default=1999, metadata={"help": "permutations of each test"})
    min_tokens: int = field(
        default=50, metadata={"help": "tokens that a document needs to be listed"}
    )
    seed: int = field(default=0, metadata={"help": "seed of the permutations"})

    def __post_init__(self) -> None:
        if self.permutations < 99 or self.top < 1 or self.min_tokens < 1:
            raise BadInput(
                "the test of influence needs at least 99 permutations, a top of at least 1, and"
                " documents of at least 1 token."
            )


DEFAULTS = InfluenceConfig()


@dataclass(frozen=True)
class Stratum:
    """A document or a class of frequency: the mean KL of its tokens beside that of equal words.

    A document is compared with words of the same frequency in other documents, a class with words
    of other classes in the same documents. expected_kl: the mean KL of those words.

    The rest is None if there is only one of its kind. excess_kl: what is tested, the mean KL per
    token above that of its strata. null: the 5%, 50% and 95% quantiles (q05, q50, q95) of excess_kl
    when words change places. null_naive: those of mean_kl when tokens are drawn from anywhere.
    p: one-sided, by permutation of words. p_corrected: after Holm over all of its kind.
    """

    name: str
    tokens: int
    mean_kl: float
    expected_kl: float
    excess_kl: float | None
    null: dict[str, float] | None
    null_naive: dict[str, float] | None
    p: float | None
    p_corrected: float | None

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass(frozen=True)
class WordGroup:
    """A story: "words like these are hit hardest". All KL are means per token, in nats.

    others_kl: of all other tokens. same_documents_kl: of the other words of the same documents and
    frequency. excess_kl: the mean KL per token above that of words of the same document and
    frequency. documents_nats: by how much the documents in which the group stands lie above all
    documents, at equal frequency.

    Three tests, one-sided. p_naive: of mean_kl, with tokens drawn from anywhere, which is what a
    bare ranking takes for granted. p_within: of excess_kl, where words of the same document and
    frequency change places; p_corrected is the same after Holm over the groups. p_document: of
    documents_nats, where whole documents change places; None if there are fewer than two.
    null_naive, null, null_document: the 5%, 50% and 95% quantiles (q05, q50, q95) by chance of what
    these three test.

    in_top, in_text: the share of the group in the ranking and in the text. in_one_document: share
    of its tokens in the document named.
    """

    name: str
    tokens: int
    words: int
    mean_kl: float
    others_kl: float
    same_documents_kl: float
    documents_nats: float
    excess_kl: float
    null: dict[str, float]
    null_naive: dict[str, float]
    null_document: dict[str, float] | None
    p_naive: float
    p_within: float
    p_document: float | None
    p_corrected: float
    in_top: float
    in_text: float
    in_one_document: float
    document: str

    @property
    def holds(self) -> bool:
        """Whether it is the words: hit harder than others of their documents and frequency."""
        return self.p_corrected <= LEVEL

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "holds": self.holds}


class Tests:
    """The tests of one vector of values, one value a token.

    The unit that changes places is a word of a document with all its tokens. Single tokens would be
    too sure of themselves: the pieces and repetitions of one word are alike.
    Shapes: values, document, frequency, unit (n,), by token; sizes, sums, first (units,).
    """

    def __init__(
        self, tokens: Tokens, values: Float64[Tensor, " n"], config: InfluenceConfig
    ) -> None:
        self.tokens, self.values, self.config = tokens, values, config
        self.document = _dense(tokens.documents)
        self.frequency = _dense([frequency_class(count) for count in tokens.counts])
        keys = list(zip(tokens.documents, tokens.words, strict=True))
        numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
        self.unit = torch.tensor([numbers[key] for key in keys])
        self.sizes = torch.bincount(self.unit).double()
        self.sums = torch.bincount(self.unit, values)
        # the first token of each unit; a word that is punctuation may be counted differently from
        # token to token, and the unit takes the first
        n = len(self.unit)
        nowhere = torch.full((len(numbers),), n)
        self.first = nowhere.scatter_reduce(0, self.unit, torch.arange(n), "amin")

    def documents(self) -> list[Stratum]:
        """The documents of at least `min_tokens`, highest mean KL first."""
        names = [self.tokens.source.names[d] for d in sorted(set(self.tokens.documents))]
        least = self.config.min_tokens
        documents = self._strata(names, self.document, self.frequency, least)
        return sorted(documents, key=lambda document: -document.mean_kl)

    def frequencies(self) -> list[Stratum]:
        """The classes of frequency, rarest first."""
        classes = sorted({frequency_class(count) for count in self.tokens.counts})
        names = [class_name(c) for c in classes]
        return self._strata(names, self.frequency, self.document, 1)

    def words(self, members: Mapping[str, Bool[Tensor, " n"]]) -> list[WordGroup]:
        """Each group of words; `members` says which tokens belong to it."""
        groups = [self._group(name, mask) for name, mask in members.items()]
        corrected = holm([float(group["p_within"]) for group in groups])
        return [
            WordGroup(**group, p_corrected=p) for group, p in zip(groups, corrected, strict=True)
        ]

    def _strata(
        self,
        names: list[str],
        token_label: Int64[Tensor, " n"],
        token_strata: Int64[Tensor, " n"],
        least: int,
    ) -> list[Stratum]:
        """Each label tested against the others of the same strata, where it has enough tokens."""
        label, strata = token_label[self.first], token_strata[self.first]
        tokens = torch.bincount(label, self.sizes)
        sums = torch.bincount(label, self.sums)
        listed = [i for i in range(len(names)) if tokens[i] >= least]
        untested = dict.fromkeys(("excess_kl", "null", "null_naive", "p", "p_corrected"))
        tests: list[dict[str, Any]] = [dict(untested) for _ in listed]
        if len(names) > 1:
            observed, null = self._test(label, strata, len(names))
            draws, generator = self.config.permutations, self._generator()
            naive = naive_null(self.values, token_label, len(names), draws, generator)
            p = [p_value(float(observed[i]), null[:, i]) for i in listed]
            for test, i, single, corrected in zip(tests, listed, p, holm(p), strict=True):
                test["excess_kl"] = float(observed[i])
                test["null"] = band(null[:, i])
                test["null_naive"] = band(naive[:, i])
                test["p"] = single
                test["p_corrected"] = corrected
        strata_tested = []
        for i, test in zip(listed, tests, strict=True):
            mean = float(sums[i] / tokens[i])
            expected = self._beside(label == i, strata)
            strata_tested.append(Stratum(names[i], int(tokens[i]), mean, expected, **test))
        return strata_tested

    def _group(self, name: str, member: Bool[Tensor, " n"]) -> dict[str, Any]:
        """All fields of a WordGroup but the corrected p."""
        generator = self._generator()
        size = int(member.sum())
        mean = float(self.values[member].mean())
        label = member[self.first].long()
        classes = int(self.frequency.max()) + 1
        strata = (self.document * classes + self.frequency)[self.first]
        # strata that hold nothing of the group add nothing, so they are left out
        near = torch.isin(strata, strata[label == 1])
        observed, within = self._test(label[near], strata[near], 2, near)
        naive = torch.empty(self.config.permutations, dtype=torch.float64)
        for i in range(len(naive)):
            anywhere = torch.randperm(len(self.values), generator=generator)[:size]
            naive[i] = self.values[anywhere].mean()
        nats, by_documents = self._documents_of(member, generator)
        indices = member.nonzero().flatten().tolist()
        of_documents = Counter(self.tokens.documents[i] for i in indices)
        ((document, in_document),) = of_documents.most_common(1)
        top = self.values.argsort(descending=True, stable=True)[: self.config.top]
        return {
            "name": name,
            "tokens": size,
            "words": len({self.tokens.words[i] for i in indices}),
            "mean_kl": mean,
            "others_kl": float(self.values[~member].mean()),
            "same_documents_kl": self._beside(label == 1, strata),
            "documents_nats": nats,
            "excess_kl": float(observed[1]),
            "null": band(within[:, 1]),
            "null_naive": band(naive),
            "null_document": None if by_documents is None else band(by_documents),
            "p_naive": p_value(mean, naive),
            "p_within": p_value(float(observed[1]), within[:, 1]),
            "p_document": None if by_documents is None else p_value(nats, by_documents),
            "in_top": float(member[top].double().mean()),
            "in_text": float(member.double().mean()),
            "in_one_document": in_document / size,
            "document": self.tokens.source.names[document],
        }

    def _documents_of(
        self, member: Bool[Tensor, " n"], generator: torch.Generator
    ) -> tuple[float, Float64[Tensor, " permutation"] | None]:
        """How far the group's documents lie above all documents, and the same by chance.

        At equal frequency, and judged by the tokens that are not of the group. By chance: documents
        change places; None if there are fewer than two.
        """
        shape = int(self.document.max()) + 1, int(self.frequency.max()) + 1
        n_cells = shape[0] * shape[1]
        cell = self.document * shape[1] + self.frequency
        other = cell[~member]
        weights = torch.bincount(cell[member], minlength=n_cells).double().view(shape)
        sums = torch.bincount(other, self.values[~member], n_cells).view(shape)
        sizes = torch.bincount(other, minlength=n_cells).view(shape)
        overall = sums.sum(0) / sizes.sum(0).clamp_min(1)
        # a document without such words tells nothing of them, so it is taken to be like all others
        excess = torch.where(sizes > 0, sums / sizes.clamp_min(1) - overall, 0.0)
        nats = float((weights * excess).sum() / weights.sum())
        if shape[0] < 2:
            return nats, None
        return nats, document_null(weights, excess, self.config.permutations, generator)

    def _beside(self, member: Bool[Tensor, " unit"], strata: Int64[Tensor, " unit"]) -> float:
        """The mean of the other units of the same strata, weighted as the members' tokens are.

        A stratum without others counts as the members have it.
        """
        n = int(strata.max()) + 1
        own_size = torch.bincount(strata[member], self.sizes[member], n)
        own_sum = torch.bincount(strata[member], self.sums[member], n)
        other_size = torch.bincount(strata[~member], self.sizes[~member], n)
        other_sum = torch.bincount(strata[~member], self.sums[~member], n)
        own_mean = own_sum / own_size.clamp_min(1)
        other_mean = other_sum / other_size.clamp_min(1)
        means = torch.where(other_size > 0, other_mean, own_mean)
        return float((own_size * means).sum() / own_size.sum())

    def _test(
        self,
        label: Int64[Tensor, " some"],
        strata: Int64[Tensor, " some"],
        groups: int,
        units: Tensor | slice = slice(None),
    ) -> tuple[Float64[Tensor, " group"], Float64[Tensor, "permutation group"]]:
        """The stratified test of some units, which `label` and `strata` describe."""
        sums, sizes = self.sums[units], self.sizes[units]
        draws, generator = self.config.permutations, self._generator()
        return stratified_test(sums, sizes, label, strata, groups, draws, generator)

    def _generator(self) -> torch.Generator:
        """Begun anew for each test, so that no result depends on which tests came before."""
        return torch.Generator().manual_seed(self.config.seed)


def _dense(labels: Sequence[int]) -> Int64[Tensor, " n"]:
    """Labels counted from 0 without gaps, in their order."""
    numbers = {label: number for number, label in enumerate(sorted(set(labels)))}
    return torch.tensor([numbers[label] for label in labels])
