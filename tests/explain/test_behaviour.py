"""Continuations in each state against `generate` on a model patched by hand."""

from surgeon.explain import PROMPTS, distinct, side_by_side
from surgeon.measure import generate
from surgeon.patch import ablate


def test_each_state_writes_what_the_patched_model_writes(case):
    anatomy, tokenizer, _ = case
    injury = ablate(anatomy, ["L0.mlp.down[3, :]"])
    with injury.applied(anatomy):
        repair = ablate(anatomy, ["L1.mlp.down[:, 2]"])
    found = side_by_side(anatomy, tokenizer, [injury, repair], ["the crab [b]"], 6)
    assert len(PROMPTS) == 10
    assert found.prompts == [*PROMPTS, "the crab [b]"]
    with injury.applied(anatomy):
        broken = generate(anatomy.model, tokenizer, found.prompts, 6)
        with repair.applied(anatomy):
            patched = generate(anatomy.model, tokenizer, found.prompts, 6)
    base = generate(anatomy.model, tokenizer, found.prompts, 6)
    for state, plain in (("base", base), ("broken", broken), ("patched", patched)):
        assert [c.text for c in found.states[state]] == [b.text for b in plain]
        assert found.loop_rate(state) == sum(b.loop for b in plain) / 11
    document = found.to_json()
    assert document["generations"][-1] == {
        "prompt": "the crab [b]",
        "base": base[-1].text,
        "broken": broken[-1].text,
        "patched": patched[-1].text,
    }
    assert set(document["summary"]["base"]) == {
        "loop_rate",
        "distinct_1",
        "distinct_2",
        "distinct_3",
    }


def test_distinct_n():
    assert distinct(list("abab"), 1) == 0.5
    assert distinct(list("abab"), 2) == 2 / 3
    assert distinct(["a"], 2) == 0
