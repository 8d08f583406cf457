"""Sections on influence: stories about words, documents and frequencies on the bands of their
nulls, and how the tokens are spread.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

from ...errors import BadInput
from ...explain import Influence, Stratum, WordGroup
from .charts import Chart, Row, bands, lines
from .picture import Picture, Table, percent

DRAWN = 12
LISTED = 10
LEVEL = 0.05
BINS = [2.0**e for e in range(-14, 7)]  # edges, in nats
ANYWHERE, NEAR = "chance, tokens from anywhere", "chance, comparable words"


def influence_pictures(influence: Influence) -> Iterator[Picture]:
    """Each story beside what chance gives: groups of words, then documents and frequencies."""
    if influence.groups:
        yield _groups(influence)
    for name, strata, beside in (
        (
            "document",
            [_tested(one, one.name) for one in influence.documents],
            "words of the same frequency in the other documents",
        ),
        (
            "class of frequency",
            [_tested(one, f"{one.name} times") for one in influence.frequencies],
            "words of other frequencies in the same documents",
        ),
    ):
        tested = [one for one in strata if one is not None]
        if tested:
            yield _strata(name, tested, beside, influence.permutations)
    yield _ranking(influence)


class _Tested(NamedTuple):
    """Tokens whose mean KL was tested: what chance gives, drawn from anywhere and from comparable
    words, and the p of each test.
    """

    name: str
    tokens: int
    mean_kl: float
    anywhere: dict[str, float]
    comparable: dict[str, float]
    p: tuple[float | None, ...]
    p_corrected: float


def _comparable(mean: float, excess: float, null: Mapping[str, float]) -> dict[str, float]:
    """The null of comparable words where the mean KL is read: what is tested is the excess over
    these words, so their level is added.
    """
    return {quantile: mean - excess + value for quantile, value in null.items()}


def _tested(one: Stratum, name: str) -> _Tested | None:
    """None for a stratum that is the only one of its kind."""
    if one.p is None or one.p_corrected is None or one.excess_kl is None:
        return None
    comparable = _comparable(one.mean_kl, one.excess_kl, one.null or {})
    anywhere = one.null_naive or {}
    return _Tested(name, one.tokens, one.mean_kl, anywhere, comparable, (one.p,), one.p_corrected)


def _tested_group(one: WordGroup) -> _Tested:
    comparable = _comparable(one.mean_kl, one.excess_kl, one.null)
    p = (one.p_naive, one.p_within, one.p_document)
    return _Tested(
        one.name, one.tokens, one.mean_kl, one.null_naive, comparable, p, one.p_corrected
    )


def _ranking(influence: Influence) -> Picture:
    by_document = list(influence.top_by_document.items())
    return Picture(
        "Tokens that change most",
        f"Of the {len(influence.top)} tokens that change most, {by_document[0][1]} stand in one"
        f" document of {influence.documents_seen}",
        "A ranking, not a finding: it shows what the text is about. KL(intact || broken) in nats,"
        " booked on the token that is predicted. How documents are told apart:"
        f" {influence.documents_rule}.",
        shown=Table(
            ("KL, nats", "context", "token", "document"),
            [
                (row.kl_broken, row.context, _seen(row.token), row.title)
                for row in influence.top[:LISTED]
            ],
            len(influence.top),
        ),
        table=Table(("document", "of the top tokens"), by_document),
    )


def _seen(token: str) -> str:
    """A token that is only white space, made visible."""
    return token if token.strip() else token.replace("\n", "↵").replace(" ", "␣") or "(empty)"


def _groups(influence: Influence) -> Picture:
    groups = influence.groups
    hit = [_with_p(one) for one in groups if one.holds]
    others = [_with_p(one) for one in groups if not one.holds]
    said = []
    if hit:
        said.append(f"Hit harder than other words of their documents: {', '.join(hit)}")
    if others:
        negation = "not" if hit else "Not"
        said.append(
            f"{negation} shown to be hit harder than other words of their documents:"
            f" {', '.join(others)}"
        )
    tested = [_tested_group(one) for one in groups]
    return Picture(
        "The influence null",
        "; ".join(said),
        "Mean KL(intact || broken) of the group's tokens, nats per token, on what chance gives:"
        f" the middle 90% of {influence.permutations:,} permutations, with the median. Hollow:"
        " tokens drawn from anywhere, as a bare ranking has it, which takes what a document is"
        " about for an effect of the weights. Filled: whole words change places with others of the"
        " same document and frequency. p: one-sided, of the latter, corrected over the groups.",
        chart=_bands(tested),
        table=_table(
            "group", tested, ("p, tokens from anywhere", "p within documents", "p of documents")
        ),
    )


def _with_p(group: WordGroup) -> str:
    return f"{group.name} (p {group.p_corrected:.2g})"


def _strata(name: str, strata: Sequence[_Tested], beside: str, permutations: int) -> Picture:
    above = sum(one.mean_kl > one.anywhere["q95"] for one in strata)
    drawn = f" The {DRAWN} with the largest KL are drawn." if len(strata) > DRAWN else ""
    return Picture(
        f"Influence by {name}",
        _hit_strata(name, strata),
        "Mean KL(intact || broken), nats per token, on what chance gives: the middle 90% of"
        f" {permutations:,} permutations, with the median. Hollow: tokens drawn from anywhere;"
        f" above that band lie {above} of {len(strata)}. Filled: whole words change places with"
        f" {beside}. p: one-sided, of the latter, corrected over all {len(strata)}.{drawn}",
        chart=_bands(strata[:DRAWN]),
        table=_table(name, strata, ("p",)),
    )


def _hit_strata(name: str, strata: Sequence[_Tested]) -> str:
    hit = [one.name for one in strata if one.p_corrected <= LEVEL]
    if not hit:
        least = min(one.p_corrected for one in strata)
        return (
            f"None found: no {name} of {len(strata)} is hit harder than comparable words (smallest"
            f" corrected p {least:.2g})"
        )
    plural = "documents" if name == "document" else "classes of frequency"
    which = f" ({', '.join(hit)})" if len(hit) <= 3 else ""
    verb = "is" if len(hit) == 1 else "are"
    return (
        f"{len(hit)} of {len(strata)} {plural}{which} {verb} hit harder than comparable words"
        " elsewhere"
    )


def _bands(items: Sequence[_Tested]) -> Chart:
    names = [one.name for one in items]
    rows: list[Row] = []
    for number, one in enumerate(items, 1):
        row = one.name if names.count(one.name) == 1 else f"{number}. {one.name}"
        says = f"{one.mean_kl:.3f}, p {one.p_corrected:.2g}"
        for null, band in ((ANYWHERE, one.anywhere), (NEAR, one.comparable)):
            span = {"low": band["q05"], "mid": band["q50"], "high": band["q95"]}
            rows.append({"row": row, "null": null, **span, "x": one.mean_kl, "says": says})
    return bands(rows, (ANYWHERE, NEAR), "observed", "mean KL, nats per token")


def _table(name: str, items: Sequence[_Tested], p: Sequence[str]) -> Table:
    quantiles = [
        f"{null}, {quantile}"
        for null in ("anywhere", "comparable")
        for quantile in ("5%", "50%", "95%")
    ]
    return Table(
        (name, "tokens", "mean KL", *quantiles, *p, "corrected p"),
        [
            (
                one.name,
                one.tokens,
                one.mean_kl,
                *one.anywhere.values(),
                *one.comparable.values(),
                *one.p,
                one.p_corrected,
            )
            for one in items
        ],
    )


def token_pictures(tokens: Mapping[str, list[Any]]) -> Iterator[Picture]:
    """How the KL is spread over the tokens. Raises: BadInput for a table that is not of tokens."""
    states = {
        name: _numbers(tokens[column])
        for column, name in (("kl_broken", "broken"), ("kl_patched", "repaired"))
        if column in tokens
    }
    if "broken" not in states:
        raise _damaged()
    counts = {name: _counts(values) for name, values in states.items()}
    used = [i for i in range(len(BINS) + 1) if any(count[i] for count in counts.values())]
    span = range(used[0], used[-1] + 1)
    colours = {"broken": "broken", "repaired": "patched"}
    yield Picture(
        "How the KL is spread",
        _spread(states),
        f"{' and '.join(f'KL(intact || {name})' for name in states)} of each predicted token, in"
        f" bins that double; what is under {BINS[0]:.3g} nats is in the first.",
        chart=lines(
            # a bin stands at its middle on the doubling axis; the open ones as if they were as
            # wide as the others
            [
                {
                    "x": BINS[0] * 2.0 ** (i - 0.5),
                    "y": counts[name][i] / len(states[name]),
                    "series": name,
                }
                for name in states
                for i in span
            ],
            {name: colours[name] for name in states},
            "KL of a token, nats",
            "share of the tokens",
            decades=True,
            percent=True,
        ),
        table=Table(
            ("from, nats", "to", *(f"tokens, {name}" for name in states)),
            [
                (
                    BINS[i - 1] if i else None,
                    BINS[i] if i < len(BINS) else None,
                    *(count[i] for count in counts.values()),
                )
                for i in span
            ],
        ),
    )


def _numbers(column: Sequence[Any]) -> list[float]:
    if not column or not all(isinstance(value, float) for value in column):
        raise _damaged()
    return list(column)


def _damaged() -> BadInput:
    return BadInput("tokens.parquet is damaged or is not as Surgeon writes it; write it again.")


def _counts(values: Sequence[float]) -> list[int]:
    counts = [0] * (len(BINS) + 1)
    for value in values:
        counts[bisect_right(BINS, value)] += 1
    return counts


def _spread(states: Mapping[str, Sequence[float]]) -> str:
    broken = sorted(states["broken"], reverse=True)
    total = sum(broken)
    most = sum(broken[: max(1, len(broken) // 10)]) / total if total > 0 else 0.0
    halves = ", ".join(f"{median(values):.3g} nats {name}" for name, values in states.items())
    return (
        f"Half of the {len(broken):,} tokens are under {halves}; the tenth that changes most holds"
        f" {percent(most)} of the KL when broken"
    )
