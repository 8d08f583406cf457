"""Sections on measurements, injuries and sites."""

from __future__ import annotations

from collections.abc import Iterator

from ...studies.ablate import Injury
from ...studies.measure import Measurement
from ...studies.sites import SiteList
from .picture import Headline, Picture, Table, many, model_name, nats
from .texts import generations


def measure_headline(result: Measurement) -> Headline:
    """Of which model the measurements are."""
    return Headline(f"Measurements of {model_name(result.provenance.model)}")


def measure_pictures(result: Measurement) -> Iterator[Picture]:
    """Likelihood and divergence, accuracy on tasks, and what the model writes."""
    away = result.kl_from_base
    headline = f"NLL {result.nll:.3f} nats per token, perplexity {result.ppl:.2f}"
    if away is not None:
        headline += f", {nats(away)} nats of KL from the unpatched model"
    yield Picture(
        "Measured",
        headline,
        _about_text(result),
        shown=Table(
            ("measure", "value"),
            [
                ("NLL, nats per token", result.nll),
                ("perplexity", result.ppl),
                ("damage, nats per token", result.damage_nats),
                ("KL from the unpatched model, nats", away),
                ("most likely token agrees, share", result.top1_agreement),
                ("share of repeated 3-grams in what it writes", result.loop_rate),
            ],
        ),
    )
    if result.tasks:
        yield Picture(
            "Tasks",
            f"Accuracy on {many(len(result.tasks), 'task')}",
            "Measured by lm-eval.",
            shown=Table(
                ("task", "base", "patched"),
                [(name, one.base, one.patched) for name, one in result.tasks.items()],
            ),
        )
    if result.generations:
        states = ("base",) if result.base_nll is None else ("base", "patched")
        yield generations(
            [(g.prompt, [(s, str(getattr(g, s))) for s in states]) for g in result.generations]
        )


def _about_text(result: Measurement) -> str:
    corpus = result.provenance.corpus
    if corpus is None:
        return many(result.tokens, "token")
    bos = "with" if corpus.bos else "without"
    return f"On {corpus.name}, {many(result.tokens, 'token')}, {bos} BOS."


def injury_headline(result: Injury) -> Headline:
    return Headline(f"An injury of {model_name(result.provenance.model)}")


def injury_pictures(result: Injury) -> Iterator[Picture]:
    """What the patch changes."""
    yield Picture(
        "The injury",
        f"{many(result.entries, 'entry')} changed ({result.mode})",
        "A patch keeps the original entries, so that undoing it is exact.",
        shown=Table(("site",), [(site,) for site in result.sites]),
    )


def sites_headline(result: SiteList) -> Headline:
    return Headline(f"The weight matrices of {model_name(result.provenance.model)}")


def sites_pictures(result: SiteList) -> Iterator[Picture]:
    """Every site, one line each."""
    rows = [
        (str(one.site), one.shape[0], one.shape[1], one.stored, one.parameter)
        for one in result.sites
    ]
    yield Picture(
        "Sites",
        f"{many(len(rows), 'site')} in {many(result.layers, 'layer')}",
        f"The map was found by {result.source} and proved by experiment. Row = output channel,"
        " column = input neuron, however the model stores the matrix.",
        shown=Table(("site", "out", "in", "stored", "parameter"), rows),
    )
