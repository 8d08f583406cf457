"""Sections on influence: stories about words, documents and frequencies on the bands of their
nulls, and how the tokens are spread.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

from .charts import Row, bands, lines
from .folder import Result
from .picture import Picture, Table, command, percent

DRAWN = 12
LISTED = 10
LEVEL = 0.05
BINS = [2.0**e for e in range(-14, 7)]  # edges, in nats
ANYWHERE, NEAR = "chance, tokens from anywhere", "chance, comparable words"


def influence_pictures(d: dict[str, Any], file: str, made_by: str) -> Iterator[Picture]:
    """Each story beside what chance gives: groups of words, then documents and frequencies."""
    n = d["permutations"]
    if d["groups"]:
        yield _groups(d["groups"], n, file, made_by)
    classes = [{**s, "name": f"{s['name']} times"} for s in d["frequencies"]]
    for name, strata, beside in (
        ("document", d["documents"], "words of the same frequency in the other documents"),
        ("class of frequency", classes, "words of other frequencies in the same documents"),
    ):
        if tested := [s for s in strata if s["p"] is not None]:
            yield _strata(name, tested, beside, n, file, made_by)
    top = d["top"]
    by_document = list(d["top_by_document"].items())
    yield Picture(
        "Tokens that change most",
        f"Of the {len(top)} tokens that change most, {by_document[0][1]} stand in one document of"
        f" {d['documents_seen']}",
        "A ranking, not a finding: it shows what the text is about. KL(intact || broken) in nats,"
        " booked on the token that is predicted. How documents are told apart:"
        f" {d['documents_rule']}.",
        file,
        made_by,
        shown=Table(
            ("KL, nats", "context", "token", "document"),
            [(t["kl_broken"], t["context"], _seen(t["token"]), t["title"]) for t in top[:LISTED]],
            len(top),
        ),
        table=Table(("document", "of the top tokens"), by_document),
    )


def _seen(token: str) -> str:
    """A token that is only white space, made visible."""
    return token if token.strip() else token.replace("\n", "↵").replace(" ", "␣") or "(empty)"


def _groups(groups: Sequence[dict[str, Any]], n: int, file: str, made_by: str) -> Picture:
    names = ", ".join(f"{g['name']} (p {g['p_corrected']:.2g})" for g in groups if g["holds"])
    others = ", ".join(f"{g['name']} (p {g['p_corrected']:.2g})" for g in groups if not g["holds"])
    parts = [f"Hit harder than other words of their documents: {names}"] if names else []
    parts += (
        [
            f"{'not' if names else 'Not'} shown to be hit harder than other words of their"
            f" documents: {others}"
        ]
        if others
        else []
    )
    return Picture(
        "The influence null",
        "; ".join(parts),
        "Mean KL(intact || broken) of the group's tokens, nats per token, on what chance gives:"
        f" the middle 90% of {n:,} permutations, with the median. Hollow: tokens drawn from"
        " anywhere, as a bare ranking has it, which takes what a document is about for an effect"
        " of the weights. Filled: whole words change places with others of the same document and"
        " frequency. p: one-sided, of the latter, corrected over the groups.",
        file,
        made_by,
        chart=_bands(groups),
        table=_table(
            "group",
            groups,
            {
                "p_naive": "p, tokens from anywhere",
                "p_within": "p within documents",
                "p_document": "p of documents",
            },
        ),
    )


def _strata(
    name: str, strata: Sequence[dict[str, Any]], beside: str, n: int, file: str, made_by: str
) -> Picture:
    hit = [s["name"] for s in strata if s["p_corrected"] <= LEVEL]
    naive = sum(s["mean_kl"] > s["null_naive"]["q95"] for s in strata)
    plural = f"{name}s" if name == "document" else "classes of frequency"
    which = f" ({', '.join(hit)})" if 0 < len(hit) <= 3 else ""
    least = min(s["p_corrected"] for s in strata)
    return Picture(
        f"Influence by {name}",
        (
            f"{len(hit)} of {len(strata)} {plural}{which} {'is' if len(hit) == 1 else 'are'} hit"
            " harder than comparable words elsewhere"
            if hit
            else (
                f"None found: no {name} of {len(strata)} is hit harder than comparable words"
                f" (smallest corrected p {least:.2g})"
            )
        ),
        f"Mean KL(intact || broken), nats per token, on what chance gives: the middle 90% of {n:,}"
        " permutations, with the median. Hollow: tokens drawn from anywhere; above that band lie"
        f" {naive} of {len(strata)}. Filled: whole words change places with {beside}. p: one-sided,"
        f" of the latter, corrected over all {len(strata)}."
        + (f" The {DRAWN} with the largest KL are drawn." if len(strata) > DRAWN else ""),
        file,
        made_by,
        chart=_bands(strata[:DRAWN]),
        table=_table(name, strata, {"p": "p"}),
    )


def _comparable(s: dict[str, Any]) -> dict[str, float]:
    """The null of comparable words where the mean KL is read: what is tested is the excess over
    these words, so their level is added.
    """
    return {q: s["mean_kl"] - s["excess_kl"] + value for q, value in s["null"].items()}


def _bands(items: Sequence[dict[str, Any]]) -> Any:
    names = [s["name"] for s in items]
    rows: list[Row] = []
    for i, s in enumerate(items):
        row = s["name"] if names.count(s["name"]) == 1 else f"{i + 1}. {s['name']}"
        says = f"{s['mean_kl']:.3f}, p {s['p_corrected']:.2g}"
        for null, band in ((ANYWHERE, s["null_naive"]), (NEAR, _comparable(s))):
            rows.append(
                {
                    "row": row,
                    "null": null,
                    "low": band["q05"],
                    "mid": band["q50"],
                    "high": band["q95"],
                    "x": s["mean_kl"],
                    "says": says,
                }
            )
    return bands(rows, (ANYWHERE, NEAR), "observed", "mean KL, nats per token")


def _table(name: str, items: Sequence[dict[str, Any]], p: dict[str, str]) -> Table:
    quantiles = [
        f"{null}, {q}" for null in ("anywhere", "comparable") for q in ("5%", "50%", "95%")
    ]
    return Table(
        (name, "tokens", "mean KL", *quantiles, *p.values(), "corrected p"),
        [
            [
                s["name"],
                s["tokens"],
                s["mean_kl"],
                *s["null_naive"].values(),
                *_comparable(s).values(),
                *(s[key] for key in p),
                s["p_corrected"],
            ]
            for s in items
        ],
    )


def token_pictures(result: Result) -> Iterator[Picture]:
    """How the KL is spread over the tokens, from tokens.parquet."""
    states = {
        name: result.data[f"kl_{key}"]
        for key, name in (("broken", "broken"), ("patched", "repaired"))
        if f"kl_{key}" in result.data
    }
    shares = {name: [0.0] * (len(BINS) + 1) for name in states}
    for name, values in states.items():
        for value in values:
            shares[name][bisect_right(BINS, value)] += 1 / len(values)
    used = [i for i in range(len(BINS) + 1) if any(share[i] for share in shares.values())]
    span = range(used[0], used[-1] + 1)
    # a bin stands at its middle on the doubling axis; the open ones as if they were as wide as the
    # others
    middle = [BINS[0] * 2.0 ** (i - 0.5) for i in span]
    rows = [
        {"x": x, "y": shares[name][i], "series": name}
        for name in states
        for i, x in zip(span, middle, strict=True)
    ]
    broken = sorted(states["broken"], reverse=True)
    total = sum(broken)
    most = sum(broken[: max(1, len(broken) // 10)]) / total if total > 0 else 0.0
    labels = {"broken": "broken", **({"repaired": "patched"} if len(states) > 1 else {})}
    halves = ", ".join(f"{median(values):.3g} nats {name}" for name, values in states.items())
    yield Picture(
        "How the KL is spread",
        f"Half of the {len(broken):,} tokens are under {halves}; the tenth that changes most holds"
        f" {percent(most)} of the KL when broken",
        f"KL(intact || broken){' and KL(intact || repaired)' if len(states) > 1 else ''} of each"
        f" predicted token, in bins that double; what is under {BINS[0]:.3g} nats is in the first.",
        result.file,
        command("explain", result.model, "--patch", "P", "--folder", "DIR"),
        chart=lines(
            rows,
            labels,
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
                    *(round(shares[s][i] * len(states[s])) for s in states),
                )
                for i in span
            ],
        ),
    )
