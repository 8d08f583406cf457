"""A section on what a model writes in each of several states."""

from __future__ import annotations

from .picture import Picture, compare


def generations(written: list[tuple[str, list[tuple[str, str]]]]) -> Picture:
    """What each state writes after each prompt; the first state is what the others are compared
    with.
    """
    first = written[0][1][0][0]
    differ = [
        f"{state} {sum(texts[i][1] != texts[0][1] for _, texts in written)} of {len(written)}"
        for i, (state, _) in enumerate(written[0][1])
        if i
    ]
    headline = (
        "Texts that differ from the " + first + " model's: " + ", ".join(differ)
        if differ
        else f"What the {first} model writes"
    )
    return Picture(
        "What it writes",
        headline,
        f"Greedy continuations. Underlined on colour: words that differ from the {first} model's. A"
        " few prompts are an illustration, not a measurement.",
        generations=[compare(prompt, texts) for prompt, texts in written],
    )
