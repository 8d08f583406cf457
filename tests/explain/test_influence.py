"""Per-token KL against a plain computation, labels against the text, and the lobster."""

import random
from collections import defaultdict
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from explain.conftest import TEXT, TITLES

from surgeon.anatomy import Anatomy, load_model
from surgeon.corpus import load_corpus, read_text
from surgeon.errors import BadInput, BadText
from surgeon.explain import InfluenceConfig, influence, label_tokens, split_documents
from surgeon.explain import story as stories
from surgeon.explain.tokens import frequency_class
from surgeon.measure import Reference
from surgeon.patch import Patch, ablate
from surgeon.settings import configured

FEW = InfluenceConfig(permutations=199, min_tokens=5)


def injury_and_repair(anatomy: Anatomy) -> list[Patch]:
    injury = ablate(anatomy, ["L0.mlp.down[3, :]"])
    with injury.applied(anatomy):
        return [injury, ablate(anatomy, ["L1.mlp.down[:, 2]"])]


def test_kl_and_nll_are_the_plain_ones(case):
    anatomy, tokenizer, corpus = case
    patches = injury_and_repair(anatomy)
    ranking, tokens = influence(anatomy, tokenizer, TEXT, corpus, patches, config=FEW)
    ids = corpus.windows

    def log_p() -> torch.Tensor:
        return F.log_softmax(anatomy.model(ids).logits[:, :-1], -1)

    base = log_p()
    with patches[0].applied(anatomy):
        broken = log_p()
        with patches[1].applied(anatomy):
            patched = log_p()
    for state, changed in (("broken", broken), ("patched", patched)):
        plain = F.kl_div(changed, base, log_target=True, reduction="none").sum(-1).flatten()
        assert tokens[f"kl_{state}"] == pytest.approx(plain.tolist(), abs=1e-5)
    for state, p in (("base", base), ("broken", broken), ("patched", patched)):
        plain = F.nll_loss(p.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        assert tokens[f"nll_{state}"] == pytest.approx(plain.tolist(), abs=1e-5)
    far = Reference(anatomy.model, ids).compare(lambda: patches[0].applied(anatomy))
    assert ranking.mean_kl["broken"] == pytest.approx(far.kl, rel=1e-5)
    assert ranking.top[0].kl_broken == max(tokens["kl_broken"])


def test_every_token_is_labelled(case):
    _, tokenizer, corpus = case
    tokens = label_tokens(tokenizer, TEXT, corpus)
    assert tokens.ids == corpus.windows[:, 1:].flatten().tolist()
    assert [
        corpus.windows[w, p] for w, p in zip(tokens.windows, tokens.positions, strict=True)
    ] == tokens.ids
    assert [tokenizer.convert_ids_to_tokens(i).strip() for i in tokens.ids] == [
        t.strip() for t in tokens.texts
    ]
    assert tokens.source.names == TITLES
    by_hand = {"fish": {0, 2}, "cat": {1, 2}, "script": {1}}
    for word, documents in by_hand.items():
        assert {
            d for d, w in zip(tokens.documents, tokens.words, strict=True) if w == word
        } == documents
    sea = tokens.words.index("sea")
    assert tokens.counts[sea] == TEXT.casefold().count("sea")
    assert tokens.token_counts[sea] == len(
        tokenizer(TEXT, add_special_tokens=False).input_ids
    ) - sum(i != tokens.ids[sea] for i in tokenizer(TEXT, add_special_tokens=False).input_ids)
    assert (
        tokens.contexts[sea].endswith("saw the")
        or tokens.contexts[sea].endswith("in the")
        or "Sea" in tokens.texts[sea]
    )
    first = tokens.positions.index(1)
    assert tokens.contexts[first] == ("" if corpus.bos else tokenizer.decode(corpus.windows[0, :1]))


def test_documents_by_title_or_by_blank_line():
    titled = split_documents(" = A = \n\n x \n\n = = Section = = \n y \n = B = \n z")
    assert (titled.names, titled.at(0), titled.at(30), titled.at(47)) == (["A", "B"], 0, 0, 1)
    plain = split_documents("one\ntwo\n\nthree\n \nfour\n\n")
    assert plain.names == ["one two", "three", "four"]
    assert [plain.at(i) for i in (0, 4, 9, 17)] == [0, 0, 1, 2]
    assert "blank line" in plain.rule


def test_columns_are_plain_and_of_one_length(case):
    anatomy, tokenizer, corpus = case
    ranking, columns = influence(
        anatomy, tokenizer, TEXT, corpus, [ablate(anatomy, ["L0.mlp.down[3, :]"])], config=FEW
    )
    assert {len(values) for values in columns.values()} == {corpus.predicted}
    assert {type(v) for values in columns.values() for v in values} == {int, float, str}
    assert "kl_patched" not in columns
    first = columns["kl_broken"].index(max(columns["kl_broken"]))
    row = {name: values[first] for name, values in columns.items()}
    assert vars(ranking.top[0]) == {**row, "kl_patched": None, "nll_patched": None}


def test_a_planted_story_holds_and_one_of_the_document_does_not(case, monkeypatch):
    """KL is made up: words of the sea are hit wherever they stand, or everything in the document
    about the sea is.
    """
    anatomy, tokenizer, corpus = case
    tokens = label_tokens(tokenizer, TEXT, corpus)
    words = ["crab", "fish", "stone"]
    noise = (
        torch.rand(len(tokens.ids), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        / 10
    )
    by_word = noise + torch.tensor([float(w in words) for w in tokens.words])
    by_document = noise + torch.tensor([float(d == 0) for d in tokens.documents])
    injury = [ablate(anatomy, ["L0.mlp.down[3, :]"])]
    groups = {}
    for name, values in (("word", by_word), ("document", by_document)):
        monkeypatch.setattr(
            import_module("surgeon.explain.influence"),
            "token_kl",
            lambda *_, v=values: ({"broken": v}, {"base": v, "broken": v}),
        )
        ranking, _ = influence(anatomy, tokenizer, TEXT, corpus, injury, {"sea": words}, FEW)
        (groups[name],) = ranking.groups
    assert groups["word"].mean_kl - groups["word"].same_documents_kl > 0.3
    assert groups["word"].p_within <= 0.05
    assert groups["word"].holds
    assert groups["document"].p_naive <= 0.05  # a bare ranking would have told the story
    assert groups["document"].p_within > 0.05
    assert not groups["document"].holds
    assert groups["document"].documents_nats > 0.1
    assert groups["document"].mean_kl == pytest.approx(
        groups["document"].same_documents_kl, abs=0.05
    )


def quantiles(values: list[float]) -> list[float]:
    ordered = sorted(values)
    return [ordered[round(q * (len(ordered) - 1))] for q in (0.05, 0.5, 0.95)]


@pytest.mark.slow
def test_the_bands_are_those_of_a_plain_permutation(case):
    """The nulls again, word by word in plain Python with another source of chance."""
    _, tokenizer, corpus = case
    tokens = label_tokens(tokenizer, TEXT, corpus)
    chance = random.Random(1)
    sea = {"crab", "fish", "stone"}
    values = [
        chance.random() + (d == 0) + 0.3 * (w in sea)
        for d, w in zip(tokens.documents, tokens.words, strict=True)
    ]
    units: dict[tuple[int, str], list[int]] = defaultdict(list)
    for i, key in enumerate(zip(tokens.documents, tokens.words, strict=True)):
        units[key].append(i)
    n, permutations = len(values), 3000

    def plain(label, stratum, wanted) -> list[float]:
        """The excess of the units labelled `wanted` over their strata, the labels shuffled within
        each stratum.
        """
        strata: dict[object, list[tuple[int, str]]] = defaultdict(list)
        for unit in units:
            strata[stratum(unit)].append(unit)
        means = []
        for _ in range(permutations):
            total = size = 0.0
            for members in strata.values():
                inside = [values[i] for unit in members for i in units[unit]]
                labels = [label(unit) for unit in members]
                chance.shuffle(labels)
                chosen = [
                    values[i]
                    for unit, given in zip(members, labels, strict=True)
                    if given == wanted
                    for i in units[unit]
                ]
                total += sum(chosen) - len(chosen) * sum(inside) / len(inside)
                size += len(chosen)
            means.append(total / size)
        return means

    def frequency(unit: tuple[int, str]) -> int:
        return frequency_class(tokens.counts[units[unit][0]])

    def close(band: dict[str, float], null: list[float]) -> None:
        expected = quantiles(null)
        assert [*band.values()] == pytest.approx(expected, abs=0.1 * (expected[2] - expected[0]))

    tests = stories.Tests(
        tokens,
        torch.tensor(values, dtype=torch.float64),
        InfluenceConfig(permutations=permutations, min_tokens=5),
    )
    documents = {d.name: d for d in tests.documents()}
    for d, name in enumerate(TITLES):
        close(documents[name].null, plain(lambda unit: unit[0], frequency, d))
        size = tokens.documents.count(d)
        close(
            documents[name].null_naive,
            [sum(chance.sample(values, size)) / size for _ in range(permutations)],
        )
    sea_mask = torch.tensor([w in sea for w in tokens.words])
    (story,) = tests.words({"sea": sea_mask})
    close(
        story.null,
        plain(lambda unit: unit[1] in sea, lambda unit: (unit[0], frequency(unit)), True),
    )
    size = int(sea_mask.sum())
    close(story.null_naive, [sum(chance.sample(values, size)) / size for _ in range(permutations)])
    common = tests.frequencies()[-1]
    close(common.null, plain(frequency, lambda unit: unit[0], max(map(frequency, units))))
    # what was planted: the first document lies above both bands, and only the naive one is about
    # the mean
    first = documents[TITLES[0]]
    assert first.excess_kl > first.null["q95"]
    assert first.mean_kl > first.null_naive["q95"]
    assert first.null_naive["q50"] == pytest.approx(sum(values) / n, abs=0.05)
    assert abs(first.null["q50"]) < 0.5 * first.excess_kl


def test_p_values_are_corrected_over_the_groups(case):
    anatomy, tokenizer, corpus = case
    groups = {"sea": ["crab", "fish", "SEA"], "land": ["cat", "dog"]}
    injury = [ablate(anatomy, ["L0.mlp.down[3, :]"])]
    one, two = influence(anatomy, tokenizer, TEXT, corpus, injury, groups, FEW)[0].groups
    assert sorted([one.p_corrected, two.p_corrected])[0] == pytest.approx(
        min(1, 2 * min(one.p_within, two.p_within))
    )
    again = influence(anatomy, tokenizer, TEXT, corpus, injury, groups, FEW)[0].groups
    assert [one, two] == again
    assert one.words == 3


def test_bad_input_is_said(case):
    anatomy, tokenizer, corpus = case
    injury = [ablate(anatomy, ["L0.mlp.down[3, :]"])]
    with pytest.raises(BadInput, match=r"no token belongs to the group 'space' \(2 words\)"):
        influence(anatomy, tokenizer, TEXT, corpus, injury, {"space": ["rocket", "moon"]}, FEW)
    with pytest.raises(BadInput, match="were not cut from the text"):
        influence(anatomy, tokenizer, TEXT.replace("crab", "dog"), corpus, injury, config=FEW)
    with pytest.raises(BadText, match="less than one window"):
        load_corpus(tokenizer, TEXT, "short", 4000)
    with pytest.raises(BadInput, match="at least 99"):
        configured(InfluenceConfig, {"permutations": 10})


# words of the subject, whether or not they rank
MARINE = (
    "lobster lobsters crustacean crustaceans homarus gammarus americanus nephrops norvegicus claw"
    " claws carapace shell shells larva larvae moult moults moulting egg eggs spawn spawning prey"
    " predator predators species sea seas ocean oceans atlantic mediterranean marine aquatic coast"
    " seabed reef fish fishing fishery fisheries fishermen pot pots fins gills crab crabs shrimp"
)


@pytest.mark.slow
def test_the_lobster_is_the_document_and_not_the_weight(shared):
    """docs/influence.md tells this with the numbers."""
    loaded = load_model(str(shared / "models" / "tinystories-656k"))
    anatomy = Anatomy.of(loaded.model)
    text = read_text(shared / "text" / "wikitext2-valid.txt")
    injury = [ablate(anatomy, ["L0.mlp.down[88, :]"])]

    def of(windows: int | None):
        corpus = load_corpus(loaded.tokenizer, text, "wikitext2-valid", windows=windows)
        ranking, _ = influence(
            anatomy,
            loaded.tokenizer,
            text,
            corpus,
            injury,
            {"marine": MARINE.split()},
            InfluenceConfig(permutations=499),
        )
        return ranking, ranking.groups[0]

    first, story = of(2)
    assert first.documents_seen == 1
    assert story.in_top >= 0.35  # the ranking of the first lines looks marine ...
    assert story.p_naive <= 0.05  # ... and a null that draws tokens from anywhere believes it
    assert story.p_document is None
    assert (
        not story.holds
    )  # words of the same article and frequency are hit as hard, as far as one can tell
    assert story.p_within > 0.05

    whole, story = of(None)
    assert whole.documents_seen == 60
    assert story.in_top == 0
    assert story.p_naive <= 0.05  # still believed
    assert not story.holds
    assert story.p_document > 0.05  # nor is the article hit harder than others
    gap, left = story.mean_kl - story.others_kl, story.mean_kl - story.same_documents_kl
    assert abs(left) < 0.5 * gap
