"""A test of any story told from a ranking of tokens: words beside words of the same documents and
frequency, documents beside others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from ..result import derived, record
from ..settings import setting
from .permutation import band, document_null, holm, naive_null, p_value, stratified_test
from .tokens import Tokens, class_name, frequency_class

LEVEL = 0.05


@dataclass(frozen=True)
class InfluenceConfig:
    """Settings of the ranking and of the tests."""

    top: int = setting(20, "tokens in the ranking", low=1, group="Influence")
    permutations: int = setting(1999, "permutations of each test", low=99, group="Influence")
    min_tokens: int = setting(
        50, "tokens that a document needs to be listed", low=1, group="Influence"
    )


@record
class Stratum:
    """A document or a class of frequency: the mean KL of its tokens beside what equal words have
    elsewhere.

    A document is compared with words of the same frequency in other documents; a class with words
    of other classes in the same documents. p: one-sided, by permutation of words; p_corrected:
    after Holm over all of its kind. excess_kl: what is tested, the mean KL per token above that of
    its strata. null: the 5%, 50% and 95% quantiles (q05, q50, q95) of excess_kl when words change
    places; null_naive: those of mean_kl when tokens are drawn from anywhere. All are None if there
    is only one of its kind.
    """

    name: str
    tokens: int
    mean_kl: float
    expected_kl: float
    excess_kl: float | None = None
    null: dict[str, float] | None = None
    null_naive: dict[str, float] | None = None
    p: float | None = None
    p_corrected: float | None = None


@record
class WordGroup:
    """A story: "words like these are hit hardest". All KL are means per token, in nats.

    others_kl: of all other tokens. same_documents_kl: that of the other words of the same documents
    and frequency. documents_nats: by how much the documents in which the group stands lie above all
    documents, at equal frequency. p_naive: tokens drawn from anywhere, what a bare ranking takes
    for granted. p_within: words of the same document and frequency change places. p_document: whole
    documents change places; None if there are fewer than two. p_corrected: p_within after Holm over
    the groups. excess_kl: what p_within tests, the mean KL per token above that of words of the
    same document and frequency. null, null_naive, null_document: the 5%, 50% and 95% quantiles
    (q05, q50, q95) of excess_kl, mean_kl and documents_nats in the three tests. in_top, in_text:
    the share of the group in the ranking and in the text. in_one_document: share of its tokens in
    the document named.
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

    @derived
    def holds(self) -> bool:
        """Whether it is the words: they are hit harder than other words of their documents and
        frequency, after correction.
        """
        return self.p_corrected <= LEVEL


