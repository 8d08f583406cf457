"""`measure`: likelihood and behaviour, with patches or without."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from ..measure import (
    Behaviour,
    Reference,
    generate,
    mean_nll,
    perplexity,
    require_causal,
    task_accuracy,
)
from ..patch import stacked
from ..result import Result, derived, record, result
from ..settings import nested, setting
from .lab import Lab, TextSettings
from .naming import patch_names, patches_of


@dataclass(frozen=True)
class Settings:
    """NLL and perplexity of MODEL; with patches also the KL to the unpatched model, and both
    generations side by side.
    """

    patches: Any = setting(
        (),
        "patch; several are applied in order",
        metavar="P",
        many=True,
        spelled="patch",
        is_file=True,
    )
    text: TextSettings = nested(TextSettings)
    prompts: tuple[str, ...] = setting(
        (), "also continue this prompt greedily", metavar="PROMPT", spelled="generate"
    )
    new_tokens: int = setting(40, "tokens of each generation", low=1)
    tasks: tuple[str, ...] = setting(
        (),
        "also: accuracy on an lm-eval task, by name or YAML file (needs weight-surgeon[eval])",
        spelled="task",
    )
    limit: int | None = setting(None, "examples of each task; not given: all", low=1)


@record
class Generation:
    """What the model writes after a prompt, without the patches and with them."""

    prompt: str
    base: str
    patched: str


@record
class TaskAccuracy:
    """Accuracy on one task, without the patches and with them."""

    base: float
    patched: float


@result("measure")
class Measurement(Result):
    """Likelihood in nats per token and behaviour; without patches nothing is compared with."""

    patches: list[str]
    nll: float
    tokens: int
    kl_from_base: float | None
    top1_agreement: float | None
    generations: list[Generation]
    loop_rate: float
    tasks: dict[str, TaskAccuracy]

    @derived
    def ppl(self) -> float:
        return perplexity(self.nll)


def run(lab: Lab, settings: Settings) -> Measurement:
    require_causal(lab.model)
    corpus = lab.corpus(settings.text)
    patches = patches_of(settings.patches)
    names = patch_names(settings.patches)
    write = partial(
        generate,
        lab.model,
        lab.tokenizer,
        settings.prompts,
        settings.new_tokens,
        settings.text.bos,
    )
    score = partial(task_accuracy, lab.model, lab.tokenizer, settings.tasks, settings.limit)

    with stacked(lab.anatomy, patches):
        changed = write()
        after = score() if settings.tasks else {}
    base, before = (write(), score() if settings.tasks else {}) if patches else (changed, after)
    if patches:
        reference = Reference(lab.model, corpus.windows)
        away = reference.compare(lambda: stacked(lab.anatomy, patches))
        nll, kl, top1 = away.nll, away.kl, away.top1_agreement
    else:
        nll, kl, top1 = mean_nll(lab.model, corpus.windows), None, None
    return Measurement(
        names,
        nll,
        corpus.predicted,
        kl,
        top1,
        [Generation(b.prompt, b.text, c.text) for b, c in zip(base, changed, strict=True)],
        _loop_rate(changed),
        {name: TaskAccuracy(before[name], after[name]) for name in after},
        provenance=lab.provenance(replace(settings, patches=names), corpus.record()),
    )


def _loop_rate(texts: Sequence[Behaviour]) -> float:
    return sum(text.loop for text in texts) / len(texts) if texts else 0.0
