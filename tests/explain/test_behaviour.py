"""Continuations in each state against `generate` on a model patched by hand."""

from surgeon.explain import PROMPTS, distinct, side_by_side
from surgeon.measure import generate
from surgeon.patch import ablate


def test_each_state_writes_what_the_patched_model_writes(case):
    anatomy, tokenizer, _ = case
    injury = ablate(anatomy, ["L0.mlp.down[3, :]"])
    with injury.applied(anatomy):
        repair = ablate(anatomy, ["L1.mlp.down[:, 2]"])
    written = side_by_side(anatomy, tokenizer, [injury, repair], ["the crab [b]"], 6)
    assert len(PROMPTS) == 10
    prompts = [text.prompt for text in written.generations]
    assert prompts == [*PROMPTS, "the crab [b]"]
    with injury.applied(anatomy):
        broken = generate(anatomy.model, tokenizer, prompts, 6)
        with repair.applied(anatomy):
            patched = generate(anatomy.model, tokenizer, prompts, 6)
    base = generate(anatomy.model, tokenizer, prompts, 6)
    for state, plain in (("base", base), ("broken", broken), ("patched", patched)):
        assert [getattr(text, state) for text in written.generations] == [b.text for b in plain]
        means = written.summary[state]
        assert means.loop_rate == sum(b.loop for b in plain) / 11
        for n, mean in ((1, means.distinct_1), (2, means.distinct_2), (3, means.distinct_3)):
            assert mean == sum(distinct(b.text.split(), n) for b in plain) / 11


def test_distinct_n():
    assert distinct(list("abab"), 1) == 0.5
    assert distinct(list("abab"), 2) == 2 / 3
    assert distinct(["a"], 2) == 0