class Tests:
    """The tests of one vector of values. The unit that changes places is a word of a document with
    all its tokens.

    Single tokens would be too sure of themselves: the pieces and repetitions of one word are alike.
    """

    def __init__(
        self,
        tokens: Tokens,
        values: Float64[Tensor, " n"],
        config: InfluenceConfig = InfluenceConfig(),
        seed: int = 0,
    ) -> None:
        self.tokens, self.values, self.config, self.seed = tokens, values, config, seed
        self.document = _dense(tokens.documents)
        self.frequency = _dense([frequency_class(count) for count in tokens.counts])
        keys = {
            key: i
            for i, key in enumerate(dict.fromkeys(zip(tokens.documents, tokens.words, strict=True)))
        }
        self.unit = torch.tensor(
            [keys[key] for key in zip(tokens.documents, tokens.words, strict=True)]
        )
        self.sizes = torch.bincount(self.unit).double()
        self.sums = torch.bincount(self.unit, values)
        # a word that is punctuation may be counted differently from token to token; the unit takes
        # the first
        self.first = torch.full((len(keys),), len(self.unit)).scatter_reduce(
            0, self.unit, torch.arange(len(self.unit)), "amin"
        )

    def documents(self) -> list[Stratum]:
        names = [self.tokens.source.names[d] for d in sorted(set(self.tokens.documents))]
        strata = self._strata(names, self.document, self.frequency, self.config.min_tokens)
        return sorted(strata, key=lambda d: -d.mean_kl)

    def frequencies(self) -> list[Stratum]:
        names = [
            class_name(c) for c in sorted({frequency_class(count) for count in self.tokens.counts})
        ]
        return self._strata(names, self.frequency, self.document, 1)

    def _strata(self, names: list[str], label: Tensor, strata: Tensor, least: int) -> list[Stratum]:
        label, strata = label[self.first], strata[self.first]
        tokens = torch.bincount(label, self.sizes)
        sums = torch.bincount(label, self.sums)
        listed = [i for i in range(len(names)) if tokens[i] >= least]
        means = (sums / tokens).tolist()
        untested = [
            Stratum(names[i], int(tokens[i]), means[i], self._beside(label == i, strata))
            for i in listed
        ]
        if len(names) == 1:
            return untested
        observed, null = self._test(label, strata, len(names))
        generator = torch.Generator().manual_seed(self.seed)
        naive = naive_null(
            self.values, label[self.unit], len(names), self.config.permutations, generator
        )
        p = [p_value(float(observed[i]), null[:, i]) for i in listed]
        return [
            replace(
                stratum,
                excess_kl=float(observed[i]),
                null=band(null[:, i]),
                null_naive=band(naive[:, i]),
                p=one,
                p_corrected=corrected,
            )
            for stratum, i, one, corrected in zip(untested, listed, p, holm(p), strict=True)
        ]

    def words(self, members: Mapping[str, Tensor]) -> list[WordGroup]:
        groups = [self._group(name, mask) for name, mask in members.items()]
        corrected = holm([group.p_within for group in groups])
        return [replace(group, p_corrected=p) for group, p in zip(groups, corrected, strict=True)]

    def _group(self, name: str, member: Tensor) -> WordGroup:
        generator = torch.Generator().manual_seed(self.seed)
        mean = float(self.values[member].mean())
        label = member[self.first].long()
        strata = (self.document * (int(self.frequency.max()) + 1) + self.frequency)[self.first]
        # strata that hold nothing of the group add nothing, so they are left out
        near = torch.isin(strata, strata[label == 1])
        observed, within = self._test(label[near], strata[near], 2, near)
        n = len(self.values)
        naive = torch.stack(
            [
                self.values[torch.randperm(n, generator=generator)[: int(member.sum())]].mean()
                for _ in range(self.config.permutations)
            ]
        )
        nats, documents = self._documents_of(member, generator)
        most = Counter(
            d for d, m in zip(self.tokens.documents, member.tolist(), strict=True) if m
        ).most_common(1)[0]
        top = self.values.argsort(descending=True, stable=True)[: self.config.top]
        p_within = p_value(float(observed[1]), within[:, 1])
        return WordGroup(
            name=name,
            tokens=int(member.sum()),
            words=len({w for w, m in zip(self.tokens.words, member.tolist(), strict=True) if m}),
            mean_kl=mean,
            others_kl=float(self.values[~member].mean()),
            same_documents_kl=self._beside(label == 1, strata),
            documents_nats=nats,
            excess_kl=float(observed[1]),
            null=band(within[:, 1]),
            null_naive=band(naive),
            null_document=None if documents is None else band(documents),
            p_naive=p_value(mean, naive),
            p_within=p_within,
            p_document=None if documents is None else p_value(nats, documents),
            p_corrected=p_within,
            in_top=float(member[top].double().mean()),
            in_text=float(member.double().mean()),
            in_one_document=most[1] / int(member.sum()),
            document=self.tokens.source.names[most[0]],
        )

    def _documents_of(
        self, member: Tensor, generator: torch.Generator
    ) -> tuple[float, Tensor | None]:
        """How far the group's documents lie above all documents at equal frequency, judged by the
        tokens that are not of the group; and the same when documents change places, if there are at
        least two."""
        documents, classes = int(self.document.max()) + 1, int(self.frequency.max()) + 1
        cell = self.document * classes + self.frequency
        weights = (
            torch.bincount(cell[member], minlength=documents * classes)
            .double()
            .view(documents, classes)
        )
        means = torch.bincount(cell[~member], self.values[~member], documents * classes).view(
            documents, classes
        )
        sizes = torch.bincount(cell[~member], minlength=documents * classes).view(
            documents, classes
        )
        overall = means.sum(0) / sizes.sum(0).clamp_min(1)
        # a document without such words tells nothing of them, so it is taken to be like all others
        excess = torch.where(sizes > 0, means / sizes.clamp_min(1) - overall, 0.0)
        nats = float((weights * excess).sum() / weights.sum())
        if documents < 2:
            return nats, None
        return nats, document_null(weights, excess, self.config.permutations, generator)

    def _beside(self, member: Bool[Tensor, " unit"], strata: Int64[Tensor, " unit"]) -> float:
        """The mean of the other units of the same strata, weighted as the tokens of the members
        are.

        A stratum without others counts as the members have it.
        """
        n = int(strata.max()) + 1
        mine, others = (torch.bincount(strata[m], self.sizes[m], n) for m in (member, ~member))
        own, theirs = (torch.bincount(strata[m], self.sums[m], n) for m in (member, ~member))
        means = torch.where(others > 0, theirs / others.clamp_min(1), own / mine.clamp_min(1))
        return float((mine * means).sum() / mine.sum())

    def _test(
        self, label: Tensor, strata: Tensor, groups: int, units: Tensor | slice = slice(None)
    ) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        return stratified_test(
            self.sums[units],
            self.sizes[units],
            label,
            strata,
            groups,
            self.config.permutations,
            generator,
        )


def _dense(labels: Sequence[int]) -> Int64[Tensor, " n"]:
    """Labels counted from 0 without gaps, in their order."""
    order = {label: i for i, label in enumerate(sorted(set(labels)))}
    return torch.tensor([order[label] for label in labels])
