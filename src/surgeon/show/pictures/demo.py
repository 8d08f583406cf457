"""The story of the demo: what was found, the states, the repair, the edit."""

from __future__ import annotations

from collections.abc import Iterator

from ...studies.demo import Demo
from .critical import find_headline, find_pictures
from .editing import edit_headline, edit_pictures
from .healing import repair_headline, repair_pictures
from .picture import Headline, Picture, Table
from .texts import generations


def demo_headline(result: Demo) -> Headline:
    first = find_headline(result.find)
    claims = [*first.claims]
    if result.repair is not None:
        claims += repair_headline(result.repair).claims
    if result.edit is not None:
        claims += edit_headline(result.edit).claims
    return Headline(first.sentence, claims)


def demo_pictures(result: Demo) -> Iterator[Picture]:
    """What was found, the states side by side, the repair, the edit."""
    yield from find_pictures(result.find)
    yield _states(result)
    yield generations(
        [
            (prompt, [(state.state, state.texts[number]) for state in result.states])
            for number, prompt in enumerate(result.prompts)
        ]
    )
    if result.repair is not None:
        yield from repair_pictures(result.repair)
    if result.edit is not None:
        yield from edit_pictures(result.edit)


def _states(result: Demo) -> Picture:
    base, worst = result.states[0], max(result.states, key=lambda state: state.nll)
    back = result.states[-1]
    end = f"{back.state}, it is {back.ppl:.2f}"
    if back.nll == base.nll and back.same_bits:
        end = f"once {back.state}, the model is bit for bit as before"
    known: tuple[str, ...] = ()
    about = (
        "NLL: mean negative log-likelihood of the text, in nats per token; perplexity is its"
        " exponential."
    )
    if result.facts is not None:
        known = (f"facts known, of {result.facts}",)
        about += (
            " A fact counts as known when at least three of its phrasings give it more than half"
            " the probability. Damage to stories need not be damage to facts."
        )
    return Picture(
        "The states",
        f"Perplexity goes from {base.ppl:.2f} to {worst.ppl:.2f}; {end}",
        about,
        shown=Table(
            ("state", "NLL, nats per token", "perplexity", *known, "weights"),
            [
                (
                    state.state,
                    state.nll,
                    state.ppl,
                    *([state.facts_known] if known else []),
                    "as trained, bit for bit" if state.same_bits else "changed",
                )
                for state in result.states
            ],
        ),
    )
